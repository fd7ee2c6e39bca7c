//! Buffers that the executor holds handles of.

use crate::backend::{Buffer, Result};
use crate::cpu::check::mismatch;
use crate::cpu::memory::Memory;

/// All buffers of a backend, by handle.
#[derive(Default)]
pub(crate) struct Buffers {
    memories: Vec<Memory>,
}

impl Buffers {
    pub(crate) fn alloc(&mut self, bytes: usize, what: &str) -> Result<Buffer> {
        self.memories.push(Memory::new(bytes, what)?);
        Ok(Buffer {
            handle: self.memories.len() as u64 - 1,
            bytes,
        })
    }

    /// `len` bytes of a buffer from `offset` on.
    pub(crate) fn range(
        &mut self,
        op: &'static str,
        buffer: &Buffer,
        offset: usize,
        len: usize,
    ) -> Result<&mut [u8]> {
        let memory = self.memories.get_mut(buffer.handle as usize);
        let bytes =
            memory.and_then(|memory| memory.bytes_mut()[..].get_mut(offset..offset.checked_add(len)?));
        bytes.ok_or_else(|| {
            mismatch(
                op,
                "range of a buffer",
                format!("{len} bytes at {offset}"),
                format!("within the {} bytes of buffer {}", buffer.bytes, buffer.handle),
            )
        })
    }

    /// The first `words[i]` F32 of each of `N` different buffers.
    pub(crate) fn words<const N: usize>(
        &mut self,
        op: &'static str,
        of: [(&Buffer, usize); N],
    ) -> Result<[&mut [f32]; N]> {
        for (buffer, words) in of {
            let bytes = self.memories.get(buffer.handle as usize).map_or(0, Memory::len);
            if words
                .checked_mul(4)
                .is_none_or(|needed| needed > bytes.min(buffer.bytes))
            {
                return Err(mismatch(
                    op,
                    "buffer",
                    format!("{} bytes", buffer.bytes),
                    format!("{words} F32 values at least"),
                ));
            }
        }
        let handles = of.map(|(buffer, _)| buffer.handle as usize);
        let memories = self
            .memories
            .get_disjoint_mut(handles)
            .map_err(|_| mismatch(op, "buffers", format!("handles {handles:?}"), "different buffers"))?;
        let mut of = of.into_iter();
        Ok(memories.map(|memory| {
            let words = of.next().map_or(0, |(_, words)| words);
            &mut memory.f32_mut()[..words]
        }))
    }
}
