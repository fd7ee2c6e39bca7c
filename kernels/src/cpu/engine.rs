//! What every op runs on: the instruction set, the threads, and scratch per thread.

use std::marker::PhantomData;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use crate::backend::{KernelError, Result};
use crate::cpu::pool::Pool;
use crate::ops::experts::Hidden;
use crate::ops::{attention, linear, sample};
use crate::simd::Isa;

/// Scratch of one thread.
pub(crate) struct ThreadScratch {
    pub(crate) linear: linear::Scratch,
    pub(crate) hidden: Hidden,
    pub(crate) attention: attention::Scratch,
    pub(crate) sample: sample::Scratch,
}

/// Instruction set, threads and their scratch.
pub(crate) struct Engine {
    pub(crate) isa: Isa,
    /// What products read is rounded to BF16 before, as on a GPU: to see what that alone does.
    pub(crate) rounds: bool,
    pool: Pool,
    scratch: Vec<Mutex<ThreadScratch>>,
}

/// To BF16, in place.
pub(crate) fn round(values: &mut [f32]) {
    for value in values {
        *value = half::bf16::from_f32(*value).to_f32();
    }
}

impl Engine {
    pub(crate) fn new(isa: Isa, threads: usize) -> Result<Engine> {
        let pool = Pool::new(threads).map_err(|error| KernelError::Device {
            device: "cpu".into(),
            what: format!("cannot start {threads} threads: {error}"),
        })?;
        let scratch = (0..threads).map(|_| {
            Ok(Mutex::new(ThreadScratch {
                linear: linear::Scratch::new(0)?,
                hidden: Hidden::new()?,
                attention: attention::Scratch::new(0)?,
                sample: sample::Scratch::new(0),
            }))
        });
        Ok(Engine {
            isa,
            rounds: false,
            pool,
            scratch: scratch.collect::<Result<_>>()?,
        })
    }

    pub(crate) fn threads(&self) -> usize {
        self.pool.threads()
    }

    /// Rounds `values`, if that is wanted.
    pub(crate) fn rounded(&self, values: &mut [f32]) {
        if self.rounds {
            round(values);
        }
    }

    /// Changes each thread's scratch; for growing it while weights are uploaded.
    pub(crate) fn each_scratch(
        &mut self,
        mut change: impl FnMut(&mut ThreadScratch) -> Result<()>,
    ) -> Result<()> {
        self.scratch
            .iter_mut()
            .try_for_each(|scratch| change(scratch.get_mut().unwrap_or_else(PoisonError::into_inner)))
    }

    /// Runs `task(i)` for i in `0..tasks` on all threads, each with its thread's scratch.
    pub(crate) fn run(&mut self, tasks: usize, task: impl Fn(usize, &mut ThreadScratch) + Sync) {
        let scratch = &self.scratch;
        self.pool.run(tasks, &|i, thread| {
            // A lock per task and never contended: the pool gives a thread number to one task at a time.
            let mut scratch = scratch[thread].lock().unwrap_or_else(PoisonError::into_inner);
            task(i, &mut scratch);
        });
    }

    /// Runs `task` on parts of `0..count`, `part` long each.
    pub(crate) fn run_parts(
        &mut self,
        count: usize,
        part: usize,
        task: impl Fn(Range<usize>, &mut ThreadScratch) + Sync,
    ) {
        let part = part.max(1);
        self.run(count.div_ceil(part), |i, scratch| {
            task(i * part..count.min((i + 1) * part), scratch);
        });
    }
}

/// `[rows, width]` values that tasks share, each taking rows of its own.
pub(crate) struct Rows<'a, T> {
    base: *mut T,
    rows: usize,
    width: usize,
    owner: PhantomData<&'a mut [T]>,
}

// SAFETY: it stands for a `&mut [T]`; that tasks take different rows is the contract of `take`.
unsafe impl<T: Send> Send for Rows<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Rows<'_, T> {}

impl<'a, T> Rows<'a, T> {
    /// Rows of `width` values; a width of 0 means that there is nothing in any row.
    pub(crate) fn new(values: &'a mut [T], width: usize) -> Rows<'a, T> {
        Rows {
            base: values.as_mut_ptr(),
            rows: values.len().checked_div(width).unwrap_or(usize::MAX),
            width,
            owner: PhantomData,
        }
    }

    /// The values of some rows.
    ///
    /// # Safety
    /// No row may be taken twice while a slice of it lives.
    #[expect(
        clippy::mut_from_ref,
        reason = "that is the purpose; the contract above keeps slices apart"
    )]
    pub(crate) unsafe fn take(&self, rows: Range<usize>) -> &mut [T] {
        assert!(
            rows.start <= rows.end && rows.end <= self.rows,
            "rows outside their buffer"
        );
        // SAFETY: inside the slice this was made from, and by the contract nobody else has these rows.
        unsafe {
            std::slice::from_raw_parts_mut(self.base.add(rows.start * self.width), rows.len() * self.width)
        }
    }

    /// Some values of one row.
    ///
    /// # Safety
    /// No value may be taken twice while a slice of it lives.
    #[expect(clippy::mut_from_ref, reason = "as for `take`")]
    pub(crate) unsafe fn take_part(&self, row: usize, values: Range<usize>) -> &mut [T] {
        assert!(
            row < self.rows && values.start <= values.end,
            "row outside its buffer"
        );
        assert!(
            values.is_empty() || values.end <= self.width,
            "values outside their row"
        );
        let start = if values.is_empty() {
            0
        } else {
            row * self.width + values.start
        };
        // SAFETY: inside the slice this was made from, and by the contract nobody else has these values.
        unsafe { std::slice::from_raw_parts_mut(self.base.add(start), values.len()) }
    }
}
