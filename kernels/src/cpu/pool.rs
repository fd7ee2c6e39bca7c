//! A few threads that live as long as the backend and run the tasks of one op at a time.
//!
//! May touch: nothing but its own threads. Must stay true: [`Pool::run`] returns when every task has run and no
//! thread holds the closure any more; with one thread tasks run on the caller's; no call allocates. Who runs a task
//! is left to chance: tasks write to places of their own, so results do not depend on it.

use std::any::Any;
use std::cell::UnsafeCell;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

/// Looks at the state this often before a thread sleeps: some tens of microseconds, the gap between two ops.
const SPINS: u32 = 4_000;

/// A task gets its own number and that of the thread that runs it.
type Task<'a> = &'a (dyn Fn(usize, usize) + Sync);

/// The closure of the current run, its lifetime erased.
#[derive(Clone, Copy)]
struct Job {
    task: Task<'static>,
    tasks: usize,
}

struct Shared {
    /// Generation of the run in the upper half, tasks not yet claimed in the lower.
    state: AtomicU64,
    /// Written by `run` before it publishes a generation; read by a thread that has claimed a task of it.
    job: UnsafeCell<Job>,
    finished: AtomicUsize,
    /// Threads that have started: starting one allocates.
    started: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

// SAFETY: `job` is written only while no task is claimed or claimable, and read only by holders of a claimed task;
// `state` orders the two.
unsafe impl Sync for Shared {}

/// The threads; the caller of `run` is one more.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

impl Pool {
    /// A pool of `threads` threads, the caller's included.
    pub(crate) fn new(threads: usize) -> std::io::Result<Pool> {
        let shared = Arc::new(Shared {
            state: AtomicU64::new(0),
            job: UnsafeCell::new(Job {
                task: &|_, _| {},
                tasks: 0,
            }),
            finished: AtomicUsize::new(0),
            started: AtomicUsize::new(1),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let mut pool = Pool {
            shared,
            workers: Vec::new(),
        };
        for thread in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let builder = std::thread::Builder::new().name(format!("kernels-{thread}"));
            pool.workers.push(builder.spawn(move || work(&shared, thread))?);
        }
        while pool.shared.started.load(Ordering::Acquire) < threads {
            std::thread::yield_now();
        }
        Ok(pool)
    }

    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Runs `task(i, thread)` for i in `0..tasks`, each once; `thread` is below `threads` and no two tasks run with
    /// the same one at a time. A task's panic is resumed here after all others have ended. `&mut`: one run at a time.
    pub(crate) fn run(&mut self, tasks: usize, task: Task<'_>) {
        if self.workers.is_empty() || tasks < 2 {
            (0..tasks).for_each(|i| task(i, 0));
            return;
        }
        let shared = &*self.shared;
        assert!(tasks <= u32::MAX as usize, "too many tasks");
        // SAFETY: the lifetime ends after this function has seen every task finish, and no thread calls `task`
        // without having claimed one. The previous run has ended, so nobody reads `job`.
        unsafe {
            *shared.job.get() = Job {
                task: std::mem::transmute::<Task<'_>, Task<'static>>(task),
                tasks,
            };
        }
        shared.finished.store(0, Ordering::Relaxed);
        let generation = (shared.state.load(Ordering::Relaxed) >> 32).wrapping_add(1);
        shared
            .state
            .store(generation << 32 | tasks as u64, Ordering::Release);
        self.workers.iter().for_each(|worker| worker.thread().unpark());
        while claim_and_run(shared, 0) {}
        let mut spins = 0;
        while shared.finished.load(Ordering::Acquire) != tasks {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let panic = shared.panic.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // Tasks' panics are caught, so a worker has none of its own.
            let _ = worker.join();
        }
    }
}

/// Runs one task if there is one.
fn claim_and_run(shared: &Shared, thread: usize) -> bool {
    let mut state = shared.state.load(Ordering::Acquire);
    loop {
        if state as u32 == 0 {
            return false;
        }
        match shared
            .state
            .compare_exchange_weak(state, state - 1, Ordering::AcqRel, Ordering::Acquire)
        {
            Ok(_) => break,
            Err(now) => state = now,
        }
    }
    // SAFETY: a claimed task of the current generation keeps `run` from returning and from writing `job`.
    let job = unsafe { *shared.job.get() };
    let index = job.tasks - (state as u32) as usize;
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (job.task)(index, thread))) {
        *shared.panic.lock().unwrap_or_else(PoisonError::into_inner) = Some(panic);
    }
    shared.finished.fetch_add(1, Ordering::Release);
    true
}

fn work(shared: &Shared, thread: usize) {
    shared.started.fetch_add(1, Ordering::Release);
    let mut idle = 0;
    while !shared.stop.load(Ordering::Acquire) {
        if claim_and_run(shared, thread) {
            idle = 0;
        } else if idle < SPINS {
            idle += 1;
            std::hint::spin_loop();
        } else {
            // A wake-up between the look at the state and here is kept by `unpark`'s token.
            std::thread::park();
            idle = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once_in_every_run() {
        for threads in [1, 2, 3, 5] {
            let mut pool = Pool::new(threads).unwrap();
            for tasks in [0, 1, 2, 3, 64, 1000, 1, 7] {
                for _ in 0..50 {
                    let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                    let busy: Vec<AtomicBool> = (0..threads).map(|_| AtomicBool::new(false)).collect();
                    pool.run(tasks, &|i, thread| {
                        assert!(!busy[thread].swap(true, Ordering::SeqCst));
                        counts[i].fetch_add(1, Ordering::SeqCst);
                        busy[thread].store(false, Ordering::SeqCst);
                    });
                    assert!(counts.iter().all(|count| count.load(Ordering::SeqCst) == 1));
                }
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_goes_on() {
        let mut pool = Pool::new(3).unwrap();
        let result = catch_unwind(AssertUnwindSafe(|| pool.run(8, &|i, _| assert_ne!(i, 5))));
        assert!(result.is_err());
        let count = AtomicUsize::new(0);
        pool.run(8, &|_, _| {
            count.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(count.into_inner(), 8);
    }
}
