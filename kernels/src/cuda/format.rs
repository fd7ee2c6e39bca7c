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
    /// FP8 of experts: whole lines of the cache, three stages behind one with their scales.
    Fp8Experts = 7,
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
            Format::Fp8 | Format::Fp8Experts => "fp8",
            Format::Bf16 => "bf16",
            Format::F16 => "f16",
            Format::F32 => "f32",
        }
    }

    /// Inputs of one stage.
    pub(crate) fn stage_inputs(self) -> usize {
        match self {
            Format::Int4G128 | Format::Int4G32 | Format::Fp8 | Format::Fp8Experts => 128,
            Format::Bf16 | Format::F16 | Format::F32 => 64,
        }
    }

    /// How experts of this format lie.
    pub(crate) fn of_experts(self) -> Format {
        match self {
            Format::Fp8 => Format::Fp8Experts,
            other => other,
        }
    }

    /// The kernel that makes such streams of a checkpoint's rows.
    pub(crate) fn repack_kernel(self) -> String {
        let lying = if self == Format::Fp8Experts {
            "_experts"
        } else {
            ""
        };
        format!("repack_{}{lying}", self.name())
    }

    /// Bytes of one stage of 16 rows, scales included (of experts in FP8 without).
    pub(crate) fn stage_bytes(self) -> usize {
        match self {
            Format::Int4G128 => 1024 + 48,
            Format::Int4G32 => 1024 + 4 * 48,
            Format::Fp8 => 2048 + 16,
            Format::Bf16 | Format::F16 | Format::Fp8Experts => 2048,
            Format::F32 => 4096,
        }
    }

    /// Bytes in front of each three stages, with their scales.
    pub(crate) fn line_bytes(self) -> usize {
        if self == Format::Fp8Experts { 128 } else { 0 }
    }

    /// What a stream is a row of: stages, or three of them behind a line. Stages and bytes.
    pub(crate) fn repeated(self) -> (usize, usize) {
        match self.line_bytes() {
            0 => (1, self.stage_bytes()),
            line => (TRIO, line + TRIO * self.stage_bytes()),
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
            Format::F32 => 1,
            _ => 2,
        }
    }

    /// Stages of `padded` inputs (a multiple of 128).
    pub(crate) fn stages(self, padded: usize) -> usize {
        padded / self.stage_inputs()
    }

    /// Bytes of a tile of `padded` inputs.
    pub(crate) fn tile_bytes(self, padded: usize) -> usize {
        let (stages, bytes) = self.repeated();
        self.stages(padded).div_ceil(stages) * bytes
    }

    /// Bytes of `tiles` tiles of `padded` inputs.
    pub(crate) fn stream_bytes(self, tiles: usize, padded: usize) -> usize {
        tiles * self.tile_bytes(padded)
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
        16 * self.depth() * (self.line_bytes() + self.span() * self.stage_bytes())
    }

    /// Of those of a block of the experts' kernels of groups: two slots of INT4 hold three stages that begin anywhere in a line, one of FP8's a trio.
    pub(crate) fn group_ring_bytes(self) -> usize {
        if self.is_int4() {
            2 * 16 * (INT4_TOGETHER * self.stage_bytes() + LINE - 16).next_multiple_of(LINE)
        } else if self == Format::Fp8Experts {
            16 * self.repeated().1
        } else {
            self.ring_bytes()
        }
    }

    /// Of a row of `padded` values in those kernels (`group_images.cuh`): its image, and what stands apart for each of two groups.
    pub(crate) fn group_image_bytes(self, padded: usize) -> (usize, usize) {
        let blocks = padded / 128;
        match self {
            _ if self.is_int4() => (padded * 2, blocks * 32),
            Format::Fp8Experts => (padded * 4, blocks * size_of::<f32>()),
            _ => (padded * 4, 0),
        }
    }
}

/// Stages behind one line of scales.
const TRIO: usize = 3;

/// Stages of one copy of INT4 in the kernels of groups, and bytes of a line of the cache, as `gemv.cuh` has them.
const INT4_TOGETHER: usize = 3;
const LINE: usize = 128;

/// Inputs padded to whole steps.
pub(crate) fn padded(inputs: usize) -> usize {
    inputs.next_multiple_of(128)
}

/// Bytes of the two partial-sum buffers for 4 * `groups` tokens (`gemv.cuh`).
pub(crate) fn partial_bytes(groups: usize) -> usize {
    2 * 16 * 4 * groups * 24 * 4
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_in_fp8_lie_in_trios() {
        let format = Format::Fp8.of_experts();
        assert_eq!(format, Format::Fp8Experts);
        assert_eq!(format.stream_bytes(96, 3072), 96 * 8 * (128 + 3 * 2048));
        // The last trio of a tile is whole, so that each tile begins on a line.
        assert_eq!(format.tile_bytes(128), 128 + 3 * 2048);
        assert_eq!(format.tile_bytes(512), 2 * format.tile_bytes(384));
        assert_eq!(format.ring_bytes(), 16 * 2 * (128 + 2048));
    }

    #[test]
    fn places_of_groups_hold_a_copy_wherever_it_begins() {
        assert_eq!(Format::Int4G128.group_ring_bytes(), 2 * 16 * 26 * 128);
        assert_eq!(Format::Int4G32.group_ring_bytes(), 2 * 16 * 30 * 128);
        assert_eq!(Format::Fp8Experts.group_ring_bytes(), 16 * 49 * 128);
    }

    #[test]
    fn other_formats_are_stages_alone() {
        for format in [
            Format::Int4G128,
            Format::Int4G32,
            Format::Fp8,
            Format::Bf16,
            Format::F32,
        ] {
            let stages = 512 / format.stage_inputs();
            assert_eq!(
                format.stream_bytes(7, 512),
                7 * stages * format.stage_bytes(),
                "{format:?}"
            );
        }
        assert_eq!(Format::Bf16.of_experts(), Format::Bf16);
    }
}
