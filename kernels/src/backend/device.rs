//! What a device is.

/// Bytes of a device's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    pub free: u64,
    pub total: u64,
    /// What this process has allocated.
    pub ours: u64,
}

/// What a device reaches at best.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Ceilings {
    /// Bytes per second.
    pub read: f64,
    /// Operations per second of BF16 products, two for each multiply-add.
    pub flops: f64,
}
