//! A device and its context. Opens libcuda at run time; without it, or without a device that can run the kernels, creation
//! says what is missing.

use std::ffi::CStr;

use cudarc::driver::sys;

use crate::backend::{KernelError, Result};

/// sm_90a code runs on exactly this compute capability.
pub(in crate::cuda) const CAPABILITY: (i32, i32) = (9, 0);
/// Fatbins of a CUDA 13 compiler need a driver of CUDA 13; those of 12.8 run on older ones.
const DRIVER: i32 = 13_000;

/// A device and its primary context, current on the thread that uses it.
pub(crate) struct Device {
    context: sys::CUcontext,
    device: sys::CUdevice,
    pub(crate) name: String,
    pub(crate) multiprocessors: u32,
    /// Shared memory that one block may have, dynamic and static.
    pub(crate) shared_bytes: u32,
    pub(crate) driver_version: i32,
}

// SAFETY: the driver's handles may be used from any thread; `enter` makes the context current where it is used.
unsafe impl Send for Device {}
// SAFETY: likewise, and nothing of it changes.
unsafe impl Sync for Device {}

pub(in crate::cuda) fn text(code: sys::CUresult) -> String {
    let mut message = std::ptr::null();
    // SAFETY: the driver sets `message` to a static string or leaves it null.
    let known = unsafe { sys::cuGetErrorString(code, &mut message) } == sys::CUresult::CUDA_SUCCESS;
    if !known || message.is_null() {
        return format!("{code:?}");
    }
    // SAFETY: not null, so a string of the driver.
    let message = unsafe { CStr::from_ptr(message) };
    format!("{} ({code:?})", message.to_string_lossy())
}

impl Device {
    /// Opens device `ordinal`. `Unsupported` says what is missing.
    pub(crate) fn open(ordinal: i32) -> Result<Device> {
        // SAFETY: only tries to open the library.
        if !unsafe { sys::is_culib_present() } {
            return Err(KernelError::Unsupported(
                "no CUDA driver: libcuda.so.1 cannot be opened; install the NVIDIA driver or run with --device cpu".into(),
            ));
        }
        let unsupported = |what: &str, code| {
            KernelError::Unsupported(format!("CUDA device {ordinal}: {what}: {}", text(code)))
        };
        let check = |what: &str, code| match code {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(unsupported(what, code)),
        };
        let (mut device, mut context, mut driver_version) = (0, std::ptr::null_mut(), 0);
        // SAFETY: every pointer is to a local of the type the call fills.
        unsafe {
            check("the driver does not start", sys::cuInit(0))?;
            check("no version", sys::cuDriverGetVersion(&mut driver_version))?;
            check("no such device", sys::cuDeviceGet(&mut device, ordinal))?;
            check("no context", sys::cuDevicePrimaryCtxRetain(&mut context, device))?;
            check("no context", sys::cuCtxSetCurrent(context))?;
        }
        let attribute = |which| {
            let mut value = 0;
            // SAFETY: as above.
            check("no attribute", unsafe {
                sys::cuDeviceGetAttribute(&mut value, which, device)
            })?;
            Ok(value)
        };
        use sys::CUdevice_attribute_enum as Attribute;
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        let mut name = [0; 128];
        // SAFETY: the length is the array's, less the terminating zero that is there already.
        check("no name", unsafe {
            sys::cuDeviceGetName(name.as_mut_ptr(), 127, device)
        })?;
        // SAFETY: terminated: the array was zeros and its last byte was not given away.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }
            .to_string_lossy()
            .into_owned();
        if capability != CAPABILITY {
            return Err(KernelError::Unsupported(format!(
                "CUDA device {ordinal} ({name}) has compute capability {}.{}; the kernels are compiled for 9.0 (H100, H200)",
                capability.0, capability.1
            )));
        }
        Ok(Device {
            context,
            device,
            name,
            multiprocessors: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32,
            shared_bytes: attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as u32,
            driver_version,
        })
    }

    /// The driver's number of the device.
    pub(crate) fn raw(&self) -> sys::CUdevice {
        self.device
    }

    /// Makes the context current on this thread.
    pub(crate) fn enter(&self) -> Result<()> {
        // SAFETY: the context lives as long as `self`.
        self.check("use of the context", unsafe {
            sys::cuCtxSetCurrent(self.context)
        })
    }

    pub(crate) fn check(&self, what: &str, code: sys::CUresult) -> Result<()> {
        match code {
            sys::CUresult::CUDA_SUCCESS => Ok(()),
            code => Err(self.error(format!("{what}: {}", text(code)))),
        }
    }

    pub(crate) fn error(&self, what: String) -> KernelError {
        KernelError::Device {
            device: format!("cuda ({})", self.name),
            what,
        }
    }

    /// Why the code cannot be loaded, if the reason is the driver's age.
    pub(crate) fn too_old(&self) -> Option<String> {
        (self.driver_version < DRIVER).then(|| {
            format!(
                "the driver is of CUDA {}.{}; kernels compiled by CUDA 13 need driver 580 or newer",
                self.driver_version / 1000,
                self.driver_version % 1000 / 10
            )
        })
    }

    /// Free and total bytes of device memory.
    pub(crate) fn memory(&self) -> Result<(u64, u64)> {
        let (mut free, mut total) = (0, 0);
        // SAFETY: pointers to locals.
        self.check("memory", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok((free as u64, total as u64))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // SAFETY: retained once in `open`. An error here has nobody to go to.
        let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
    }
}
