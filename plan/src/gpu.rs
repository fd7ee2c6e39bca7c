//! Devices that `plan` knows by name.

use std::str::FromStr;

const GIB: u64 = 1 << 30;

/// A GPU model and its figures.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Gpu {
    pub name: &'static str,
    /// Device memory left once the driver's context exists.
    pub usable_bytes: u64,
    /// Data-sheet memory bandwidth, bytes per second.
    pub bandwidth: f64,
}

/// H100 SXM5, 80 GB of HBM3.
pub const H100: Gpu = Gpu {
    name: "h100",
    usable_bytes: 78 * GIB,
    bandwidth: 3.35e12,
};

/// H200 SXM5, 141 GB of HBM3e.
pub const H200: Gpu = Gpu {
    name: "h200",
    usable_bytes: 139 * GIB,
    bandwidth: 4.8e12,
};

pub const GPUS: [Gpu; 2] = [H100, H200];

impl FromStr for Gpu {
    type Err = String;

    fn from_str(name: &str) -> Result<Gpu, String> {
        GPUS.into_iter()
            .find(|gpu| gpu.name == name)
            .ok_or_else(|| "not known; known: h100, h200".to_owned())
    }
}
