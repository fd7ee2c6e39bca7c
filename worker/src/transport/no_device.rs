//! In place of `device` in a build without CUDA kernels: no rank offers its transports, and who asks is told.

use conclave_kernels::backend::{Backend, KernelError};

use super::group::Group;
use super::{Result, Transport};

pub fn connect(_: &mut dyn Backend, group: Group<'_>) -> Result<Box<dyn Transport>> {
    let name = group.kind.name();
    Err(KernelError::Unsupported(format!(
        "{name} is between GPUs, and this build has no CUDA kernels"
    ))
    .into())
}

pub fn leave(_: &mut dyn Backend) -> Result<()> {
    Ok(())
}
