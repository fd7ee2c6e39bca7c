//! `Backend` for CUDA, op by op. Each op's launch is in its folder under `ops`; `forward` runs whole steps.

use conclave_plan::model::{AttentionSpec, ModelSpec, MoeSpec, Scoring};

use super::driver::allocated_bytes;
use super::dummy::WeightKind;
use super::format::padded;
use super::loader::as_bytes;
use super::step::{FEW_TOKENS, Step};
use super::workspace::Slot;
use super::{CudaBackend, KvCache, made, shape};
use crate::backend::*;
use crate::dummy::DummyFormat;
use crate::ops::attention::cuda::{self as attention, PrefillPlans, PrefillRows};
use crate::ops::embed::cuda as embed;
use crate::ops::experts::cuda::{self as experts, ExpertParams};
use crate::ops::linear::cuda::{Input, LinearCall, linear};
use crate::ops::qkv::cuda::{RopeParams, norm_kind, rope_kv};
use crate::ops::rmsnorm::cuda::{CombineRows, MAX_WIDTH, NormInput, NormRows, combine_rows, norm_rows};
use crate::ops::route::cuda::{self as route, GATE_PARTS, Group, Groups, RouteParams, RouteTokens};
use crate::ops::sample::cuda as sample;
use crate::weight::HostLinear;

/// Expert rows of one pass when the host has listed them.
const EXPERT_ROWS: usize = 1024;

impl Backend for CudaBackend {
    fn as_cuda(&mut self) -> Option<&mut CudaBackend> {
        Some(self)
    }

    fn describe(&self) -> String {
        let driver = self.gpu.device.driver_version;
        format!(
            "{self:?}, driver for CUDA {}.{}",
            driver / 1000,
            driver % 1000 / 10
        )
    }

    fn alloc(&mut self, bytes: usize, what: &str) -> Result<Buffer> {
        self.gpu.device.enter()?;
        let memory = self.gpu.alloc(bytes, what)?;
        let handle = memory.address;
        self.buffers.insert(handle, memory);
        Ok(Buffer { handle, bytes })
    }

    fn write(&mut self, to: &Buffer, offset: usize, bytes: &[u8]) -> Result<()> {
        self.gpu.device.enter()?;
        self.memory_of("write", "buffer", to, offset.saturating_add(bytes.len()))?;
        self.gpu.write(&self.buffers[&to.handle], offset, bytes)
    }

    fn read(&mut self, from: &Buffer, offset: usize, bytes: &mut [u8]) -> Result<()> {
        self.gpu.device.enter()?;
        self.memory_of("read", "buffer", from, offset.saturating_add(bytes.len()))?;
        self.gpu.read(&self.buffers[&from.handle], offset, bytes)
    }

    fn upload_linear(&mut self, weight: &HostLinear) -> Result<LinearId> {
        self.add_linear(weight)
    }

    fn upload_vector(&mut self, values: &[f32]) -> Result<VectorId> {
        self.add_vector(values)
    }

    fn upload_experts(&mut self, experts: &[HostExpert]) -> Result<ExpertsId> {
        self.add_experts(experts)
    }

    fn drop_experts(&mut self, experts: ExpertsId) {
        if let Some(block) = self.experts.get_mut(experts.0 as usize) {
            *block = None;
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
        const OP: &str = "alloc_kv";
        self.gpu.device.enter()?;
        attention::kv_name(dtype)?;
        if head_dim != 64 && head_dim != 128 {
            return Err(KernelError::Unsupported(format!(
                "head_dim is {head_dim}; the CUDA backend runs 64 and 128"
            )));
        }
        if page_tokens != self.limits.page_tokens {
            return Err(shape(
                OP,
                "tokens of a page",
                page_tokens,
                self.limits.page_tokens,
            ));
        }
        let values = pages
            .checked_mul(page_tokens * kv_heads * head_dim)
            .filter(|n| *n < 1 << 40);
        let values = values.ok_or_else(|| shape(OP, "pages", pages, "fewer"))?;
        let bytes = values * attention::kv_bytes(dtype);
        let keys = self.gpu.alloc(bytes, "keys of a layer")?;
        let values = self.gpu.alloc(bytes, "values of a layer")?;
        self.caches.push(KvCache {
            keys,
            values,
            pages,
            page_tokens,
            kv_heads,
            head_dim,
            dtype,
        });
        Ok(KvId(self.caches.len() as u32 - 1))
    }

    fn begin_group(&mut self, largest: usize) -> Result<()> {
        self.set_group_tokens(largest);
        Ok(())
    }

    fn begin(&mut self, batch: &Batch) -> Result<()> {
        self.gpu.device.enter()?;
        self.step.begin(&self.gpu, batch)
    }

    fn embed(&mut self, table: LinearId, hidden: &Buffer) -> Result<()> {
        let table = self.linear("embed", table)?;
        let tokens = self.step.tokens;
        let hidden = self.memory_of("embed", "hidden", hidden, tokens * table.inputs * 4)?;
        embed::embed(
            &self.gpu,
            table,
            self.step.ids(),
            self.sampled_tokens(),
            tokens,
            hidden,
        )
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
        let tokens = self.step.tokens;
        let inputs = self.linear(OP, weights.q)?.inputs;
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * inputs * 4)?;
        let q = self.memory_of(OP, "q", q, tokens * spec.q_width() * 4)?;
        let norm = self.vector(OP, weights.norm, inputs)?;
        let (q_norm, k_norm) = self.qk_norms(OP, spec, weights)?;
        let turns = Step::turns(&self.gpu, &mut self.workspace, spec.rotary_dim, spec.rope_theta)?;
        let width = spec.q_width() + 2 * spec.kv_width();
        let rows = self
            .workspace
            .get(&self.gpu, Slot::Normed, FEW_TOKENS * inputs * 4)?;
        let projection = self
            .workspace
            .get(&self.gpu, Slot::Projection, FEW_TOKENS * width * 4)?;
        let cache = self.cache(OP, kv, spec)?;
        self.step.check_pages(OP, cache.pages)?;
        for first in (0..tokens).step_by(FEW_TOKENS) {
            let count = FEW_TOKENS.min(tokens - first);
            self.norm(
                hidden + (first * inputs * 4) as u64,
                0,
                norm,
                eps,
                inputs,
                count,
                rows,
            )?;
            let weights = [weights.q, weights.k, weights.v].map(|id| self.linear(OP, id));
            let [wq, wk, wv] = weights;
            let weights = [wq?, wk?, wv?];
            self.project(&weights, spec, rows, count, projection)?;
            let params = RopeParams {
                qkv: projection,
                parts: 1,
                tokens: count as i32,
                heads: spec.heads as i32,
                rotary: spec.rotary_dim as i32,
                norm: norm_kind(spec.qk_norm),
                eps,
                q_norm,
                k_norm,
                turns,
                positions: self.step.positions() + first as u64 * 4,
                token_run: self.step.token_run() + first as u64 * 4,
                pages: attention::Pages::new(cache, &self.step),
                q: q + (first * spec.q_width() * 4) as u64,
            };
            rope_kv(&self.gpu, cache, &params)?;
        }
        Ok(())
    }

    fn attention(&mut self, spec: &AttentionSpec, kv: KvId, q: &Buffer, out: &Buffer) -> Result<()> {
        const OP: &str = "attention";
        let tokens = self.step.tokens;
        let bytes = tokens * spec.q_width() * 4;
        let (q, out) = (
            self.memory_of(OP, "q", q, bytes)?,
            self.memory_of(OP, "out", out, bytes)?,
        );
        self.cache(OP, kv, spec)?;
        let cache = &self.caches[kv.0 as usize];
        self.step.check_pages(OP, cache.pages)?;
        if tokens <= FEW_TOKENS || self.deterministic {
            let base = attention::params(&self.gpu, &mut self.workspace, &self.step, cache, spec.heads)?;
            let blocks = attention::head_blocks(spec.heads, spec.kv_heads);
            for first in (0..tokens).step_by(FEW_TOKENS) {
                self.step
                    .queue_plan(&self.gpu, blocks, first, FEW_TOKENS.min(tokens - first))?;
                let rows = (first * spec.q_width() * 4) as u64;
                let params = attention::AttentionParams {
                    q: q + rows,
                    out: out + rows,
                    ..base.at(&self.step, first)
                };
                attention::decode(&self.gpu, cache, &params)?;
            }
            return Ok(());
        }
        let per_kv = spec.heads / spec.kv_heads;
        let bytes = PrefillPlans::bytes(tokens, self.limits.max_runs, 1, per_kv);
        self.workspace.get(&self.gpu, Slot::PrefillBlocks, bytes)?;
        let area = self
            .workspace
            .memory(Slot::PrefillBlocks)
            .ok_or_else(|| shape(OP, "workspace", "absent", "present"))?;
        let plans = PrefillPlans::new(
            &self.gpu,
            area,
            &self.step,
            std::iter::once((0, tokens)),
            0,
            per_kv,
        )?;
        let rows = PrefillRows {
            q,
            out,
            ..PrefillRows::default()
        };
        plans.piece(0).map_or(Ok(()), |plan| {
            attention::prefill(&self.gpu, &self.step, cache, spec.heads, plan, rows)
        })
    }

    fn linear_add(&mut self, weight: LinearId, x: &Buffer, hidden: &Buffer) -> Result<()> {
        const OP: &str = "linear_add";
        let tokens = self.step.tokens;
        let (inputs, outputs) = (self.linear(OP, weight)?.inputs, self.linear(OP, weight)?.rows);
        let x = self.memory_of(OP, "x", x, tokens * inputs * 4)?;
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * outputs * 4)?;
        let weights = [self.linear(OP, weight)?];
        let input = Input::Rows(x);
        linear(
            &self.gpu,
            &LinearCall {
                weights: &weights,
                input,
                tokens,
                parts: 1,
                y: hidden,
                residual: hidden,
                squares: 0,
            },
        )
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
        let tokens = self.step.tokens;
        let inputs = self.linear(OP, gate)?.inputs;
        self.width = inputs;
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * inputs * 4)?;
        let normed = self.memory_of(OP, "normed", normed, tokens * inputs * 4)?;
        let ids = self.memory_of(OP, "ids", ids, tokens * spec.top_k * 4)?;
        let weights = self.memory_of(OP, "weights", weights, tokens * spec.top_k * 4)?;
        let router_logits = match router_logits {
            Some(buffer) => self.memory_of(OP, "router logits", buffer, tokens * spec.experts * 4)?,
            None => 0,
        };
        let norm = self.vector(OP, norm, inputs)?;
        let logits = self.workspace.get(
            &self.gpu,
            Slot::GateLogits,
            GATE_PARTS * FEW_TOKENS * spec.experts * 4,
        )?;
        for first in (0..tokens).step_by(FEW_TOKENS) {
            let count = FEW_TOKENS.min(tokens - first);
            let at = |width: usize| (first * width * 4) as u64;
            self.norm(
                hidden + at(inputs),
                0,
                norm,
                eps,
                inputs,
                count,
                normed + at(inputs),
            )?;
            let gates = [self.linear(OP, gate)?];
            let input = Input::Rows(normed + at(inputs));
            linear(
                &self.gpu,
                &LinearCall {
                    weights: &gates,
                    input,
                    tokens: count,
                    parts: GATE_PARTS,
                    y: logits,
                    residual: 0,
                    squares: 0,
                },
            )?;
            let params = RouteTokens {
                route: self.route_params(OP, spec, bias, logits, count)?,
                ids: ids + at(spec.top_k),
                weights: weights + at(spec.top_k),
                router_logits: if router_logits == 0 {
                    0
                } else {
                    router_logits + at(spec.experts)
                },
                ..RouteTokens::default()
            };
            route::route(&self.gpu, &params)?;
        }
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
        let block = self.expert_block(OP, experts)?;
        let (hidden, inter, count, format, param) = (
            block.hidden,
            block.inter,
            block.count,
            block.format,
            block.param(),
        );
        let highest = rows.iter().map(|row| row.row).max().unwrap_or(0) as usize;
        let input = self.memory_of(OP, "input", input, (highest + 1) * hidden * 4)?;
        let y = self.memory_of(OP, "out", out, rows.len() * hidden * 4)?;
        if let Some(row) = rows.iter().find(|row| row.expert as usize >= count) {
            return Err(shape(OP, "expert", row.expert, format!("below {count}")));
        }
        let acted = self
            .workspace
            .get(&self.gpu, Slot::Acted, EXPERT_ROWS * padded(inter) * 4)?;
        let places = self
            .workspace
            .get(&self.gpu, Slot::Groups, Groups::bytes(EXPERT_ROWS, count))?;
        let groups = Groups::at(places, EXPERT_ROWS, count);
        for first in (0..rows.len()).step_by(EXPERT_ROWS) {
            let part = &rows[first..rows.len().min(first + EXPERT_ROWS)];
            let mut order: Vec<usize> = (0..part.len()).collect();
            order.sort_by_key(|i| part[*i].expert);
            let mut listed: Vec<Group> = Vec::new();
            for (position, index) in order.iter().enumerate() {
                let expert = part[*index].expert as i32;
                match listed.last_mut() {
                    Some(group) if group.expert == expert && (group.rows as usize) < route::GROUP_ROWS => {
                        group.rows += 1
                    }
                    _ => listed.push(Group {
                        expert,
                        first: position as i32,
                        rows: 1,
                        token: 0,
                    }),
                }
            }
            let row_token: Vec<u32> = order.iter().map(|i| part[*i].row).collect();
            let row_slot: Vec<u32> = order.iter().map(|i| (first + i) as u32).collect();
            let memory = self
                .workspace
                .memory(Slot::Groups)
                .ok_or_else(|| shape(OP, "workspace", "absent", "present"))?;
            let offset = |address: u64| (address - places) as usize;
            self.gpu.write(memory, 0, as_bytes(&[listed.len() as i32]))?;
            self.gpu.write(memory, offset(groups.group), as_bytes(&listed))?;
            self.gpu
                .write(memory, offset(groups.row_token), as_bytes(&row_token))?;
            self.gpu
                .write(memory, offset(groups.row_slot), as_bytes(&row_slot))?;
            let params = ExpertParams {
                experts: param,
                groups,
                x: input,
                acted,
                y,
                ..ExpertParams::default()
            };
            let most = route::max_groups(EXPERT_ROWS, count);
            experts::gate_up_groups(&self.gpu, format, most, &params)?;
            experts::down_groups(&self.gpu, format, most, &ExpertParams { x: acted, ..params })?;
        }
        Ok(())
    }

    fn combine(&mut self, k: usize, y: &Buffer, weights: &Buffer, hidden: &Buffer) -> Result<()> {
        const OP: &str = "combine";
        let tokens = self.step.tokens;
        let width = self.width;
        if width == 0 {
            return Err(shape(OP, "width", 0, "that of a `route` before"));
        }
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * width * 4)?;
        let y = self.memory_of(OP, "y", y, tokens * k * width * 4)?;
        let weights = self.memory_of(OP, "weights", weights, tokens * k * 4)?;
        let input = NormInput {
            x0: hidden,
            sum_out: hidden,
            k: width as i32,
            ..NormInput::default()
        };
        let params = CombineRows {
            norm: NormRows {
                input,
                ..NormRows::default()
            },
            y,
            weights,
            slots: k as i32,
            ..CombineRows::default()
        };
        combine_rows(&self.gpu, tokens, &params)
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
        let (rows, tokens) = (self.step.logit_count, self.step.tokens);
        let (inputs, vocab) = (self.linear(OP, head)?.inputs, self.linear(OP, head)?.rows);
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * inputs * 4)?;
        let logits = self.memory_of(OP, "logits", logits, rows * vocab * 4)?;
        let norm = self.vector(OP, norm, inputs)?;
        let normed = self
            .workspace
            .get(&self.gpu, Slot::Normed, FEW_TOKENS * inputs * 4)?;
        for first in (0..rows).step_by(FEW_TOKENS) {
            let count = FEW_TOKENS.min(rows - first);
            let list = self.step.logit_rows() + first as u64 * 4;
            self.norm(hidden, list, norm, eps, inputs, count, normed)?;
            let y = logits + (first * vocab * 4) as u64;
            let heads = [self.linear(OP, head)?];
            linear(
                &self.gpu,
                &LinearCall {
                    weights: &heads,
                    input: Input::Rows(normed),
                    tokens: count,
                    parts: 1,
                    y,
                    residual: 0,
                    squares: 0,
                },
            )?;
        }
        Ok(())
    }

    fn sample(
        &mut self,
        logits: &Buffer,
        vocab: usize,
        first: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Sampled>> {
        const OP: &str = "sample";
        self.gpu.device.enter()?;
        if rows.is_empty() {
            return Ok(Vec::new());
        }
        let end = first
            .saturating_add(rows.len())
            .saturating_mul(vocab)
            .saturating_mul(4);
        let address = self.memory_of(OP, "logits", logits, end)? + (first * vocab * 4) as u64;
        let capacity = self.limits.max_logit_rows.max(rows.len());
        let mut params = sample::params(&self.gpu, &mut self.workspace, capacity, vocab)?;
        let specs: Vec<_> = rows
            .iter()
            .enumerate()
            .map(|(i, row)| sample::spec(row, row.position, i))
            .collect();
        self.sampling.sent.clear();
        sample::send_specs(&self.gpu, &self.workspace, &specs)?;
        (params.logits, params.rows) = (address, rows.len() as i32);
        let drawn = rows.iter().any(|row| row.params.temperature != 0.0);
        sample::sample(&self.gpu, &params, drawn)?;
        let mut tokens = vec![0u8; rows.len() * 4];
        if let Some(memory) = self.workspace.memory(Slot::Tokens) {
            self.gpu.read(memory, 0, &mut tokens)?;
        }
        self.check_exchange()?;
        let mut sampled = Vec::with_capacity(rows.len());
        for (i, (row, token)) in rows.iter().zip(tokens.as_chunks::<4>().0).enumerate() {
            sampled.push(match sample::on_device(row) {
                true => sample::result(u32::from_le_bytes(*token)),
                false => {
                    let mut bytes = vec![0u8; vocab * 4];
                    self.gpu
                        .read(&self.buffers[&logits.handle], (first + i) * vocab * 4, &mut bytes)?;
                    let values: Vec<f32> = bytes
                        .as_chunks::<4>()
                        .0
                        .iter()
                        .map(|b| f32::from_le_bytes(*b))
                        .collect();
                    sample::on_host(&values, row)
                }
            });
        }
        Ok(sampled)
    }

    fn set_deterministic(&mut self, on: bool) -> Result<bool> {
        if on != self.deterministic && self.forward.is_some() {
            // Its workspace and its recorded steps are the other mode's.
            return Err(KernelError::Unsupported(
                "set_deterministic comes before set_forward".into(),
            ));
        }
        self.step.fix_splits(on);
        self.deterministic = on;
        Ok(on)
    }

    fn set_forward(&mut self, model: ForwardModel) -> Result<bool> {
        self.gpu.device.enter()?;
        self.prepare_forward(model)
    }

    fn forward(&mut self, logits: &Buffer) -> Result<bool> {
        self.run_forward(logits)
    }

    fn queue_sample(&mut self, logits: &Buffer, vocab: usize, rows: &[SampleRow<'_>]) -> Result<bool> {
        self.start_sampling(logits, vocab, rows)
    }

    fn sampled(&mut self) -> Result<Vec<Sampled>> {
        self.finish_sampling()
    }

    fn sample_ready(&mut self) -> Result<bool> {
        self.sampling_ended()
    }

    fn synchronize(&mut self) -> Result<()> {
        self.gpu.device.enter()?;
        self.gpu.stream.wait(&self.gpu.device)
    }

    fn device_memory(&mut self) -> Result<Option<DeviceMemory>> {
        self.gpu.device.enter()?;
        let (free, total) = self.gpu.device.memory()?;
        Ok(Some(DeviceMemory {
            free,
            total,
            ours: allocated_bytes(),
        }))
    }

    fn reserve(&mut self, spec: &ModelSpec) -> Result<()> {
        self.gpu.device.enter()?;
        self.reserve_forward(spec)
    }

    fn linear_bytes(&self, format: DummyFormat, outputs: usize, inputs: usize) -> u64 {
        made::linear_bytes(format, outputs, inputs)
    }

    fn expert_bytes(&self, format: DummyFormat, hidden: usize, intermediate: usize) -> u64 {
        made::expert_bytes(format, hidden, intermediate)
    }

    fn make_linear(
        &mut self,
        format: DummyFormat,
        outputs: usize,
        inputs: usize,
        seed: u64,
    ) -> Result<Option<LinearId>> {
        WeightKind::of(format)
            .map(|kind| self.dummy_linear(outputs, inputs, kind, seed))
            .transpose()
    }

    fn make_experts(
        &mut self,
        format: DummyFormat,
        hidden: usize,
        intermediate: usize,
        seeds: &[u64],
    ) -> Result<Option<ExpertsId>> {
        self.made_experts(format, hidden, intermediate, seeds).map(Some)
    }

    fn measure_ceilings(&mut self) -> Result<Option<Ceilings>> {
        const PROBE_BYTES: u64 = 4 << 30;
        let free = CudaBackend::memory(self)?.0;
        Ok(Some(Ceilings {
            read: self.read_bandwidth(PROBE_BYTES.min(free / 2) as usize, 8)?,
            flops: self.product_rate(4)?,
        }))
    }

    fn start_profile(&mut self) -> Result<()> {
        self.time_kernels();
        Ok(())
    }

    fn take_profile(&mut self) -> Result<Vec<(String, f64)>> {
        self.gpu.device.enter()?;
        self.take_times()
    }

    fn provoke_fault(&mut self) -> Result<()> {
        self.write_nowhere()
    }
}

impl CudaBackend {
    pub(super) fn cache(&self, op: &'static str, kv: KvId, spec: &AttentionSpec) -> Result<&KvCache> {
        let cache = self
            .caches
            .get(kv.0 as usize)
            .ok_or_else(|| shape(op, "kv cache", kv.0, "an allocated one"))?;
        if (cache.kv_heads, cache.head_dim) != (spec.kv_heads, spec.head_dim)
            || !spec.heads.is_multiple_of(spec.kv_heads)
        {
            let found = format!(
                "{} of {} and {} heads",
                cache.head_dim, cache.kv_heads, spec.heads
            );
            return Err(shape(
                op,
                "kv heads",
                found,
                format!("{} of {}", spec.head_dim, spec.kv_heads),
            ));
        }
        Ok(cache)
    }

    /// Addresses of the q and k norms' weights; 0 without norm.
    pub(super) fn qk_norms(
        &self,
        op: &'static str,
        spec: &AttentionSpec,
        weights: &AttentionWeights,
    ) -> Result<(u64, u64)> {
        use conclave_plan::model::QkNorm;
        let lengths = match spec.qk_norm {
            QkNorm::None => return Ok((0, 0)),
            QkNorm::PerHead => (spec.head_dim, spec.head_dim),
            QkNorm::WholeProjection => (spec.q_width(), spec.kv_width()),
        };
        match (weights.q_norm, weights.k_norm) {
            (Some(q), Some(k)) => Ok((self.vector(op, q, lengths.0)?, self.vector(op, k, lengths.1)?)),
            _ => Err(shape(op, "q/k norm", "absent", "present")),
        }
    }

    /// Norm of `count` rows of `x` (from `rows`, if not 0) into F32 rows.
    #[expect(clippy::too_many_arguments, reason = "addresses and sizes of one launch")]
    pub(super) fn norm(
        &self,
        x: u64,
        rows: u64,
        weight: u64,
        eps: f32,
        width: usize,
        count: usize,
        normed: u64,
    ) -> Result<()> {
        if width > MAX_WIDTH {
            return Err(shape("norm", "width", width, format!("at most {MAX_WIDTH}")));
        }
        let input = NormInput {
            x0: x,
            weight,
            eps,
            k: width as i32,
            ..NormInput::default()
        };
        norm_rows(
            &self.gpu,
            count,
            &NormRows {
                input,
                rows,
                normed,
                padded: padded(width) as i32,
                ..NormRows::default()
            },
        )
    }

    /// q, k and v of `count` tokens, side by side.
    pub(super) fn project(
        &self,
        weights: &[&super::weights::Linear; 3],
        spec: &AttentionSpec,
        rows: u64,
        count: usize,
        y: u64,
    ) -> Result<()> {
        let widths = [spec.q_width(), spec.kv_width(), spec.kv_width()];
        for (weight, width) in weights.iter().zip(widths) {
            if weight.rows != width {
                return Err(shape("qkv", "rows of a projection", weight.rows, width));
            }
        }
        linear(
            &self.gpu,
            &LinearCall {
                weights,
                input: Input::Rows(rows),
                tokens: count,
                parts: 1,
                y,
                residual: 0,
                squares: 0,
            },
        )
    }

    pub(super) fn route_params(
        &self,
        op: &'static str,
        spec: &MoeSpec,
        bias: Option<VectorId>,
        logits: u64,
        tokens: usize,
    ) -> Result<RouteParams> {
        if spec.experts > route::MAX_EXPERTS || spec.top_k > route::MAX_TOP_K || spec.top_k > spec.experts {
            return Err(shape(
                op,
                "experts",
                format!("{} of {}", spec.top_k, spec.experts),
                format!("at most {} of {}", route::MAX_TOP_K, route::MAX_EXPERTS),
            ));
        }
        Ok(RouteParams {
            logits,
            bias: bias.map_or(Ok(0), |id| self.vector(op, id, spec.experts))?,
            parts: GATE_PARTS as i32,
            tokens: tokens as i32,
            experts: spec.experts as i32,
            k: spec.top_k as i32,
            softmax: i32::from(spec.scoring == Scoring::Softmax),
            renormalize: i32::from(spec.renormalize),
        })
    }
}
