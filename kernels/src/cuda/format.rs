//! The stream formats of `stream.cuh`, as the host needs them: sizes and names.

/// How a weight lies in device memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Format {
    /// One scale and zero point per 128 inputs.
    Int4G128,
    /// One per 32; also serves groups of 64.
    Int4G32,
    Fp8,
    Bf16,
    F16,
    F32,
}

/// Rows of a tile.
pub(crate) const TILE_ROWS: usize = 16;

impl Format {
    /// The number the kernels know it by.
    pub(crate) fn id(self) -> i32 {
        self as i32
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Format::Int4G128 => "int4_g128",
            Format::Int4G32 => "int4_g32",
            Format::Fp8 => "fp8",
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::F32 => "f32",
        }
    }

    /// Inputs of one stage.
    pub(crate) fn stage_inputs(self) -> usize {
        match self {
            Format::Int4G128 | Format::Int4G32 | Format::Fp8 => 128,
            Format::Bf16 | Format::F16 | Format::F32 => 64,
        }
    }

    /// Bytes of one stage of 16 rows, scales included.
    pub(crate) fn stage_bytes(self) -> usize {
        match self {
            Format::Int4G128 => 1024 + 48,
            Format::Int4G32 => 1024 + 4 * 48,
            Format::Fp8 => 2048 + 16,
            Format::Bf16 | Format::F16 => 2048,
            Format::F32 => 4096,
        }
    }

    /// Whether activations meet these weights as bytes (`image.cuh`).
    pub(crate) fn is_int4(self) -> bool {
        matches!(self, Format::Int4G128 | Format::Int4G32)
    }

    /// Stages that one copy brings in the few-token kernels.
    pub(crate) fn span(self) -> usize {
        if self.is_int4() { 2 } else { 1 }
    }

    /// Copies in flight per warp of the few-token kernels, as their `.cu` files instantiate them.
    pub(crate) fn depth(self) -> usize {
        match self {
            Format::Fp8 | Format::Bf16 | Format::F16 | Format::Int4G128 | Format::Int4G32 => 2,
            Format::F32 => 1,
        }
    }

    /// Stages of `padded` inputs (a multiple of 128).
    pub(crate) fn stages(self, padded: usize) -> usize {
        padded / self.stage_inputs()
    }

    /// Bytes of `tiles` tiles of `padded` inputs.
    pub(crate) fn stream_bytes(self, tiles: usize, padded: usize) -> usize {
        tiles * self.stages(padded) * self.stage_bytes()
    }

    /// Bytes of one token's image of `padded` values in shared memory (`image.cuh`).
    pub(crate) fn image_bytes(self, padded: usize) -> usize {
        if self.is_int4() {
            padded * 2 + padded / 4
        } else {
            padded * 4
        }
    }

    /// Shared memory of the 16 rings of a few-token block.
    pub(crate) fn ring_bytes(self) -> usize {
        16 * self.depth() * self.span() * self.stage_bytes()
    }
}

/// Inputs padded to whole steps.
pub(crate) fn padded(inputs: usize) -> usize {
    inputs.next_multiple_of(128)
}

/// Bytes of the two partial-sum buffers for 4 * `groups` tokens (`gemv.cuh`).
pub(crate) fn partial_bytes(groups: usize) -> usize {
    2 * 16 * 4 * groups * 24 * 4
}
