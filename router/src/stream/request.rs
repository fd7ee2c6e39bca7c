//! One request while it runs: takes the output of its sequences from the sequencer, has it processed on the text
//! pool in order, and lets the client's stream read the result.
//!
//! Must stay true: the sequencer is never held up here; whatever ends the request early (client gone, reader too
//! slow, stop string) reaches the sequencer exactly once per sequence.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::{Started, Usage};
use conclave_router_core::api::{EndReason, FinishReason, SequenceId};
use tokio::sync::mpsc::OwnedPermit;
use tonic::Status;

use super::choice::{Choice, Verdict, is_worth_sending};
use super::queue::{MAX_UNREAD_TOKENS, ResponseQueue};
use super::timing::Timing;
use crate::metrics::Metrics;
use crate::pool::{StreamJob, TextPool};
use crate::sequencer::{End, Output, Sink};

/// What is fixed when a request starts.
pub struct RequestSpec {
    pub request_id: String,
    pub model: String,
    pub prompt: Arc<[u32]>,
    /// Where the text of each prompt token begins; empty where that is not known.
    pub offsets: Vec<u32>,
    /// The first choice's sequence brings the prompt's log-probabilities, and `Started` waits for them.
    pub prompt_logprobs: bool,
    pub arrived: Instant,
    pub span: tracing::Span,
}

/// A sequence's right to tell the sequencer that it ends.
type EndPermit = (SequenceId, OwnedPermit<End>);

/// A running request.
pub struct Request {
    spec: RequestSpec,
    pool: TextPool,
    metrics: Arc<Metrics>,
    inbox: Mutex<Vec<(u32, Instant, Output)>>,
    /// On the pool's queue, or being processed there.
    scheduled: AtomicBool,
    /// Tokens the sequencer pushed that the client has not read.
    unread: AtomicUsize,
    work: Mutex<Work>,
    permits: Mutex<Vec<Option<EndPermit>>>,
    pub(super) queue: ResponseQueue,
}

/// What the pool's thread works on.
struct Work {
    choices: Vec<Choice>,
    prompt_logprobs: Vec<conclave_proto::v1::TokenLogprobs>,
    timings: Vec<Timing>,
    started: bool,
    finished: usize,
    cached_tokens: u32,
}

impl Request {
    /// `permits` holds one entry per choice, in order.
    pub fn new(
        spec: RequestSpec,
        choices: Vec<Choice>,
        permits: Vec<EndPermit>,
        pool: TextPool,
        metrics: Arc<Metrics>,
    ) -> Arc<Request> {
        let queue = ResponseQueue::new(choices.len());
        let request = Request {
            pool,
            metrics,
            inbox: Mutex::new(Vec::new()),
            scheduled: AtomicBool::new(false),
            unread: AtomicUsize::new(0),
            permits: Mutex::new(permits.into_iter().map(Some).collect()),
            queue,
            work: Mutex::new(Work {
                timings: choices.iter().map(|_| Timing::new(spec.arrived)).collect(),
                choices,
                prompt_logprobs: Vec::new(),
                started: false,
                finished: 0,
                cached_tokens: 0,
            }),
            spec,
        };
        if !request.spec.prompt_logprobs {
            request.start(&mut lock(&request.work));
        }
        Arc::new(request)
    }

    /// Ends all sequences that still run.
    pub fn cancel(&self) {
        for permit in lock(&self.permits).iter_mut() {
            tell(permit.take(), EndReason::Cancelled);
        }
    }

    /// The sequences were never admitted: there is nothing to end.
    pub fn withdraw(&self) {
        for permit in lock(&self.permits).iter_mut() {
            permit.take();
        }
    }

    /// The client has taken so many tokens.
    pub(super) fn read(&self, tokens: usize) {
        self.unread.fetch_sub(tokens, Ordering::Relaxed);
    }

    fn end(&self, choice: usize, reason: EndReason) {
        tell(lock(&self.permits)[choice].take(), reason);
    }

    /// Ends the whole request with an error.
    fn fail(&self, status: Status) {
        self.cancel();
        self.queue.end(Err(status));
    }

    fn start(&self, work: &mut Work) {
        if !std::mem::replace(&mut work.started, true) {
            if self.spec.prompt_logprobs && work.prompt_logprobs.is_empty() {
                // A prompt of one token: nothing comes before it that could predict it.
                work.prompt_logprobs.push(Default::default());
            }
            self.queue.start(Event::Started(Started {
                request_id: self.spec.request_id.clone(),
                model: self.spec.model.clone(),
                prompt_token_ids: self.spec.prompt.to_vec(),
                prompt_logprobs: std::mem::take(&mut work.prompt_logprobs),
            }));
        }
    }

    /// The first choice's tokens come after the prompt's log-probabilities. Another may be ahead of it, on a faster
    /// worker: where they are wanted, what it says waits in the queue.
    fn start_by(&self, choice: usize, work: &mut Work) {
        if choice == 0 || !self.spec.prompt_logprobs {
            self.start(work);
        }
    }

    fn process(&self, work: &mut Work, index: u32, at: Instant, output: Output) {
        let place = index as usize;
        match output {
            Output::Running => {
                work.timings[place].running(at, &self.metrics);
            }
            Output::PromptLogprobs(entries) => {
                if work.prompt_logprobs.is_empty() {
                    // Nothing comes before the first token that could predict it.
                    work.prompt_logprobs.push(Default::default());
                }
                for logprobs in entries {
                    let position = work.prompt_logprobs.len();
                    if let Some(&token) = self.spec.prompt.get(position) {
                        let offset = self.spec.offsets.get(position).copied().unwrap_or(0);
                        let entry = work.choices[place].prompt_entry(token, &logprobs, offset);
                        work.prompt_logprobs.push(entry);
                    }
                }
            }
            Output::Tokens(tokens) => {
                self.start_by(place, work);
                if let Some(first) = work.timings[place].tokens(at, &self.metrics)
                    && index == 0
                {
                    self.spec.span.record("ttft_ms", first * 1e3);
                }
                let choice = &mut work.choices[place];
                let followed = choice.follow(&tokens, &self.metrics);
                let given = tokens.len();
                let (delta, verdict) = choice.push(tokens);
                // Tokens after a stop string are not the client's.
                self.read(given - delta.token_ids.len());
                if is_worth_sending(&delta) {
                    self.queue.push_delta(delta);
                }
                if let Verdict::Stopped(finished) = verdict {
                    self.end(place, EndReason::Stop);
                    self.finished(&finished);
                    self.queue.push(Some(place), Event::Finished(finished));
                }
                if let Err(error) = followed {
                    self.end(place, EndReason::Cancelled);
                    self.tell_end(work, place, FinishReason::Unsatisfiable(error.to_string()));
                }
            }
            Output::Finish { reason, usage } => {
                self.start_by(place, work);
                lock(&self.permits)[place].take();
                if index == 0 {
                    work.cached_tokens = usage.cached_tokens;
                }
                self.finish(work, place, reason);
            }
        }
    }

    fn finish(&self, work: &mut Work, place: usize, reason: FinishReason) {
        self.tell_end(work, place, reason);
        work.timings[place].finished(work.choices[place].tokens(), &self.metrics);
        work.finished += 1;
        if work.finished == work.choices.len() {
            self.complete(work);
        }
    }

    /// Unless the client was told already.
    fn tell_end(&self, work: &mut Work, place: usize, reason: FinishReason) {
        if let Some((delta, finished)) = work.choices[place].finish(reason) {
            if is_worth_sending(&delta) {
                self.queue.push_delta(delta);
            }
            self.finished(&finished);
            self.queue.push(Some(place), Event::Finished(finished));
        }
    }

    fn complete(&self, work: &Work) {
        let usage = Usage {
            prompt_tokens: count(self.spec.prompt.len()),
            completion_tokens: work.choices.iter().map(|choice| choice.tokens()).sum(),
            cached_tokens: work.cached_tokens,
            reasoning_tokens: work.choices.iter().map(|choice| choice.reasoning_tokens()).sum(),
        };
        self.metrics
            .request_prompt_tokens
            .observe(usage.prompt_tokens.into());
        let took = self.spec.arrived.elapsed();
        self.metrics.request_latency.observe(took.as_secs_f64());
        let span = &self.spec.span;
        span.record("prompt_tokens", usage.prompt_tokens);
        span.record("completion_tokens", usage.completion_tokens);
        span.record("cached_tokens", usage.cached_tokens);
        self.queue.push(None, Event::Usage(usage));
        self.queue.end(Ok(()));
    }

    fn finished(&self, finished: &conclave_proto::v1::Finished) {
        use conclave_proto::v1::FinishReason as Wire;
        self.metrics.finished(match finished.reason() {
            Wire::Length => "length",
            Wire::Cancelled => "abort",
            Wire::Error | Wire::Unsatisfiable | Wire::Unspecified => "error",
            Wire::Stop | Wire::ToolCalls => "stop",
        });
    }
}

impl Sink for Request {
    fn push(self: Arc<Self>, choice: u32, output: Output) {
        if let Output::Tokens(tokens) = &output {
            let before = self.unread.fetch_add(tokens.len(), Ordering::Relaxed);
            let unread = before + tokens.len();
            if before > MAX_UNREAD_TOKENS {
                // It has failed already; this was on its way.
                return;
            }
            if unread > MAX_UNREAD_TOKENS {
                self.metrics.slow_readers.inc();
                return self.fail(Status::resource_exhausted(format!(
                    "the client left {unread} tokens unread, at most {MAX_UNREAD_TOKENS} are kept: read faster"
                )));
            }
        }
        lock(&self.inbox).push((choice, Instant::now(), output));
        if !self.scheduled.swap(true, Ordering::AcqRel) && !self.pool.stream(self.clone()) {
            self.fail(Status::internal("the text pool is gone"));
        }
    }
}

impl StreamJob for Request {
    fn run(self: Arc<Self>) {
        let mut work = lock(&self.work);
        loop {
            let batch = std::mem::take(&mut *lock(&self.inbox));
            if batch.is_empty() {
                self.scheduled.store(false, Ordering::Release);
                // Something may have been pushed between the look and the flag.
                if lock(&self.inbox).is_empty() || self.scheduled.swap(true, Ordering::AcqRel) {
                    return;
                }
                continue;
            }
            for (choice, at, output) in batch {
                self.process(&mut work, choice, at, output);
            }
        }
    }

    fn failed(&self) {
        self.fail(Status::internal(
            "this request's output could not be processed; the router's log says more",
        ));
    }
}

fn tell(permit: Option<EndPermit>, reason: EndReason) {
    if let Some((id, permit)) = permit {
        permit.send(End { id, reason });
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // After a panic the request is failed and its state is not used again.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn count(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
