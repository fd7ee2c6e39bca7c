//! Errors of shape, in one wording.

use crate::backend::{KernelError, Result};

/// `{op}: {what} is {found}, expected {expected}`.
pub(crate) fn mismatch(
    op: &'static str,
    what: &'static str,
    found: impl ToString,
    expected: impl ToString,
) -> KernelError {
    KernelError::Shape {
        op,
        what,
        found: found.to_string(),
        expected: expected.to_string(),
    }
}

/// Fails unless the two are equal.
pub(crate) fn expect(op: &'static str, what: &'static str, found: usize, expected: usize) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    Err(mismatch(op, what, found, expected))
}

/// The item of a handle, which may come from elsewhere.
pub(crate) fn lookup<'a, T>(
    op: &'static str,
    what: &'static str,
    all: &'a [T],
    handle: u32,
) -> Result<&'a T> {
    all.get(handle as usize).ok_or_else(|| {
        mismatch(
            op,
            what,
            format!("handle {handle}"),
            format!("a handle below {}", all.len()),
        )
    })
}
