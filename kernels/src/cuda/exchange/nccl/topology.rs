//! How the GPUs of this host are linked, for the log.

use cudarc::driver::sys;

use crate::backend::Result;
use crate::cuda::Device;

/// `GPU 0: NVLink to 1, 2, PCIe to 3`; nothing to say of a lone GPU.
pub(crate) fn describe(device: &Device) -> Result<String> {
    use sys::CUdevice_P2PAttribute_enum as Attribute;
    let mut count = 0;
    // SAFETY: pointer to a local.
    device.check("number of devices", unsafe { sys::cuDeviceGetCount(&mut count) })?;
    let (mut linked, mut slower, mut unreachable) = (Vec::new(), Vec::new(), Vec::new());
    for ordinal in 0..count {
        let mut other = 0;
        // SAFETY: pointer to a local.
        device.check("a device", unsafe { sys::cuDeviceGet(&mut other, ordinal) })?;
        if other == device.raw() {
            continue;
        }
        let ask = |which| {
            let mut value = 0;
            // SAFETY: pointer to a local; two devices of the driver.
            let code = unsafe { sys::cuDeviceGetP2PAttribute(&mut value, which, device.raw(), other) };
            device
                .check("how two devices are linked", code)
                .map(|()| value != 0)
        };
        // Atomics of one device on another's memory are NVLink's.
        if !ask(Attribute::CU_DEVICE_P2P_ATTRIBUTE_ACCESS_SUPPORTED)? {
            unreachable.push(ordinal.to_string());
        } else if ask(Attribute::CU_DEVICE_P2P_ATTRIBUTE_NATIVE_ATOMIC_SUPPORTED)? {
            linked.push(ordinal.to_string());
        } else {
            slower.push(ordinal.to_string());
        }
    }
    let mut parts = Vec::new();
    for (how, ordinals) in [
        ("NVLink to", linked),
        ("PCIe to", slower),
        ("no way to", unreachable),
    ] {
        if !ordinals.is_empty() {
            parts.push(format!("{how} {}", ordinals.join(", ")));
        }
    }
    if parts.is_empty() {
        parts.push("no other GPU on this host".into());
    }
    Ok(format!("GPU {}: {}", device.raw(), parts.join(", ")))
}
