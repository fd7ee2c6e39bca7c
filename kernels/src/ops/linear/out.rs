//! Where the results of a linear go.

use std::marker::PhantomData;

/// `[rows, stride]` F32 that several threads write to, each its own elements.
#[derive(Clone, Copy)]
pub(crate) struct Out<'a> {
    base: *mut f32,
    len: usize,
    /// Values from one row to the next.
    stride: usize,
    /// Row of each token; `None`: its own number.
    index: Option<&'a [u32]>,
    /// Output that is stored first in a row.
    first: usize,
    /// `+=` instead of `=`.
    add: bool,
    owner: PhantomData<&'a mut [f32]>,
}

// SAFETY: it stands for a `&mut [f32]`; that threads write different elements is the contract of `new`.
unsafe impl Send for Out<'_> {}
// SAFETY: as above.
unsafe impl Sync for Out<'_> {}

impl<'a> Out<'a> {
    /// Results of token t, output o go to `to[t * stride + o]`.
    ///
    /// # Safety
    /// No two threads may write the same element, nor may anything else use `to` while threads write.
    pub(crate) unsafe fn new(to: &'a mut [f32], stride: usize, add: bool) -> Out<'a> {
        Out {
            base: to.as_mut_ptr(),
            len: to.len(),
            stride,
            index: None,
            first: 0,
            add,
            owner: PhantomData,
        }
    }

    /// The same with rows `index[t]`.
    pub(crate) fn indexed(self, index: &'a [u32]) -> Out<'a> {
        Out {
            index: Some(index),
            ..self
        }
    }

    /// The same with only the outputs from `first` on: output o of token t goes to `to[t * stride + o - first]`.
    pub(crate) fn from(self, first: usize) -> Out<'a> {
        Out { first, ..self }
    }

    /// Stores (or adds) one result; out of bounds is a panic.
    #[inline(always)]
    pub(crate) fn put(&self, output: usize, token: usize, value: f32) {
        let row = match self.index {
            Some(index) => index[token] as usize,
            None => token,
        };
        let at = row * self.stride + output - self.first;
        assert!(at < self.len, "result outside its buffer");
        // SAFETY: inside the slice; by the contract of `new` no other thread uses this element.
        unsafe {
            let to = self.base.add(at);
            *to = if self.add { *to + value } else { value };
        }
    }
}
