//! The CUDA devices of this machine, without opening one.

use std::ffi::CStr;

use cudarc::driver::sys;

use super::driver::{CAPABILITY, text};
use crate::backend::{KernelError, Result};

/// A device as the driver describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceInfo {
    pub ordinal: i32,
    pub name: String,
    pub memory_bytes: u64,
    pub capability: (i32, i32),
    /// `GPU-` and 32 digits: the same for every process that uses it.
    pub uuid: String,
}

impl DeviceInfo {
    /// Whether the kernels run on it.
    pub fn is_usable(&self) -> bool {
        self.capability == CAPABILITY
    }
}

/// All devices, usable or not. `Unsupported` says what is missing.
pub fn devices() -> Result<Vec<DeviceInfo>> {
    // SAFETY: only tries to open the library.
    if !unsafe { sys::is_culib_present() } {
        return Err(KernelError::Unsupported(
            "no CUDA driver: libcuda.so.1 cannot be opened; install the NVIDIA driver or run with --device cpu".into(),
        ));
    }
    let check = |what: &str, code| match code {
        sys::CUresult::CUDA_SUCCESS => Ok(()),
        code => Err(KernelError::Unsupported(format!("CUDA: {what}: {}", text(code)))),
    };
    let mut count = 0;
    // SAFETY: the pointer is to a local.
    unsafe {
        check("the driver does not start", sys::cuInit(0))?;
        check("no number of devices", sys::cuDeviceGetCount(&mut count))?;
    }
    (0..count)
        .map(|ordinal| {
            let (mut device, mut bytes, mut major, mut minor) = (0, 0, 0, 0);
            let mut name = [0; 128];
            let mut uuid = sys::CUuuid_st { bytes: [0; 16] };
            use sys::CUdevice_attribute_enum as Attribute;
            // SAFETY: every pointer is to a local of the type the call fills; the name's length leaves its last zero.
            unsafe {
                check("no such device", sys::cuDeviceGet(&mut device, ordinal))?;
                check("no memory size", sys::cuDeviceTotalMem_v2(&mut bytes, device))?;
                check("no name", sys::cuDeviceGetName(name.as_mut_ptr(), 127, device))?;
                check("no UUID", sys::cuDeviceGetUuid_v2(&mut uuid, device))?;
                let attribute = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR;
                check(
                    "no capability",
                    sys::cuDeviceGetAttribute(&mut major, attribute, device),
                )?;
                let attribute = Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR;
                check(
                    "no capability",
                    sys::cuDeviceGetAttribute(&mut minor, attribute, device),
                )?;
            }
            // SAFETY: terminated: the array was zeros and its last byte was not given away.
            let name = unsafe { CStr::from_ptr(name.as_ptr()) };
            Ok(DeviceInfo {
                ordinal,
                name: name.to_string_lossy().into_owned(),
                memory_bytes: bytes as u64,
                capability: (major, minor),
                uuid: uuid_text(uuid.bytes.map(|byte| byte.cast_unsigned())),
            })
        })
        .collect()
}

fn uuid_text(bytes: [u8; 16]) -> String {
    let mut text = "GPU".to_owned();
    for (index, byte) in bytes.iter().enumerate() {
        let dash = if matches!(index, 0 | 4 | 6 | 8 | 10) {
            "-"
        } else {
            ""
        };
        text += &format!("{dash}{byte:02x}");
    }
    text
}
