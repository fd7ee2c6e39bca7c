//! A step of one decode token as one kernel, for the models that `ops/whole` serves.

use conclave_plan::model::ModelSpec;

use super::{Layer, Places, Sizes};
use crate::backend::{ForwardModel, KernelError, KvDtype, LinearId, Result, VectorId};
use crate::cuda::weights::Linear;
use crate::cuda::workspace::Slot;
use crate::cuda::{CudaBackend, Format, Memory, shape as wrong_shape};
use crate::ops::whole::cuda::{One, OneLayer, OneParams, OneShape, TRACE};
use crate::ops::whole::fold;

/// `formats`: of attention, gate and experts.
fn one_shape(sizes: &Sizes, head_dim: usize, formats: [Format; 3], kv: KvDtype) -> OneShape {
    let [dense, gate, experts] = formats;
    OneShape {
        dense,
        gate,
        experts,
        kv,
        head_dim,
        width: sizes.hidden,
        q_width: sizes.q_width,
        kv_width: sizes.kv_width,
        inter: sizes.inter,
        expert_count: sizes.experts,
        top_k: sizes.top_k,
        rotary: sizes.rotary,
    }
}

impl CudaBackend {
    /// `None`: the model's shapes or formats are not the kernel's.
    pub(super) fn prepare_one(
        &mut self,
        model: &ForwardModel,
        layers: &[Layer],
        sizes: &Sizes,
        places: &Places,
        partial: bool,
    ) -> Result<Option<One>> {
        const OP: &str = "forward";
        let spec = &model.spec.layers[0];
        let first = &layers[0].handles;
        let formats = [
            self.linear(OP, first.attention.q)?.format,
            self.linear(OP, first.gate)?.format,
            layers[0].format,
        ];
        let kv = self.caches[first.kv.0 as usize].dtype;
        let shape = one_shape(sizes, spec.attention.head_dim, formats, kv);
        let alone = !partial && self.exchange().is_none() && !self.deterministic;
        if !alone || !sizes.inline(spec) || !shape.fits(self.gpu.blocks() as usize) {
            return Ok(None);
        }
        // The folds of a model that was set before go first.
        if let Some(forward) = &mut self.forward {
            forward.graphs.clear();
            forward.one = None;
        }
        let each = fold::folded_bytes(sizes.experts, sizes.q_width);
        let folded = match Memory::raw(&self.gpu.device, each * layers.len(), "folded gates") {
            Ok(memory) => memory,
            // A rank that served with others may have given its memory to experts and pages.
            Err(KernelError::OutOfMemory { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut rows = Vec::with_capacity(layers.len());
        for (index, layer) in layers.iter().enumerate() {
            let (handles, weights) = (&layer.handles, &layer.handles.attention);
            let mut streams = [0; 9];
            let mut bf16_scales = u32::from(layer.experts.bf16_scales != 0) << 4;
            for (i, id) in [weights.q, weights.k, weights.v, weights.o]
                .into_iter()
                .enumerate()
            {
                let linear = self.linear(OP, id)?;
                if linear.format != shape.dense {
                    return Ok(None);
                }
                streams[i] = linear.memory.address;
                bf16_scales |= u32::from(linear.bf16_scales) << i;
            }
            let cache = &self.caches[handles.kv.0 as usize];
            let gate = self.linear(OP, handles.gate)?;
            let same = (gate.format, layer.format, cache.dtype) == (shape.gate, shape.experts, shape.kv)
                && layer.experts.expert_bytes == layers[0].experts.expert_bytes;
            if !same {
                return Ok(None);
            }
            let output = self.linear(OP, weights.o)?;
            if !fold::folds(gate, output) {
                return Ok(None);
            }
            let product = folded.address + (index * each) as u64;
            fold::queue(&self.gpu, gate, layer.moe_norm, output, product)?;
            streams[4..].copy_from_slice(&[
                gate.memory.address,
                layer.experts.base,
                cache.keys.address,
                cache.values.address,
                product,
            ]);
            rows.push(OneLayer {
                streams,
                vectors: [
                    layer.norm,
                    layer.q_norm,
                    layer.k_norm,
                    layer.moe_norm,
                    layer.route.bias,
                ],
                bf16_scales,
                unused: 0,
            });
        }
        let (tables, table_stride) = self.step.tables();
        let (experts, step) = (&layers[0].experts, &self.step);
        let params = OneParams {
            hidden: places.hidden,
            position: step.positions(),
            token_run: step.token_run(),
            tables,
            turns: places.turns,
            result: places.halves,
            expert_bytes: experts.expert_bytes,
            up_offset: experts.up_offset,
            down_offset: experts.down_offset,
            table_stride,
            page_tokens: self.limits.page_tokens as i32,
            renormalize: i32::from(spec.moe.renormalize),
            eps: sizes.eps,
            scale: crate::ops::attention::cuda::scale(shape.head_dim),
            ..OneParams::default()
        };
        One::new(&self.gpu, &mut self.workspace, &shape, &rows, folded, params).map(Some)
    }

    /// Bytes of the folded gates, if the kernel serves the model.
    pub(in crate::cuda) fn folded_bytes(&self, spec: &ModelSpec, formats: [Format; 3], kv: KvDtype) -> u64 {
        let Some(layer) = spec.layers.first().filter(|_| !self.deterministic) else {
            return 0;
        };
        let sizes = Sizes::of(spec, layer);
        let [dense, gate, experts] = formats;
        let formats = [dense, gate, experts.of_experts()];
        let shape = one_shape(&sizes, layer.attention.head_dim, formats, kv);
        match sizes.inline(layer) && shape.fits(self.gpu.blocks() as usize) {
            true => (spec.layers.len() * fold::folded_bytes(sizes.experts, sizes.q_width)) as u64,
            false => 0,
        }
    }

    /// The gate times the norm's weights times the output projection, as a weight of its own: what `set_forward` makes of
    /// each layer for a lone token, to be looked at.
    pub fn fold_gate(&mut self, gate: LinearId, norm: VectorId, output: LinearId) -> Result<LinearId> {
        const OP: &str = "fold_gate";
        self.gpu.device.enter()?;
        let (gate, output) = (self.linear(OP, gate)?, self.linear(OP, output)?);
        if !fold::folds(gate, output) {
            let what = format!("{:?} [{}, {}]", output.format, output.rows, output.inputs);
            return Err(wrong_shape(
                OP,
                "weights",
                what,
                "a gate in F32 and an output projection for it",
            ));
        }
        let (rows, inputs) = (gate.rows, output.inputs);
        let norm = self.vector(OP, norm, gate.inputs)?;
        let memory = Memory::raw(
            &self.gpu.device,
            fold::folded_bytes(rows, inputs),
            "a folded gate",
        )?;
        fold::queue(&self.gpu, gate, norm, output, memory.address)?;
        self.linears.push(Linear {
            memory,
            format: Format::F32,
            rows,
            inputs,
            bf16_scales: false,
        });
        Ok(LinearId(self.linears.len() as u32 - 1))
    }

    /// Whether a lone decode token goes through one kernel from now on, and whether that kernel counts cycles. `false`: it
    /// does not serve this model.
    pub fn set_one(&mut self, on: bool, traced: bool) -> Result<bool> {
        self.gpu.device.enter()?;
        let bytes = self.gpu.blocks() as usize * TRACE.0 * TRACE.1 * 8;
        let trace = self.workspace.get(&self.gpu, Slot::OneTrace, bytes)?;
        self.gpu.stream.wait(&self.gpu.device)?;
        let Some(forward) = &mut self.forward else {
            return Ok(false);
        };
        forward.graphs.clear();
        forward.use_one = on;
        let Some(one) = &mut forward.one else {
            return Ok(false);
        };
        one.params.trace = if traced { trace } else { 0 };
        Ok(true)
    }

    /// Cycles of the last step of one token: of each block, each op, its wait, input, product and finish.
    pub fn one_trace(&mut self) -> Result<Vec<u64>> {
        self.gpu.device.enter()?;
        let mut bytes = vec![0; self.gpu.blocks() as usize * TRACE.0 * TRACE.1 * 8];
        if let Some(memory) = self.workspace.memory(Slot::OneTrace) {
            self.gpu.read(memory, 0, &mut bytes)?;
        }
        let words = bytes.as_chunks::<8>().0.iter();
        Ok(words.map(|word| u64::from_le_bytes(*word)).collect())
    }
}
