//! No op allocates once weights are uploaded and a step has run: counted by the allocator, on every thread.
//!
//! Proves invariant K2 of ARCHITECTURE.md.

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{Model, limits};
use conclave_kernels::backend::*;
use conclave_kernels::cpu::CpuBackend;

struct Counting;

static COUNTING: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: all calls go to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if COUNTING.load(Ordering::Relaxed) {
            ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: the caller's promise.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller's promise.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[test]
fn no_op_allocates_after_the_uploads() {
    for folder in ["tiny-hd64/bf16", "tiny-hd64/fp8", "tiny-hd64/ct-int4"] {
        for threads in [1, 3] {
            let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("../tests/data/minimax-m2")
                .join(folder);
            let backend = CpuBackend::new(limits(), threads, None).unwrap();
            let mut model = Model::load(&dir, Box::new(backend), KvDtype::Bf16);
            // The first step of all: nothing may be left for it to allocate.
            let steps = [(0, 40), (40, 1), (41, 7)].map(|(position, tokens)| {
                let ids: Vec<u32> = (0..tokens).map(|i| i * 13 % 384).collect();
                (model.batch(&ids, position), tokens)
            });
            for (batch, tokens) in steps {
                let mut ids = vec![0; tokens as usize * model.top_k() * 4];
                let mut rows = Vec::with_capacity(tokens as usize * model.top_k());
                let before = ALLOCATIONS.load(Ordering::Relaxed);
                COUNTING.store(true, Ordering::Relaxed);
                model.run(&batch, &mut ids, &mut rows, |_, _| {});
                COUNTING.store(false, Ordering::Relaxed);
                let count = ALLOCATIONS.load(Ordering::Relaxed) - before;
                assert_eq!(count, 0, "{folder}, {threads} threads, {tokens} tokens");
            }
        }
    }
}
