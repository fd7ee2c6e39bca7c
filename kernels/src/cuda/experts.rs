//! The experts of one layer on the device: one block of memory, each expert's three streams end to end.

use super::format::{TILE_ROWS, padded};
use super::loader::Placed;
use super::rows::Rows;
use super::{CudaBackend, Format, Memory, shape};
use crate::backend::{ExpertsId, HostExpert, KernelError, Reading, Result};
use crate::ops::experts::cuda::{ExpertsParam, widest};

pub(crate) struct ExpertBlock {
    pub(crate) memory: Memory,
    pub(crate) format: Format,
    pub(crate) count: usize,
    pub(crate) hidden: usize,
    pub(crate) inter: usize,
    pub(crate) bf16_scales: bool,
}

impl ExpertBlock {
    /// Tiles of gate and of up: whole units of the kernel, so that every value of `down`'s input is written.
    pub(crate) fn up_tiles(&self) -> usize {
        padded(self.inter) / TILE_ROWS
    }

    fn up_bytes(&self) -> usize {
        self.format.stream_bytes(self.up_tiles(), padded(self.hidden))
    }

    fn down_bytes(&self) -> usize {
        self.format
            .stream_bytes(self.hidden.div_ceil(TILE_ROWS), padded(self.inter))
    }

    fn expert_bytes(&self) -> usize {
        2 * self.up_bytes() + self.down_bytes()
    }

    pub(crate) fn param(&self) -> ExpertsParam {
        ExpertsParam {
            base: self.memory.address,
            expert_bytes: self.expert_bytes() as u64,
            up_offset: self.up_bytes() as u64,
            down_offset: 2 * self.up_bytes() as u64,
            hidden_padded: padded(self.hidden) as i32,
            inter_padded: padded(self.inter) as i32,
            hidden: self.hidden as i32,
            bf16_scales: i32::from(self.bf16_scales),
        }
    }
}

impl CudaBackend {
    /// Memory for `count` experts, unwritten.
    pub(super) fn expert_memory(
        &mut self,
        count: usize,
        hidden: usize,
        inter: usize,
        format: Format,
        bf16_scales: bool,
    ) -> Result<ExpertBlock> {
        if matches!(format, Format::F16 | Format::F32) {
            return Err(KernelError::Unsupported(format!(
                "experts are {}; the CUDA backend runs BF16, FP8 and INT4",
                format.name()
            )));
        }
        let format = format.of_experts();
        let widest = widest(format, self.gpu.device.shared_bytes as usize);
        if hidden.max(inter) > widest {
            return Err(KernelError::Unsupported(format!(
                "experts of {hidden} and {inter} inputs in {}: eight rows of more than {widest} do not fit into a multiprocessor's shared memory; serve them in another format or on the CPU",
                format.name()
            )));
        }
        let memory = Memory { address: 0, bytes: 0 };
        let mut block = ExpertBlock {
            memory,
            format,
            count,
            hidden,
            inter,
            bf16_scales,
        };
        let what = format!("{count} experts of a layer");
        block.memory = Memory::raw(&self.gpu.device, block.expert_bytes() * count, &what)?;
        Ok(block)
    }

    pub(super) fn keep_experts(&mut self, block: ExpertBlock) -> ExpertsId {
        let free = self.experts.iter().position(Option::is_none);
        let index = free.unwrap_or_else(|| {
            self.experts.push(None);
            self.experts.len() - 1
        });
        self.experts[index] = Some(block);
        ExpertsId(index as u32)
    }

    /// The experts of several layers.
    pub(super) fn add_experts(
        &mut self,
        layers: &[&[HostExpert]],
        reading: Reading<'_>,
    ) -> Result<Vec<ExpertsId>> {
        self.gpu.device.enter()?;
        let (mut blocks, mut placed) = (Vec::with_capacity(layers.len()), Vec::new());
        for experts in layers {
            blocks.push(self.place_experts(experts, &mut placed)?);
        }
        self.loader.load(&self.gpu, &placed, reading)?;
        Ok(blocks.into_iter().map(|block| self.keep_experts(block)).collect())
    }

    /// Memory for a layer's experts, and what is to be written there.
    fn place_experts<'a>(
        &mut self,
        experts: &'a [HostExpert],
        placed: &mut Vec<Placed<'a>>,
    ) -> Result<ExpertBlock> {
        const OP: &str = "upload of experts";
        let mut rows = checked(experts)?;
        let first = rows.first().ok_or_else(|| shape(OP, "experts", 0, "1 or more"))?;
        let (format, inter, hidden) = (first[0].format, first[0].outputs, first[0].inputs);
        for (i, row) in rows.iter().flat_map(|expert| expert.iter().enumerate()) {
            let expected = if i < 2 { (inter, hidden) } else { (hidden, inter) };
            if (row.outputs, row.inputs) != expected {
                return Err(shape(
                    OP,
                    "shape",
                    format!("{:?}", (row.outputs, row.inputs)),
                    format!("{expected:?}"),
                ));
            }
            if row.format != format {
                return Err(KernelError::Unsupported(format!(
                    "experts of one layer are {} and {}",
                    format.name(),
                    row.format.name()
                )));
            }
        }
        let bf16_scales = rows.iter().flatten().any(|row| row.bf16_scales);
        rows.iter_mut()
            .flatten()
            .for_each(|row| row.bf16_scales = bf16_scales);
        let block = self.expert_memory(experts.len(), hidden, inter, format, bf16_scales)?;
        let param = block.param();
        placed.reserve(3 * experts.len());
        for (index, [gate, up, down]) in rows.into_iter().enumerate() {
            let at = param.base + index as u64 * param.expert_bytes;
            let format = block.format;
            let mut place = |rows, stream, tiles| {
                placed.push(Placed {
                    rows,
                    format,
                    tiles,
                    stream,
                });
            };
            place(gate, at, block.up_tiles());
            place(up, at + param.up_offset, block.up_tiles());
            place(down, at + param.down_offset, hidden.div_ceil(TILE_ROWS));
        }
        Ok(block)
    }

    pub(super) fn expert_block(&self, op: &'static str, id: ExpertsId) -> Result<&ExpertBlock> {
        let block = self.experts.get(id.0 as usize).and_then(Option::as_ref);
        block.ok_or_else(|| shape(op, "experts", id.0, "uploaded ones"))
    }
}

/// Gate, up and down of every expert. Each scale is looked at, so several threads share them.
fn checked(experts: &[HostExpert]) -> Result<Vec<[Rows<'_>; 3]>> {
    const THREADS: usize = 8;
    let parts = experts.chunks(experts.len().div_ceil(THREADS).max(1));
    std::thread::scope(|scope| {
        let threads: Vec<_> = parts
            .map(|part| scope.spawn(|| part.iter().map(checked_one).collect::<Result<Vec<_>>>()))
            .collect();
        let mut all = Vec::with_capacity(experts.len());
        for thread in threads {
            all.extend(
                thread
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))?,
            );
        }
        Ok(all)
    })
}

fn checked_one(expert: &HostExpert) -> Result<[Rows<'_>; 3]> {
    Ok([
        Rows::new(&expert.gate)?,
        Rows::new(&expert.up)?,
        Rows::new(&expert.down)?,
    ])
}
