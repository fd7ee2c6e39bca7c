//! `Backend` for CUDA. `by_op` runs the ops one by one, each with its launch in its folder under `ops`; `forward` runs
//! whole steps.

use std::cell::RefCell;

use conclave_plan::model::{AttentionSpec, ModelSpec, MoeSpec};

use super::driver::allocated_bytes;
use super::dummy::WeightKind;
use super::plane::WHOLE_TOKENS;
use super::{CudaBackend, Format, made};
use crate::backend::*;
use crate::dummy::DummyFormat;
use crate::ops::embed::cuda as embed;
use crate::ops::linear::cuda::{Input, LinearCall, linear};
use crate::weight::HostLinear;

/// The products that quantise are not those that keep one order.
const BOTH_MODES: &str =
    "FP8 activations need products that the deterministic mode does not use; choose one of the two";

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
        let ids = self.add_linears(std::slice::from_ref(weight), &|_| true)?;
        Ok(ids[0])
    }

    fn upload_linears(&mut self, weights: &[HostLinear], reading: Reading<'_>) -> Result<Vec<LinearId>> {
        self.add_linears(weights, reading)
    }

    fn upload_vector(&mut self, values: &[f32]) -> Result<VectorId> {
        self.add_vector(values)
    }

    fn upload_experts(&mut self, experts: &[HostExpert]) -> Result<ExpertsId> {
        let ids = self.add_experts(&[experts], &|_| true)?;
        Ok(ids[0])
    }

    fn upload_layers(&mut self, layers: &[Vec<HostExpert>], reading: Reading<'_>) -> Result<Vec<ExpertsId>> {
        let layers: Vec<&[HostExpert]> = layers.iter().map(Vec::as_slice).collect();
        self.add_experts(&layers, reading)
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
        self.new_cache(pages, page_tokens, kv_heads, head_dim, dtype)
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
        self.op_qkv(spec, eps, weights, hidden, kv, q)
    }

    fn attention(&mut self, spec: &AttentionSpec, kv: KvId, q: &Buffer, out: &Buffer) -> Result<()> {
        self.op_attention(spec, kv, q, out)
    }

    fn linear_add(&mut self, weight: LinearId, x: &Buffer, hidden: &Buffer) -> Result<()> {
        const OP: &str = "linear_add";
        let tokens = self.step.tokens;
        let (inputs, outputs) = (self.linear(OP, weight)?.inputs, self.linear(OP, weight)?.rows);
        let x = self.memory_of(OP, "x", x, tokens * inputs * 4)?;
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * outputs * 4)?;
        if self.fp8_activations && tokens > WHOLE_TOKENS && self.linear(OP, weight)?.format == Format::Fp8 {
            return self.add_quantised(weight, x, hidden);
        }
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
        self.op_route(
            spec,
            eps,
            norm,
            gate,
            bias,
            hidden,
            normed,
            ids,
            weights,
            router_logits,
        )
    }

    fn experts(
        &mut self,
        experts: ExpertsId,
        input: &Buffer,
        rows: &[ExpertRow],
        out: &Buffer,
    ) -> Result<()> {
        self.op_experts(experts, input, rows, out)
    }

    fn combine(&mut self, k: usize, y: &Buffer, weights: &Buffer, hidden: &Buffer) -> Result<()> {
        self.op_combine(k, y, weights, hidden)
    }

    fn head(
        &mut self,
        eps: f32,
        norm: VectorId,
        head: LinearId,
        hidden: &Buffer,
        logits: &Buffer,
    ) -> Result<()> {
        self.op_head(eps, norm, head, hidden, logits)
    }

    fn sample(
        &mut self,
        logits: &Buffer,
        vocab: usize,
        first: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Sampled>> {
        self.op_sample(logits, vocab, first, rows)
    }

    fn set_deterministic(&mut self, on: bool) -> Result<bool> {
        if on != self.deterministic && self.forward.is_some() {
            // Its workspace and its recorded steps are the other mode's.
            return Err(KernelError::Unsupported(
                "set_deterministic comes before set_forward".into(),
            ));
        }
        if on && self.fp8_activations {
            return Err(KernelError::Unsupported(BOTH_MODES.into()));
        }
        self.step.fix_splits(on);
        self.deterministic = on;
        Ok(on)
    }

    fn set_fp8_activations(&mut self, on: bool) -> Result<bool> {
        if on != self.fp8_activations && self.forward.is_some() {
            return Err(KernelError::Unsupported(
                "set_fp8_activations comes before set_forward".into(),
            ));
        }
        if on && self.deterministic {
            return Err(KernelError::Unsupported(BOTH_MODES.into()));
        }
        self.fp8_activations = on;
        Ok(on)
    }

    fn set_forward(&mut self, model: ForwardModel) -> Result<bool> {
        self.gpu.device.enter()?;
        self.prepare_forward(model)
    }

    fn forward(&mut self, logits: &Buffer) -> Result<bool> {
        self.run_forward(logits)
    }

    fn record_steps(&mut self, logits: &Buffer, most: usize) -> Result<usize> {
        self.gpu.device.enter()?;
        self.record_decode(logits, most)
    }

    fn record_step(&mut self, logits: &Buffer, most: usize) -> Result<bool> {
        self.gpu.device.enter()?;
        self.record_one(logits, most)
    }

    fn watch_gates(&mut self, on: bool) {
        self.watched = on.then(Default::default);
    }

    fn watched_gates(&mut self) -> Vec<Vec<f32>> {
        self.watched.as_ref().map(RefCell::take).unwrap_or_default()
    }

    fn forward_rows(&mut self, logits: &Buffer) -> Result<bool> {
        self.run_head(logits)
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

    fn takes_packed(&self) -> bool {
        true
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

    fn forward_bytes(&self, spec: &ModelSpec, formats: [DummyFormat; 3], kv: KvDtype) -> u64 {
        self.folded_bytes(spec, formats.map(Format::of), kv)
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

    fn measure_copies(&mut self) -> Result<Option<f64>> {
        self.gpu.device.enter()?;
        self.loader.copy_rate(&self.gpu).map(Some)
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
