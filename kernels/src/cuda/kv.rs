//! Keys and values of a layer, in pages.

use super::{CudaBackend, Memory, shape};
use crate::backend::{KernelError, KvDtype, KvId, Result};
use crate::ops::attention::cuda as attention;

/// Keys and values of one layer.
pub(crate) struct KvCache {
    pub(crate) keys: Memory,
    pub(crate) values: Memory,
    pub(crate) pages: usize,
    pub(crate) page_tokens: usize,
    pub(crate) kv_heads: usize,
    pub(crate) head_dim: usize,
    pub(crate) dtype: KvDtype,
}

impl CudaBackend {
    pub(super) fn new_cache(
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
}
