//! The KV cache of one layer.
//!
//! Keys and values apart, each `[page][kv head][token of the page][padded head]` in the cache's type. A head is
//! padded with zeros to whole chunks of its type (16 F32, 32 BF16, 64 e4m3, 16 e5m2), so that kernels read whole vectors.
//! Must stay true: padding is never written, so it stays 0.

use crate::backend::{KvDtype, Result};
use crate::cpu::check::mismatch;
use crate::cpu::engine::Rows;
use crate::cpu::float8::{f32_to_bf16, f32_to_e4m3, f32_to_e5m2};
use crate::cpu::memory::Memory;
use crate::simd::{Isa, Kernel, Simd, run};

/// Pages of one layer.
pub(crate) struct KvCache {
    pub(crate) pages: usize,
    pub(crate) page_tokens: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: KvDtype,
    pub(crate) keys: Memory,
    pub(crate) values: Memory,
}

impl KvCache {
    pub(crate) fn new(
        pages: usize,
        page_tokens: usize,
        kv_heads: usize,
        head_dim: usize,
        dtype: KvDtype,
    ) -> Result<KvCache> {
        if [pages, page_tokens, kv_heads, head_dim].contains(&0) {
            let what = "[pages, page tokens, kv heads, head dim]";
            let found = format!("[{pages}, {page_tokens}, {kv_heads}, {head_dim}]");
            return Err(mismatch("alloc_kv", what, found, "no zero"));
        }
        let row = row_bytes(dtype, head_dim);
        let bytes = [page_tokens, kv_heads, row]
            .into_iter()
            .try_fold(pages, |product, factor| product.checked_mul(factor))
            .unwrap_or(usize::MAX);
        Ok(KvCache {
            pages,
            page_tokens,
            kv_heads,
            head_dim,
            dtype,
            // Zeroing gigabytes would take longer than reading the weights; a page is written before it is read.
            keys: Memory::lazy(bytes, "keys of the KV cache")?,
            values: Memory::lazy(bytes, "values of the KV cache")?,
        })
    }

    /// Bytes of one head of one token.
    pub(crate) fn row_bytes(&self) -> usize {
        row_bytes(self.dtype, self.head_dim)
    }

    /// Where the row of `head` of the token at `position` begins, in keys and in values.
    pub(crate) fn row(&self, pages: &[u32], position: usize, head: usize) -> usize {
        let page = pages[position / self.page_tokens] as usize;
        ((page * self.kv_heads + head) * self.page_tokens + position % self.page_tokens) * self.row_bytes()
    }

    /// For tasks that write different positions.
    pub(crate) fn writer(&mut self) -> KvWriter<'_> {
        KvWriter {
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            page_tokens: self.page_tokens,
            dtype: self.dtype,
            keys: Rows::new(self.keys.bytes_mut(), row_bytes(self.dtype, self.head_dim)),
            values: Rows::new(self.values.bytes_mut(), row_bytes(self.dtype, self.head_dim)),
        }
    }
}

/// Writes tokens into the cache from several threads.
pub(crate) struct KvWriter<'a> {
    kv_heads: usize,
    head_dim: usize,
    page_tokens: usize,
    dtype: KvDtype,
    keys: Rows<'a, u8>,
    values: Rows<'a, u8>,
}

impl KvWriter<'_> {
    /// Rounds the keys and values of one token (all heads) into their places, to nearest even, saturating.
    ///
    /// # Safety
    /// No two threads may write the same position of the same page.
    pub(crate) unsafe fn write(
        &self,
        isa: Isa,
        pages: &[u32],
        position: usize,
        keys: &[f32],
        values: &[f32],
    ) {
        let heads = keys
            .chunks_exact(self.head_dim)
            .zip(values.chunks_exact(self.head_dim));
        for (head, (key, value)) in heads.enumerate() {
            let page = pages[position / self.page_tokens] as usize;
            let row = (page * self.kv_heads + head) * self.page_tokens + position % self.page_tokens;
            // SAFETY: the caller's promise.
            let (to_key, to_value) =
                unsafe { (self.keys.take(row..row + 1), self.values.take(row..row + 1)) };
            for (values, to) in [(key, to_key), (value, to_value)] {
                run(
                    isa,
                    Round {
                        dtype: self.dtype,
                        values,
                        to,
                    },
                );
            }
        }
    }
}

/// Rounds one head of one token.
struct Round<'a> {
    dtype: KvDtype,
    values: &'a [f32],
    to: &'a mut [u8],
}

impl Kernel for Round<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, _: S) {
        let Round { dtype, values, to } = self;
        match dtype {
            KvDtype::F32 => {
                for (value, to) in values.iter().zip(to.as_chunks_mut::<4>().0) {
                    *to = value.to_le_bytes();
                }
            }
            KvDtype::Bf16 => {
                for (value, to) in values.iter().zip(to.as_chunks_mut::<2>().0) {
                    *to = f32_to_bf16(*value).to_le_bytes();
                }
            }
            KvDtype::Fp8E4m3 => {
                for (value, to) in values.iter().zip(to) {
                    *to = f32_to_e4m3(*value);
                }
            }
            KvDtype::Fp8E5m2 => {
                for (value, to) in values.iter().zip(to) {
                    *to = f32_to_e5m2(*value);
                }
            }
        }
    }
}

fn row_bytes(dtype: KvDtype, head_dim: usize) -> usize {
    match dtype {
        KvDtype::F32 => head_dim.next_multiple_of(16).saturating_mul(4),
        KvDtype::Bf16 => head_dim.next_multiple_of(32).saturating_mul(2),
        KvDtype::Fp8E4m3 => head_dim.next_multiple_of(64),
        KvDtype::Fp8E5m2 => head_dim.next_multiple_of(16),
    }
}
