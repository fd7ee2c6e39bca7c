//! `Backend` for the CPU: looks up handles, checks shapes, calls the op.

use conclave_plan::model::{AttentionSpec, MoeSpec, QkNorm};

use super::CpuBackend;
use crate::backend::*;
use crate::cpu::kv::KvCache;
use crate::cpu::weights::CpuLinear;
use crate::ops::attention::{MAX_HEAD_DIM, Query, attend};
use crate::ops::experts::CpuExpert;
use crate::ops::linear::{Sink, linear};
use crate::ops::rmsnorm::rmsnorm;
use crate::ops::route::{MAX_EXPERTS, MAX_TOP_K};
use crate::ops::{combine, embed, experts, qkv, route, sample};
use crate::weight::HostLinear;

/// Looks up a handle that another backend, or a dropped weight, may have given.
fn lookup<'a, T>(op: &'static str, what: &'static str, all: &'a [T], id: u32) -> Result<&'a T> {
    all.get(id as usize).ok_or_else(|| {
        mismatch(
            op,
            what,
            format!("handle {id}"),
            format!("a handle below {}", all.len()),
        )
    })
}

fn mismatch(op: &'static str, what: &'static str, found: String, expected: String) -> KernelError {
    KernelError::Shape {
        op,
        what,
        found,
        expected,
    }
}

fn expect(op: &'static str, what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(mismatch(op, what, found.to_string(), expected.to_string()))
}

/// Fails if the step's pages or the spec do not fit the cache.
fn check_cache(
    op: &'static str,
    spec: &AttentionSpec,
    cache: &KvCache,
    largest_page: u32,
    page_tokens: usize,
) -> Result<()> {
    expect(op, "head_dim", spec.head_dim, cache.head_dim)?;
    expect(op, "kv_heads", spec.kv_heads, cache.kv_heads)?;
    expect(op, "page_tokens of the cache", cache.page_tokens, page_tokens)?;
    if spec.heads == 0 || !spec.heads.is_multiple_of(spec.kv_heads) {
        return Err(mismatch(
            op,
            "heads",
            spec.heads.to_string(),
            format!("a multiple of kv_heads {}", spec.kv_heads),
        ));
    }
    if !spec.rotary_dim.is_multiple_of(2) || spec.rotary_dim > spec.head_dim {
        let expected = format!("even, at most head_dim {}", spec.head_dim);
        return Err(mismatch(op, "rotary_dim", spec.rotary_dim.to_string(), expected));
    }
    if spec.head_dim > MAX_HEAD_DIM {
        return Err(mismatch(
            op,
            "head_dim",
            spec.head_dim.to_string(),
            format!("at most {MAX_HEAD_DIM}"),
        ));
    }
    if largest_page as usize >= cache.pages {
        return Err(mismatch(
            op,
            "page",
            largest_page.to_string(),
            format!("below the cache's {}", cache.pages),
        ));
    }
    Ok(())
}

impl Backend for CpuBackend {
    fn describe(&self) -> String {
        format!("{self:?}")
    }

    fn alloc(&mut self, bytes: usize, what: &str) -> Result<Buffer> {
        self.buffers.alloc(bytes, what)
    }

    fn write(&mut self, to: &Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        self.buffers
            .range("write", to, offset, bytes.len())?
            .copy_from_slice(bytes);
        Ok(())
    }

    fn read(&mut self, from: &Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        bytes.copy_from_slice(self.buffers.range("read", from, offset, bytes.len())?);
        Ok(())
    }

    fn upload_linear(&mut self, weight: &HostLinear) -> Result<LinearId> {
        let weight = CpuLinear::new(weight)?;
        self.workspace.reserve_linear(&weight)?;
        self.linears.push(weight);
        Ok(LinearId(self.linears.len() as u32 - 1))
    }

    fn upload_vector(&mut self, values: &[f32]) -> Result<VectorId> {
        self.vectors.push(values.into());
        Ok(VectorId(self.vectors.len() as u32 - 1))
    }

    fn upload_experts(&mut self, experts: &[HostExpert]) -> Result<ExpertsId> {
        let mut checked: Vec<CpuExpert> = Vec::with_capacity(experts.len());
        for expert in experts {
            let expert = CpuExpert {
                gate: CpuLinear::new(&expert.gate)?,
                up: CpuLinear::new(&expert.up)?,
                down: CpuLinear::new(&expert.down)?,
            };
            let like = checked.first().unwrap_or(&expert);
            let (hidden, intermediate) = (like.gate.in_features, like.gate.out_features);
            expert.check(hidden, intermediate)?;
            self.workspace.reserve_experts(hidden, intermediate)?;
            checked.push(expert);
        }
        // A dropped handle is given out again, so that placements may change for ever.
        let free = self.experts.iter().position(Option::is_none);
        let at = free.unwrap_or(self.experts.len());
        if at == self.experts.len() {
            self.experts.push(None);
        }
        self.experts[at] = Some(checked.into());
        Ok(ExpertsId(at as u32))
    }

    fn drop_experts(&mut self, experts: ExpertsId) {
        if let Some(slot) = self.experts.get_mut(experts.0 as usize) {
            *slot = None;
        }
    }

    fn alloc_kv(
        &mut self,
        pages: usize,
        page_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
    ) -> Result<KvId> {
        let cache = KvCache::new(pages, page_tokens, kv_heads, head_dim, dtype)?;
        self.workspace.reserve_kv(kv_heads, head_dim)?;
        self.caches.push(cache);
        Ok(KvId(self.caches.len() as u32 - 1))
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.step.begin(batch)
    }

    fn embed(&mut self, table: LinearId, hidden: &Buffer) -> Result<()> {
        let table = lookup("embed", "table", &self.linears, table.0)?;
        if let Some(id) = self
            .step
            .ids
            .iter()
            .find(|id| **id as usize >= table.out_features)
        {
            return Err(mismatch(
                "embed",
                "token id",
                id.to_string(),
                format!("below the vocabulary's {}", table.out_features),
            ));
        }
        let words = self.step.tokens() * table.in_features;
        let [hidden] = self.buffers.words("embed", [(hidden, words)])?;
        embed::embed(table, &self.step.ids, hidden);
        Ok(())
    }

    fn qkv(
        &mut self,
        spec: &AttentionSpec,
        eps: f32,
        weights: &AttentionWeights,
        hidden: &Buffer,
        kv: KvId,
        q: &Buffer,
    ) -> Result<()> {
        const OP: &str = "qkv";
        let tokens = self.step.tokens();
        let norm = lookup(OP, "norm", &self.vectors, weights.norm.0)?;
        let width = norm.len();
        let (q_width, kv_width) = (spec.q_width(), spec.kv_width());
        let linear_of = |what, id: LinearId, out| {
            let weight = lookup(OP, what, &self.linears, id.0)?;
            weight.expect(OP, what, out, width).map(|()| weight)
        };
        let wq = linear_of("q", weights.q, q_width)?;
        let wk = linear_of("k", weights.k, kv_width)?;
        let wv = linear_of("v", weights.v, kv_width)?;
        let norm_of = |what, id: Option<VectorId>, width: usize| {
            let expected = match spec.qk_norm {
                QkNorm::None => return Ok(None),
                QkNorm::PerHead => spec.head_dim,
                QkNorm::WholeProjection => width,
            };
            let id = id.ok_or_else(|| mismatch(OP, what, "absent".into(), format!("{expected} values")))?;
            let norm = lookup(OP, what, &self.vectors, id.0)?;
            expect(OP, what, norm.len(), expected)?;
            Ok(Some(&norm[..]))
        };
        let q_norm = norm_of("q_norm", weights.q_norm, q_width)?;
        let k_norm = norm_of("k_norm", weights.k_norm, kv_width)?;
        if self.caches.len() <= kv.0 as usize {
            return Err(mismatch(
                OP,
                "kv",
                format!("handle {}", kv.0),
                format!("below {}", self.caches.len()),
            ));
        }
        let cache = &mut self.caches[kv.0 as usize];
        check_cache(OP, spec, cache, self.step.largest_page, self.step.page_tokens())?;
        let [hidden, q] = self
            .buffers
            .words(OP, [(hidden, tokens * width), (q, tokens * q_width)])?;
        let w = &mut self.workspace;
        let x = &mut w.normed.f32_mut()[..tokens * width];
        let (k, v) = (
            &mut w.keys.f32_mut()[..tokens * kv_width],
            &mut w.values.f32_mut()[..tokens * kv_width],
        );
        rmsnorm(self.isa, hidden, norm, eps, x);
        linear(self.isa, wq, &mut w.packed, x, q, Sink::Store);
        linear(self.isa, wk, &mut w.packed, x, k, Sink::Store);
        linear(self.isa, wv, &mut w.packed, x, v, Sink::Store);
        let angles = &mut w.angles.f32_mut()[..spec.rotary_dim];
        let row = cache.row_bytes();
        let dtype = cache.dtype;
        for run in &self.step.runs {
            let pages = &self.step.pages[run.first_page..][..run.page_count];
            for i in 0..run.len {
                let t = run.first + i;
                let (q, k, v) = (
                    &mut q[t * q_width..][..q_width],
                    &mut k[t * kv_width..][..kv_width],
                    &v[t * kv_width..][..kv_width],
                );
                qkv::qk_norm(self.isa, spec.qk_norm, spec.head_dim, q_norm, eps, q);
                qkv::qk_norm(self.isa, spec.qk_norm, spec.head_dim, k_norm, eps, k);
                qkv::rope_angles(spec, (run.position + i) as u32, angles);
                qkv::rope(spec, angles, q);
                qkv::rope(spec, angles, k);
                for head in 0..spec.kv_heads {
                    let at = cache.row(pages, run.position + i, head);
                    let part = head * spec.head_dim..(head + 1) * spec.head_dim;
                    KvCache::write(dtype, &k[part.clone()], &mut cache.keys.bytes_mut()[at..at + row]);
                    KvCache::write(dtype, &v[part], &mut cache.values.bytes_mut()[at..at + row]);
                }
            }
        }
        Ok(())
    }

    fn attention(&mut self, spec: &AttentionSpec, kv: KvId, q: &Buffer, out: &Buffer) -> Result<()> {
        const OP: &str = "attention";
        let cache = lookup(OP, "kv", &self.caches, kv.0)?;
        check_cache(OP, spec, cache, self.step.largest_page, self.step.page_tokens())?;
        let width = spec.q_width();
        let words = self.step.tokens() * width;
        let [q, out] = self.buffers.words(OP, [(q, words), (out, words)])?;
        for run in &self.step.runs {
            let pages = &self.step.pages[run.first_page..][..run.page_count];
            for i in 0..run.len {
                for head in 0..spec.heads {
                    let at = (run.first + i) * width + head * spec.head_dim;
                    let query = Query {
                        cache,
                        pages,
                        position: run.position + i,
                        kv_head: head / (spec.heads / spec.kv_heads),
                        q: &q[at..at + spec.head_dim],
                        out: &mut out[at..at + spec.head_dim],
                    };
                    attend(self.isa, query);
                }
            }
        }
        Ok(())
    }

    fn linear_add(&mut self, weight: LinearId, x: &Buffer, hidden: &Buffer) -> Result<()> {
        let weight = lookup("linear_add", "weight", &self.linears, weight.0)?;
        let tokens = self.step.tokens();
        let shapes = [
            (x, tokens * weight.in_features),
            (hidden, tokens * weight.out_features),
        ];
        let [x, hidden] = self.buffers.words("linear_add", shapes)?;
        linear(self.isa, weight, &mut self.workspace.packed, x, hidden, Sink::Add);
        Ok(())
    }

    fn route(
        &mut self,
        spec: &MoeSpec,
        eps: f32,
        norm: VectorId,
        gate: LinearId,
        bias: Option<VectorId>,
        hidden: &Buffer,
        normed: &Buffer,
        ids: &Buffer,
        weights: &Buffer,
        router_logits: Option<&Buffer>,
    ) -> Result<()> {
        const OP: &str = "route";
        let tokens = self.step.tokens();
        let norm = lookup(OP, "norm", &self.vectors, norm.0)?;
        let gate = lookup(OP, "gate", &self.linears, gate.0)?;
        gate.expect(OP, "gate", spec.experts, norm.len())?;
        if spec.experts > MAX_EXPERTS {
            return Err(mismatch(
                OP,
                "experts",
                spec.experts.to_string(),
                format!("at most {MAX_EXPERTS}"),
            ));
        }
        let most = spec.experts.min(MAX_TOP_K);
        if spec.top_k == 0 || spec.top_k > most {
            return Err(mismatch(
                OP,
                "top_k",
                spec.top_k.to_string(),
                format!("1 to {most}"),
            ));
        }
        let bias = match bias {
            Some(bias) => {
                let bias = lookup(OP, "bias", &self.vectors, bias.0)?;
                expect(OP, "bias", bias.len(), spec.experts)?;
                Some(&bias[..])
            }
            None => None,
        };
        let k = spec.top_k;
        let words = tokens * norm.len();
        let w = &mut self.workspace;
        if let Some(logits) = router_logits {
            let shapes = [(hidden, words), (logits, tokens * spec.experts)];
            let [hidden, logits] = self.buffers.words(OP, shapes)?;
            let x = &mut w.normed.f32_mut()[..words];
            rmsnorm(self.isa, hidden, norm, eps, x);
            linear(self.isa, gate, &mut w.packed, x, logits, Sink::Store);
        }
        let shapes = [
            (hidden, words),
            (normed, words),
            (ids, tokens * k),
            (weights, tokens * k),
        ];
        let [hidden, normed, ids, weights] = self.buffers.words(OP, shapes)?;
        rmsnorm(self.isa, hidden, norm, eps, normed);
        let scores = &mut w.scores.f32_mut()[..spec.experts];
        for (t, x) in normed.chunks_exact(norm.len()).enumerate() {
            linear(self.isa, gate, &mut w.packed, x, scores, Sink::Store);
            let part = t * k..(t + 1) * k;
            let mut chosen = [0; MAX_TOP_K];
            let chosen = &mut chosen[..k];
            route::choose(self.isa, spec, bias, scores, chosen, &mut weights[part.clone()]);
            ids[part]
                .iter_mut()
                .zip(chosen)
                .for_each(|(id, chosen)| *id = f32::from_bits(*chosen));
        }
        self.width = norm.len();
        Ok(())
    }

    fn experts(
        &mut self,
        experts: ExpertsId,
        input: &Buffer,
        rows: &[ExpertRow],
        out: &Buffer,
    ) -> Result<()> {
        const OP: &str = "experts";
        let experts = lookup(OP, "experts", &self.experts, experts.0)?;
        let Some(experts) = experts.as_ref().filter(|experts| !experts.is_empty()) else {
            return expect(OP, "rows for a layer without experts", rows.len(), 0);
        };
        let (hidden, intermediate) = (experts[0].gate.in_features, experts[0].gate.out_features);
        let inputs = rows.iter().map(|row| row.row as usize + 1).max().unwrap_or(0);
        experts::check_rows(rows, experts.len(), inputs)?;
        let [input, out] = self
            .buffers
            .words(OP, [(input, inputs * hidden), (out, rows.len() * hidden)])?;
        let w = &mut self.workspace;
        let (gate, up) = (
            &mut w.gate.f32_mut()[..intermediate],
            &mut w.up.f32_mut()[..intermediate],
        );
        experts::experts(self.isa, experts, input, rows, out, &mut w.packed, gate, up);
        Ok(())
    }

    fn combine(&mut self, k: usize, y: &Buffer, weights: &Buffer, hidden: &Buffer) -> Result<()> {
        let tokens = self.step.tokens();
        if tokens == 0 || k == 0 {
            return Ok(());
        }
        // The contract names no width: it is that of the layer's `route`.
        let width = self.width;
        if width == 0 {
            return expect("combine", "width of the hidden state before any route", 0, 1);
        }
        let shapes = [
            (y, tokens * k * width),
            (weights, tokens * k),
            (hidden, tokens * width),
        ];
        let [y, weights, hidden] = self.buffers.words("combine", shapes)?;
        combine::combine(k, width, y, weights, hidden);
        Ok(())
    }

    fn head(
        &mut self,
        eps: f32,
        norm: VectorId,
        head: LinearId,
        hidden: &Buffer,
        logits: &Buffer,
    ) -> Result<()> {
        const OP: &str = "head";
        let norm = lookup(OP, "norm", &self.vectors, norm.0)?;
        let head = lookup(OP, "head", &self.linears, head.0)?;
        expect(OP, "norm", norm.len(), head.in_features)?;
        let (width, rows) = (norm.len(), self.step.logit_rows.len());
        let shapes = [
            (hidden, self.step.tokens() * width),
            (logits, rows * head.out_features),
        ];
        let [hidden, logits] = self.buffers.words(OP, shapes)?;
        let x = &mut self.workspace.normed.f32_mut()[..rows * width];
        for (row, x) in self.step.logit_rows.iter().zip(x.chunks_exact_mut(width)) {
            rmsnorm(self.isa, &hidden[*row as usize * width..][..width], norm, eps, x);
        }
        linear(self.isa, head, &mut self.workspace.packed, x, logits, Sink::Store);
        Ok(())
    }

    fn sample(
        &mut self,
        logits: &Buffer,
        vocab: usize,
        first: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Sampled>> {
        let end = first.saturating_add(rows.len());
        let [logits] = self
            .buffers
            .words("sample", [(logits, end.saturating_mul(vocab))])?;
        if vocab == 0 || vocab > self.workspace.sample.values.len() {
            let largest = self.workspace.sample.values.len();
            return Err(mismatch(
                "sample",
                "vocab",
                vocab.to_string(),
                format!("1 to {largest}, the widest weight"),
            ));
        }
        let logits = logits[first * vocab..].chunks_exact(vocab);
        let rows = rows.iter().zip(logits);
        Ok(rows
            .map(|(row, logits)| sample::sample(self.isa, logits, row, &mut self.workspace.sample))
            .collect())
    }
}
