//! The thread of one rank of a group: as the device thread of a worker, without a router.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender};
use std::time::Duration;

use conclave_proto::cluster::v1 as wire;

use super::choices::Forced;
use crate::device::Rank;
use crate::model::Tap;

/// What one rank has to say after a step.
#[derive(Clone, Debug, Default)]
pub struct RankOutput {
    pub result: wire::StepResult,
    /// If they were asked for: `[logit rows, vocab]`.
    pub logits: Vec<f32>,
    /// If they were asked for: by layer `[tokens, experts]`.
    pub router_logits: Vec<Vec<f32>>,
}

/// What is kept of a step beside its result.
#[derive(Clone, Debug, Default)]
pub enum Looks {
    #[default]
    Nothing,
    Logits,
    /// Router logits, too, of a step that the device runs whole.
    Gates,
    /// The same op by op.
    Inside,
    /// Op by op, with choices of experts that were made elsewhere.
    Forced(Forced),
}

/// Jobs that may be sent ahead of the answers.
pub const MAX_QUEUED: usize = 4;
const LOOK_EVERY: Duration = Duration::from_micros(20);

/// Work on a rank's thread between steps.
pub(super) type Work = Box<dyn FnOnce(&mut Rank) -> Result<(), String> + Send>;

pub(super) enum Job {
    Step(Box<wire::Step>, Looks),
    Work(Work),
}

/// Until the group is gone; as the device thread of a worker does, a step is queued before the one in front of it is
/// waited for.
pub(super) fn run(rank: &mut Rank, jobs: &Receiver<Job>, output: &SyncSender<Result<RankOutput, String>>) {
    let mut recorders = VecDeque::<Recorder>::new();
    let mut held = None;
    loop {
        if rank.in_flight() == 0 && held.is_none() {
            held = jobs.recv().ok();
            if held.is_none() {
                return;
            }
        }
        if held.is_none() {
            held = jobs.try_recv().ok();
        }
        let may_start = match &held {
            Some(Job::Step(step, _)) => rank.may_submit(step),
            Some(Job::Work(_)) => rank.in_flight() == 0,
            None => false,
        };
        // Nobody listens to what is sent if another rank failed first.
        if may_start {
            match held.take() {
                Some(Job::Step(step, looks)) => {
                    let mut recorder = Recorder {
                        looks,
                        output: RankOutput::default(),
                    };
                    match rank.submit(*step, &mut recorder) {
                        Ok(()) => recorders.push_back(recorder),
                        Err(error) => {
                            recorders.clear();
                            let _ = output.send(Err(error.to_string()));
                        }
                    }
                }
                Some(Job::Work(work)) => {
                    let _ = output.send(work(rank).map(|()| RankOutput::default()));
                }
                None => {}
            }
            continue;
        }
        if held.is_none() && !rank.is_ready().unwrap_or(true) {
            match jobs.recv_timeout(LOOK_EVERY) {
                Ok(job) => held = Some(job),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            continue;
        }
        let mut recorder = recorders.pop_front().unwrap_or_default();
        let answer = match rank.fetch(&mut recorder) {
            Ok(result) => {
                recorder.output.result = result;
                Ok(recorder.output)
            }
            Err(error) => Err(error.to_string()),
        };
        let _ = output.send(answer);
    }
}

/// Keeps what it sees.
#[derive(Default)]
struct Recorder {
    looks: Looks,
    output: RankOutput,
}

impl Tap for Recorder {
    fn looks(&self) -> bool {
        !matches!(self.looks, Looks::Nothing)
    }

    fn looks_inside(&self) -> bool {
        matches!(self.looks, Looks::Inside | Looks::Forced(_))
    }

    fn watches_gates(&self) -> bool {
        matches!(self.looks, Looks::Gates)
    }

    fn choose(&mut self, layer: usize, router_logits: &[f32]) -> Option<(Vec<u32>, Vec<f32>)> {
        match &self.looks {
            Looks::Forced(forced) => Some(forced.of(layer, router_logits)),
            _ => None,
        }
    }

    fn router_logits(&mut self, layer: usize, values: &[f32]) {
        let layers = &mut self.output.router_logits;
        layers.resize_with(layers.len().max(layer + 1), Vec::new);
        layers[layer].extend_from_slice(values);
    }

    fn logits(&mut self, _: usize, values: &[f32]) {
        self.output.logits.extend_from_slice(values);
    }
}
