//! NCCL between GPUs, as far as it needs no device: the id of a communicator.

/// Bytes of an id.
pub const ID_BYTES: usize = 128;

/// What the ranks of a communicator are given to find each other. Whoever knows it can join.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct CommunicatorId(pub [u8; ID_BYTES]);

impl std::fmt::Debug for CommunicatorId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CommunicatorId(..)")
    }
}

/// Sets what NCCL is to find in the environment, where the user has not.
///
/// # Safety
/// No other thread has been started.
pub unsafe fn set_environment() {
    #[cfg(feature = "cuda")]
    // SAFETY: by the caller's word.
    unsafe {
        conclave_kernels::cuda::exchange::nccl::set_environment();
    }
}

/// A new one; it works as long as this process lives. `Err`: what this build or machine lacks.
#[cfg(feature = "cuda")]
pub fn draw_id() -> Result<CommunicatorId, String> {
    use conclave_kernels::cuda::exchange::nccl::Nccl;
    let drawn = Nccl::open().and_then(Nccl::unique_id);
    drawn
        .map(|id| CommunicatorId(id.0))
        .map_err(|error| error.to_string())
}

#[cfg(not(feature = "cuda"))]
pub fn draw_id() -> Result<CommunicatorId, String> {
    Err("this build has no CUDA kernels, and with them no NCCL".into())
}
