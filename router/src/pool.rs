//! Threads for text work: tokenizing, templates and grammars of requests on some, and the streams' output on
//! others, so that a long prompt never delays the tokens of those who are being answered. Neither ever runs on the
//! sequencer or the async runtime.
//!
//! Must stay true: the queues are bounded, the output of one request is processed by one thread at a time, and a
//! panic in one request's work ends that request alone.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Sender, TrySendError, bounded};
use tokio::sync::oneshot;
use tonic::Status;

use crate::api::errors;
use crate::error::{Result, RouterError};

/// Requests whose text may wait for a thread; more are refused.
pub const PROMPT_QUEUE: usize = 1024;
/// When a client that was refused for want of a thread should try again.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// More threads than this do not help: tokens come from the workers.
const MAX_STREAM_THREADS: usize = 4;

type Job = Box<dyn FnOnce() + Send>;

/// Something whose output waits to be processed. Queued at most once at a time.
pub trait StreamJob: Send + Sync {
    /// Processes all that waits.
    fn run(self: Arc<Self>);
    /// `run` panicked.
    fn failed(&self);
}

/// The pool; its threads end when all clones are gone.
#[derive(Clone)]
pub struct TextPool {
    prompts: Sender<Job>,
    streams: Sender<Arc<dyn StreamJob>>,
}

impl TextPool {
    /// `threads` for prompts (0: half the cores); `max_streams` requests may be alive at once.
    pub fn start(threads: usize, max_streams: usize) -> Result<TextPool> {
        let half = thread::available_parallelism().map_or(2, usize::from).div_ceil(2);
        let (prompts, prompt_jobs) = bounded::<Job>(PROMPT_QUEUE);
        let (streams, stream_jobs) = bounded::<Arc<dyn StreamJob>>(max_streams);
        for i in 0..if threads == 0 { half } else { threads } {
            let jobs = prompt_jobs.clone();
            spawn(format!("text-prompt-{i}"), move || {
                for job in jobs {
                    if catch_unwind(AssertUnwindSafe(job)).is_err() {
                        tracing::error!("text work of a request panicked; the request fails, others go on");
                    }
                }
            })?;
        }
        for i in 0..half.min(MAX_STREAM_THREADS) {
            let jobs = stream_jobs.clone();
            spawn(format!("text-stream-{i}"), move || {
                for job in jobs {
                    let running = Arc::clone(&job);
                    if catch_unwind(AssertUnwindSafe(|| running.run())).is_err() {
                        tracing::error!("the output of a request panicked; its stream ends, others go on");
                        job.failed();
                    }
                }
            })?;
        }
        Ok(TextPool { prompts, streams })
    }

    /// Does text work of a request. The work is skipped if the caller goes away before its turn.
    pub async fn prompt<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, Status> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let (reply, answer) = oneshot::channel();
        let job = Box::new(move || {
            if !reply.is_closed() {
                // The caller may go away while the work is done.
                let _ = reply.send(work());
            }
        });
        match self.prompts.try_send(job) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                return Err(errors::exhausted(
                    format!(
                        "{PROMPT_QUEUE} prompts wait to be tokenized, which is all that may; try again later"
                    ),
                    RETRY_AFTER,
                ));
            }
            Err(TrySendError::Disconnected(_)) => return Err(errors::draining()),
        }
        answer.await.unwrap_or_else(|_| {
            Err(Status::internal(
                "text work on this request failed unexpectedly; the router's log says more",
            ))
        })
    }

    /// Queues a request's output; it must not be queued already. False if the pool is at its bound, which callers
    /// keep it from.
    #[must_use]
    pub fn stream(&self, job: Arc<dyn StreamJob>) -> bool {
        self.streams.try_send(job).is_ok()
    }
}

fn spawn(name: String, body: impl FnOnce() + Send + 'static) -> Result<()> {
    let builder = thread::Builder::new().name(name);
    builder
        .spawn(body)
        .map(drop)
        .map_err(|source| RouterError::Start {
            what: "a text thread",
            source,
        })
}
