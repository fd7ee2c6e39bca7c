//! The op on all threads: a task is some tokens of one run and one KV head.

use conclave_plan::model::AttentionSpec;

use super::block::Attend;
use super::{MAX_GROUP, MAX_HEAD_DIM};
use crate::backend::{Buffer, KvId, Result};
use crate::cpu::CpuBackend;
use crate::cpu::batch::Step;
use crate::cpu::check::{expect, lookup, mismatch};
use crate::cpu::engine::Rows;
use crate::cpu::kv::KvCache;
use crate::simd::run;

impl KvCache {
    /// Fails if the spec or the step's pages do not fit the cache.
    pub(crate) fn check(&self, op: &'static str, spec: &AttentionSpec, step: &Step) -> Result<()> {
        expect(op, "head_dim", spec.head_dim, self.head_dim)?;
        expect(op, "kv_heads", spec.kv_heads, self.kv_heads)?;
        expect(
            op,
            "page_tokens of the cache",
            self.page_tokens,
            step.page_tokens(),
        )?;
        let group = spec.heads / spec.kv_heads;
        if group == 0 || group > MAX_GROUP || !spec.heads.is_multiple_of(spec.kv_heads) {
            let expected = format!("1 to {MAX_GROUP} times kv_heads {}", spec.kv_heads);
            return Err(mismatch(op, "heads", spec.heads, expected));
        }
        if !spec.rotary_dim.is_multiple_of(2) || spec.rotary_dim > spec.head_dim {
            let expected = format!("even, at most head_dim {}", spec.head_dim);
            return Err(mismatch(op, "rotary_dim", spec.rotary_dim, expected));
        }
        if spec.head_dim > MAX_HEAD_DIM {
            return Err(mismatch(
                op,
                "head_dim",
                spec.head_dim,
                format!("at most {MAX_HEAD_DIM}"),
            ));
        }
        if step.largest_page as usize >= self.pages {
            return Err(mismatch(
                op,
                "page",
                step.largest_page,
                format!("below the cache's {}", self.pages),
            ));
        }
        Ok(())
    }
}

impl CpuBackend {
    pub(crate) fn run_attention(
        &mut self,
        spec: &AttentionSpec,
        kv: KvId,
        q: &Buffer,
        out: &Buffer,
    ) -> Result<()> {
        const OP: &str = "attention";
        let step = &self.step;
        let cache = lookup(OP, "kv", &self.caches, kv.0)?;
        cache.check(OP, spec, step)?;
        let width = spec.q_width();
        let words = step.tokens() * width;
        let [q, out] = self.buffers.words(OP, [(q, words), (out, words)])?;
        let (isa, group) = (self.engine.isa, spec.heads / spec.kv_heads);
        let (q, part) = (&*q, group * spec.head_dim);
        let rows = Rows::new(&mut *out, spec.head_dim);
        let tasks = step.task_count() * spec.kv_heads;
        self.engine.run(tasks, |task, scratch| {
            // The last tokens of a prompt have the most positions: they go first.
            let task = tasks - 1 - task;
            let kv_head = task % spec.kv_heads;
            let (run_of_task, tokens) = step.task(task / spec.kv_heads);
            let attend = Attend {
                cache,
                pages: step.pages_of(run_of_task.first),
                kv_head,
                group,
                position: run_of_task.position + tokens.start - run_of_task.first,
                tokens: tokens.len(),
                q: &q[tokens.start * width + kv_head * part..],
                stride: width,
                out: &rows,
                first_row: tokens.start * spec.kv_heads + kv_head,
                row_step: spec.kv_heads,
                scratch: &mut scratch.attention,
            };
            run(isa, attend);
        });
        self.engine.rounded(out);
        Ok(())
    }
}
