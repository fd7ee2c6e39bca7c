//! Sequences outside of the core: what a request becomes when it is submitted, and where its tokens go.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use conclave_router_core::api::{EndReason, Event, FinishReason, SequenceId, StepPlan, Usage};

use super::super::peer::Peer;
use super::super::{Output, Sink, Submission};
use super::Machine;

/// Most trace parents in one step: spans are for looking at single requests.
const MAX_TRACE_PARENTS: usize = 16;

/// A live sequence's place outside of the core.
pub(super) struct Stream {
    pub(super) sink: Arc<dyn Sink>,
    pub(super) choice: u32,
    pub(super) started: bool,
    pub(super) trace_parent: Option<Arc<str>>,
}

impl Machine {
    /// Hands a request's sequences to the core; if it refuses one, all of them end.
    pub(super) fn submit(&mut self, submission: Submission) {
        let Submission {
            sequences,
            sink,
            trace_parent,
            reply,
        } = submission;
        if reply.is_closed() {
            return; // the client went away while its request was on its way here
        }
        let ids: Vec<SequenceId> = sequences.iter().map(|sequence| sequence.id).collect();
        self.refused = None;
        for (choice, sequence) in (0..).zip(sequences) {
            let stream = Stream {
                sink: sink.clone(),
                choice,
                started: false,
                trace_parent: trace_parent.clone(),
            };
            self.streams.insert(sequence.id, stream);
            self.handle(Event::Submit(sequence));
            if self.refused.is_some() {
                break;
            }
        }
        let answer = match self.refused.take() {
            None => Ok(()),
            Some(rejection) => {
                for id in ids {
                    if self.streams.remove(&id).is_some() {
                        self.handle(Event::End {
                            id,
                            reason: EndReason::Cancelled,
                        });
                    }
                }
                Err(rejection)
            }
        };
        // A client that went away just now tells so by its end permits.
        let _ = reply.send(answer);
    }

    pub(super) fn output(&mut self, id: SequenceId, output: Output) {
        if let Some(stream) = self.streams.get(&id) {
            Arc::clone(&stream.sink).push(stream.choice, output);
        }
    }

    pub(super) fn finish(&mut self, id: SequenceId, reason: FinishReason, usage: Usage) {
        if let Some(stream) = self.streams.remove(&id) {
            Arc::clone(&stream.sink).push(stream.choice, Output::Finish { reason, usage });
        }
    }
}

/// The sampled requests among the sequences of a step.
pub(super) fn trace_parents(
    peer: &Peer,
    streams: &HashMap<SequenceId, Stream>,
    plan: &StepPlan,
) -> Vec<String> {
    let mut seen = HashSet::new();
    let mut parents = Vec::new();
    for run in &plan.runs {
        let stream = peer.sequence(run.slot).and_then(|id| streams.get(&id));
        if let Some(parent) = stream.and_then(|stream| stream.trace_parent.as_ref())
            && parents.len() < MAX_TRACE_PARENTS
            && seen.insert(parent.clone())
        {
            parents.push(parent.to_string());
        }
    }
    parents
}
