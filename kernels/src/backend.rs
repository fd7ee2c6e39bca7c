//! The contract between the worker's executor and a device: opaque buffers and fused ops.
//!
//! A backend owns its device memory. The executor allocates everything at start (`alloc`), uploads weights, then
//! runs ops on buffers; results that the host needs come back through `download` (which waits for the device).
//! Ops are queued in order on one stream; an op may return before the device has run it. Activations between ops
//! are F32 on every backend unless an op's documentation says otherwise.

mod device;
mod error;
mod handles;
mod step;

use std::fmt;

use crate::dummy::DummyFormat as WeightFormat;
use crate::weight::HostLinear;
pub use device::{Ceilings, DeviceMemory};
pub use error::{KernelError, Result};
pub use handles::*;
pub use step::*;

/// Told how many bytes more of an upload have been read, by several threads; `false` stops the upload.
pub type Reading<'a> = &'a (dyn Fn(usize) -> bool + Sync);

/// A device that runs the ops. One thread owns it.
pub trait Backend: Send + fmt::Debug {
    /// `cpu (avx512, 2 threads)`, `cuda 0 (NVIDIA H200)`.
    fn describe(&self) -> String;

    /// The GPU's backend, if it is one: only GPUs exchange experts by themselves.
    #[cfg(feature = "cuda")]
    fn as_cuda(&mut self) -> Option<&mut crate::cuda::CudaBackend> {
        None
    }

    fn alloc(&mut self, bytes: usize, what: &str) -> Result<Buffer>;
    fn write(&mut self, to: &Buffer, offset: usize, bytes: &[u8]) -> Result<()>;
    /// Waits for the device.
    fn read(&mut self, from: &Buffer, offset: usize, bytes: &mut [u8]) -> Result<()>;

    fn upload_linear(&mut self, weight: &HostLinear) -> Result<LinearId>;
    /// Several at once: a device with memory of its own takes them faster.
    fn upload_linears(&mut self, weights: &[HostLinear], reading: Reading<'_>) -> Result<Vec<LinearId>> {
        let _ = reading;
        weights.iter().map(|weight| self.upload_linear(weight)).collect()
    }
    fn upload_vector(&mut self, values: &[f32]) -> Result<VectorId>;
    fn upload_experts(&mut self, experts: &[HostExpert]) -> Result<ExpertsId>;
    /// Those of several layers at once, likewise.
    fn upload_layers(&mut self, layers: &[Vec<HostExpert>], reading: Reading<'_>) -> Result<Vec<ExpertsId>> {
        let _ = reading;
        layers
            .iter()
            .map(|experts| self.upload_experts(experts))
            .collect()
    }
    /// Frees what `upload_experts` gave (placement changed).
    fn drop_experts(&mut self, experts: ExpertsId);
    fn alloc_kv(
        &mut self,
        pages: usize,
        page_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
    ) -> Result<KvId>;

    /// From now on the CPU rounds to BF16 what products read and experts give, as a GPU does: to see what that alone does.
    fn round_activations(&mut self, on: bool) -> Result<()> {
        match on {
            false => Ok(()),
            true => Err(KernelError::Unsupported(
                "the CPU backend alone rounds on purpose".into(),
            )),
        }
    }

    /// Before `begin`, on a device that exchanges experts itself: the most tokens that any rank of the group has in this
    /// step. Every rank must be told the same: it decides how the step is cut and which kernels exchange it.
    fn begin_group(&mut self, largest: usize) -> Result<()> {
        let _ = largest;
        Ok(())
    }

    /// Takes over a step's batch (ids, positions, page tables); later ops of the step refer to it.
    fn begin(&mut self, batch: &Batch) -> Result<()>;

    /// `hidden[t] = table[ids[t]]`.
    fn embed(&mut self, table: LinearId, hidden: &Buffer) -> Result<()>;

    /// `x = rmsnorm(hidden); q,k,v = x W; q,k = rope(qk_norm(q), qk_norm(k))`; k and v go to their pages, q to `q`.
    fn qkv(
        &mut self,
        spec: &conclave_plan::model::AttentionSpec,
        eps: f32,
        weights: &AttentionWeights,
        hidden: &Buffer,
        kv: KvId,
        q: &Buffer,
    ) -> Result<()>;

    /// Causal attention of each token over its sequence's pages up to its own position: `out = softmax(q k / sqrt d) v`.
    fn attention(
        &mut self,
        spec: &conclave_plan::model::AttentionSpec,
        kv: KvId,
        q: &Buffer,
        out: &Buffer,
    ) -> Result<()>;

    /// `hidden += x W`, for the batch's tokens.
    fn linear_add(&mut self, weight: LinearId, x: &Buffer, hidden: &Buffer) -> Result<()>;

    /// `x = rmsnorm(hidden)`, `z = x G`, the top-k experts of `score(z) + bias` and their weights.
    /// Writes `normed` F32 `[tokens, hidden]`, `ids` U32 `[tokens, k]`, `weights` F32 `[tokens, k]`, and, if asked for,
    /// `router_logits` F32 `[tokens, experts]` (z, before the score).
    #[expect(
        clippy::too_many_arguments,
        reason = "one fused op; a struct would only rename the list"
    )]
    fn route(
        &mut self,
        spec: &conclave_plan::model::MoeSpec,
        eps: f32,
        norm: VectorId,
        gate: LinearId,
        bias: Option<VectorId>,
        hidden: &Buffer,
        normed: &Buffer,
        ids: &Buffer,
        weights: &Buffer,
        router_logits: Option<&Buffer>,
    ) -> Result<()>;

    /// `out[r] = w2(silu(w1 x) * w3 x)` with `x = input[rows[r].row]` and the weights of expert `rows[r].expert`.
    /// One call for all experts of the layer on this rank; `out` is F32 `[rows, hidden]`.
    fn experts(&mut self, experts: ExpertsId, input: &Buffer, rows: &[ExpertRow], out: &Buffer)
    -> Result<()>;

    /// `hidden[t] += sum over j = 0..k, in this order, of weights[t, j] * y[t * k + j]`; F32.
    fn combine(&mut self, k: usize, y: &Buffer, weights: &Buffer, hidden: &Buffer) -> Result<()>;

    /// `logits[i] = rmsnorm(hidden[logit_rows[i]]) W`, F32 `[rows, vocab]`.
    fn head(
        &mut self,
        eps: f32,
        norm: VectorId,
        head: LinearId,
        hidden: &Buffer,
        logits: &Buffer,
    ) -> Result<()>;

    /// Samples rows `first..` of `logits`, one per entry.
    fn sample(
        &mut self,
        logits: &Buffer,
        vocab: usize,
        first: usize,
        rows: &[SampleRow<'_>],
    ) -> Result<Vec<Sampled>>;

    /// One order of summation whatever the batch, the chunking and the placement (before `set_forward`). Whether it is so
    /// from now on; always on the CPU.
    fn set_deterministic(&mut self, on: bool) -> Result<bool> {
        let _ = on;
        Ok(true)
    }

    /// Whether activations in front of FP8 weights are quantised, too (`ops::quantise`; before `set_forward`). A device may do
    /// so only in `forward`'s steps of many tokens, and in front of dense weights of fewer. Whether it is so from now on.
    fn set_fp8_activations(&mut self, on: bool) -> Result<bool> {
        let _ = on;
        Ok(false)
    }

    /// Takes the handles of a whole model. `false`: this backend only runs op by op.
    fn set_forward(&mut self, model: ForwardModel) -> Result<bool> {
        let _ = model;
        Ok(false)
    }

    /// After `begin`: embedding, all layers and the head, F32 `[rows, vocab]`, as the ops one by one would compute them.
    /// `false`: nothing was done, go op by op.
    fn forward(&mut self, logits: &Buffer) -> Result<bool> {
        let _ = logits;
        Ok(false)
    }

    /// After `set_forward`: makes ready what decode steps of 1 to `most` sequences with this result buffer need, so that
    /// none of them does at its first time. How many such steps.
    fn record_steps(&mut self, logits: &Buffer, most: usize) -> Result<usize> {
        let _ = (logits, most);
        Ok(0)
    }

    /// The same for one decode step of a rank of several that has not been made ready yet, while no step is on its way;
    /// whether there was one. No other rank is asked for anything.
    fn record_step(&mut self, logits: &Buffer, most: usize) -> Result<bool> {
        let _ = (logits, most);
        Ok(false)
    }

    /// From now on whole steps keep what their gates said, for comparisons with a reference; they take longer.
    fn watch_gates(&mut self, on: bool) {
        let _ = on;
    }

    /// Of the whole steps since `watch_gates` or the last call: by layer, F32 `[tokens, experts]`, as `route` gives them.
    fn watched_gates(&mut self) -> Vec<Vec<f32>> {
        Vec::new()
    }

    /// After `forward` and another `begin` of the same batch with other rows of logits: theirs, from the hidden states that
    /// `forward` left. `false`: it left none, nothing was done.
    fn forward_rows(&mut self, logits: &Buffer) -> Result<bool> {
        let _ = logits;
        Ok(false)
    }

    /// Samples rows 0.. of `logits` without waiting. Later batches may name the tokens as `SAMPLED | row`, before
    /// `sampled` has brought them. No rows: a mark that `sampled` waits for, and the tokens of the last call stay.
    /// `false`: nothing was done, use `sample`.
    fn queue_sample(&mut self, logits: &Buffer, vocab: usize, rows: &[SampleRow<'_>]) -> Result<bool> {
        let _ = (logits, vocab, rows);
        Ok(false)
    }

    /// Waits for the oldest `queue_sample` that has not been fetched.
    fn sampled(&mut self) -> Result<Vec<Sampled>> {
        Err(KernelError::Unsupported("nothing was queued".into()))
    }

    /// Whether `sampled` would not wait.
    fn sample_ready(&mut self) -> Result<bool> {
        Ok(true)
    }

    /// Waits for everything queued; an op that failed is an error here.
    fn synchronize(&mut self) -> Result<()> {
        Ok(())
    }

    /// Memory of the device's own; `None`: the machine's.
    fn device_memory(&mut self) -> Result<Option<DeviceMemory>> {
        Ok(None)
    }

    /// Allocates what whole steps of such a model need besides weights, buffers and caches, so that what is free
    /// afterwards is free for those.
    fn reserve(&mut self, spec: &conclave_plan::model::ModelSpec) -> Result<()> {
        let _ = spec;
        Ok(())
    }

    /// Whether uploads take [`HostWeight::Packed`](crate::weight::HostWeight::Packed), read their bytes themselves, as
    /// they go, and end with `NotFinite` if a value is none: then nobody need look at the bytes before. So does every
    /// device with memory of its own.
    fn takes_packed(&self) -> bool {
        false
    }

    /// Bytes that a linear weight takes here.
    fn linear_bytes(&self, format: WeightFormat, outputs: usize, inputs: usize) -> u64 {
        format.stored_bytes(outputs, inputs)
    }

    /// Bytes that the three weights of one expert take here.
    fn expert_bytes(&self, format: WeightFormat, hidden: usize, intermediate: usize) -> u64 {
        3 * format.stored_bytes(intermediate, hidden)
    }

    /// Bytes that `set_forward` takes here beside weights and workspace, for a model all of whose experts are here.
    /// `formats`: of the attention's weights, the gate and the experts.
    fn forward_bytes(
        &self,
        spec: &conclave_plan::model::ModelSpec,
        formats: [WeightFormat; 3],
        kv: KvDtype,
    ) -> u64 {
        let _ = (spec, formats, kv);
        0
    }

    /// A random weight made on the device, a function of the seed and the shape. `None`: this backend takes host
    /// weights only.
    fn make_linear(
        &mut self,
        format: WeightFormat,
        outputs: usize,
        inputs: usize,
        seed: u64,
    ) -> Result<Option<LinearId>> {
        let _ = (format, outputs, inputs, seed);
        Ok(None)
    }

    /// One random expert for each seed, likewise.
    fn make_experts(
        &mut self,
        format: WeightFormat,
        hidden: usize,
        intermediate: usize,
        seeds: &[u64],
    ) -> Result<Option<ExpertsId>> {
        let _ = (format, hidden, intermediate, seeds);
        Ok(None)
    }

    /// How fast this device reads and multiplies, measured now; `None`: not measured here.
    fn measure_ceilings(&mut self) -> Result<Option<Ceilings>> {
        Ok(None)
    }

    /// Bytes per second of copies from page-locked memory to this device's, measured now; `None`: it has none.
    fn measure_copies(&mut self) -> Result<Option<f64>> {
        Ok(None)
    }

    /// From now on every kernel is timed by itself, until `take_profile`.
    fn start_profile(&mut self) -> Result<()> {
        Err(KernelError::Unsupported(
            "kernels are timed on CUDA devices only; `conclave bench --ops` times the CPU's ops".into(),
        ))
    }

    /// Names and seconds of the kernels since `start_profile`, in order.
    fn take_profile(&mut self) -> Result<Vec<(String, f64)>> {
        Ok(Vec::new())
    }

    /// Makes the device fail as a faulty kernel would: to test what follows. `Err`: what the device said.
    fn provoke_fault(&mut self) -> Result<()> {
        Err(KernelError::Device {
            device: self.describe(),
            what: "a fault was provoked".into(),
        })
    }
}
