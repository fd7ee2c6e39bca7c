//! A step of one decode token as one kernel, for the models that `ops/whole` serves.

use super::{Layer, Places, Sizes};
use crate::backend::{ForwardModel, Result};
use crate::cuda::CudaBackend;
use crate::cuda::workspace::Slot;
use crate::ops::whole::cuda::{One, OneLayer, OneParams, OneShape, TRACE};

impl CudaBackend {
    /// `None`: the model's shapes or formats are not the kernel's.
    pub(super) fn prepare_one(
        &mut self,
        model: &ForwardModel,
        layers: &[Layer],
        sizes: &Sizes,
        places: &Places,
    ) -> Result<Option<One>> {
        const OP: &str = "forward";
        let spec = &model.spec.layers[0];
        let first = &layers[0].handles;
        let shape = OneShape {
            dense: self.linear(OP, first.attention.q)?.format,
            gate: self.linear(OP, first.gate)?.format,
            experts: layers[0].format,
            kv: self.caches[first.kv.0 as usize].dtype,
            head_dim: spec.attention.head_dim,
            width: sizes.hidden,
            q_width: sizes.q_width,
            kv_width: sizes.kv_width,
            inter: sizes.inter,
            expert_count: sizes.experts,
            top_k: sizes.top_k,
            rotary: sizes.rotary,
        };
        if !shape.fits(self.gpu.blocks() as usize) {
            return Ok(None);
        }
        let mut rows = Vec::with_capacity(layers.len());
        for layer in layers {
            let (handles, weights) = (&layer.handles, &layer.handles.attention);
            let mut streams = [0; 8];
            let mut bf16_scales = [0; 4];
            for (i, id) in [weights.q, weights.k, weights.v, weights.o]
                .into_iter()
                .enumerate()
            {
                let linear = self.linear(OP, id)?;
                if linear.format != shape.dense {
                    return Ok(None);
                }
                (streams[i], bf16_scales[i]) = (linear.memory.address, i32::from(linear.bf16_scales));
            }
            let cache = &self.caches[handles.kv.0 as usize];
            let gate = self.linear(OP, handles.gate)?;
            let same = (gate.format, layer.format, cache.dtype) == (shape.gate, shape.experts, shape.kv)
                && layer.experts.expert_bytes == layers[0].experts.expert_bytes;
            if !same {
                return Ok(None);
            }
            streams[4..].copy_from_slice(&[
                gate.memory.address,
                layer.experts.base,
                cache.keys.address,
                cache.values.address,
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
                expert_bf16_scales: layer.experts.bf16_scales,
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
        One::new(&self.gpu, &mut self.workspace, &shape, &rows, params).map(Some)
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
