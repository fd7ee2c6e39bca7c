//! Threads for text work: tokenizing and templates of requests on some, compiling of grammars on others, and the
//! streams' output on a third kind, so that a long prompt or a costly grammar never delays the tokens of those who are
//! being answered. None of it ever runs on the sequencer or the async runtime.
//!
//! Must stay true: the queues are bounded, the output of one request is processed by one thread at a time, and a
//! panic in one request's work ends that request alone.
//!
//! Keeps invariant T2 of ARCHITECTURE.md.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use tokio::sync::oneshot;
use tonic::Status;

use crate::api::errors;
use crate::error::{Result, RouterError};

/// Requests whose text may wait for a thread; more are refused.
pub const PROMPT_QUEUE: usize = 1024;
/// Requests whose grammar may wait to be compiled, each for up to a second; more are refused.
pub const GRAMMAR_QUEUE: usize = 128;
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
    grammars: Sender<Job>,
    streams: Sender<Arc<dyn StreamJob>>,
}

impl TextPool {
    /// `threads` for prompts (0: half the cores); `max_streams` requests may be alive at once.
    pub fn start(threads: usize, max_streams: usize) -> Result<TextPool> {
        let half = thread::available_parallelism().map_or(2, usize::from).div_ceil(2);
        let (prompts, prompt_jobs) = bounded::<Job>(PROMPT_QUEUE);
        let (grammars, grammar_jobs) = bounded::<Job>(GRAMMAR_QUEUE);
        let (streams, stream_jobs) = bounded::<Arc<dyn StreamJob>>(max_streams);
        for i in 0..if threads == 0 { half } else { threads } {
            let (prompts, grammars) = (prompt_jobs.clone(), grammar_jobs.clone());
            spawn(format!("text-prompt-{i}"), move || run_all(&prompts))?;
            spawn(format!("text-grammar-{i}"), move || run_all(&grammars))?;
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
        Ok(TextPool {
            prompts,
            grammars,
            streams,
        })
    }

    /// Does text work of a request. The work is skipped if the caller goes away before its turn.
    pub async fn prompt<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, Status> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let full =
            format!("{PROMPT_QUEUE} prompts wait to be tokenized, which is all that may; try again later");
        queued(&self.prompts, full, work).await
    }

    /// The same for the compiling of a grammar.
    pub async fn grammar<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> std::result::Result<T, Status> + Send + 'static,
    ) -> std::result::Result<T, Status> {
        let full =
            format!("{GRAMMAR_QUEUE} grammars wait to be compiled, which is all that may; try again later");
        queued(&self.grammars, full, work).await
    }

    /// Queues a request's output; it must not be queued already. False if the pool is at its bound, which callers
    /// keep it from.
    #[must_use]
    pub fn stream(&self, job: Arc<dyn StreamJob>) -> bool {
        self.streams.try_send(job).is_ok()
    }
}

fn run_all(jobs: &Receiver<Job>) {
    for job in jobs {
        if catch_unwind(AssertUnwindSafe(job)).is_err() {
            tracing::error!("text work of a request panicked; the request fails, others go on");
        }
    }
}

async fn queued<T: Send + 'static>(
    queue: &Sender<Job>,
    full: String,
    work: impl FnOnce() -> std::result::Result<T, Status> + Send + 'static,
) -> std::result::Result<T, Status> {
    let (reply, answer) = oneshot::channel();
    let job = Box::new(move || {
        if !reply.is_closed() {
            // The caller may go away while the work is done.
            let _ = reply.send(work());
        }
    });
    match queue.try_send(job) {
        Ok(()) => {}
        Err(TrySendError::Full(_)) => return Err(errors::exhausted(full, RETRY_AFTER)),
        Err(TrySendError::Disconnected(_)) => return Err(errors::draining()),
    }
    answer.await.unwrap_or_else(|_| {
        Err(Status::internal(
            "text work on this request failed unexpectedly; the router's log says more",
        ))
    })
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
