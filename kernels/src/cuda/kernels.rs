//! The compiled kernels: fatbins inside the binary, loaded whole at start, found by name.

use std::collections::HashMap;
use std::ffi::{CStr, c_void};

use cudarc::driver::sys;

use super::driver::{Device, Stream};
use crate::backend::{KernelError, Result};

/// (`folder_file`, fatbin) of every `.cu` file.
const FATBINS: &[(&str, &[u8])] = include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

pub(crate) struct Kernels {
    modules: Vec<sys::CUmodule>,
    functions: HashMap<String, Function>,
}

#[derive(Clone, Copy)]
struct Function {
    raw: sys::CUfunction,
    /// Dynamic shared memory that a launch may ask for.
    shared_bytes: u32,
}

// SAFETY: the driver's handles may be used from any thread.
unsafe impl Send for Kernels {}
// SAFETY: likewise, and launching only reads it.
unsafe impl Sync for Kernels {}

/// The shape of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Launch {
    pub(crate) grid: (u32, u32),
    pub(crate) threads: u32,
    pub(crate) shared: u32,
    /// The kernel keeps the rule of `ptx.cuh`, so it may start while the one before it ends.
    pub(crate) overlap: bool,
}

impl Kernels {
    /// Loads all code now: no launch compiles or loads anything later.
    pub(crate) fn load(device: &Device) -> Result<Kernels> {
        Kernels::load_some(device, |_| true)
    }

    /// The same for the files whose name (`folder_file`) is `wanted`.
    pub(crate) fn load_some(device: &Device, wanted: impl Fn(&str) -> bool) -> Result<Kernels> {
        let mut kernels = Kernels {
            modules: Vec::new(),
            functions: HashMap::new(),
        };
        for (name, fatbin) in FATBINS.iter().filter(|(name, _)| wanted(name)) {
            let mut module = std::ptr::null_mut();
            // SAFETY: a whole fatbin, as the compiler wrote it.
            let code = unsafe { sys::cuModuleLoadData(&mut module, fatbin.as_ptr().cast()) };
            if code != sys::CUresult::CUDA_SUCCESS
                && let Some(reason) = device.too_old()
            {
                return Err(KernelError::Unsupported(reason));
            }
            device.check(&format!("loading the kernels of {name}"), code)?;
            kernels.modules.push(module);
            for function in functions(device, module)? {
                let mut text = std::ptr::null();
                // SAFETY: a function of a loaded module; the name lives as long as it.
                device.check("kernel name", unsafe { sys::cuFuncGetName(&mut text, function) })?;
                // SAFETY: set by the successful call above.
                let name = unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned();
                let shared_bytes = open_shared_memory(device, function)?;
                kernels.functions.insert(
                    name,
                    Function {
                        raw: function,
                        shared_bytes,
                    },
                );
            }
        }
        Ok(kernels)
    }

    /// Queues one kernel with one parameter struct.
    pub(crate) fn launch<P>(
        &self,
        device: &Device,
        stream: &Stream,
        name: &str,
        launch: Launch,
        params: &P,
    ) -> Result<()> {
        let pointer = std::ptr::from_ref(params).cast::<c_void>().cast_mut();
        self.launch_raw(device, stream, name, launch, &mut [pointer])
    }

    /// The same with a list of pointers to parameters.
    pub(crate) fn launch_raw(
        &self,
        device: &Device,
        stream: &Stream,
        name: &str,
        launch: Launch,
        params: &mut [*mut c_void],
    ) -> Result<()> {
        let function = self
            .functions
            .get(name)
            .ok_or_else(|| KernelError::Unsupported(format!("there is no kernel {name}")))?;
        if launch.shared > function.shared_bytes {
            return Err(KernelError::Unsupported(format!(
                "{name} needs {} bytes of shared memory, a block has {}",
                launch.shared, function.shared_bytes
            )));
        }
        if launch.grid.0 == 0 || launch.grid.1 == 0 {
            return Ok(());
        }
        let mut attributes = [sys::CUlaunchAttribute_st {
            id: sys::CUlaunchAttributeID_enum::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue_union {
                programmaticStreamSerializationAllowed: 1,
            },
        }];
        let config = sys::CUlaunchConfig_st {
            gridDimX: launch.grid.0,
            gridDimY: launch.grid.1,
            gridDimZ: 1,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared,
            hStream: stream.raw,
            attrs: attributes.as_mut_ptr(),
            numAttrs: u32::from(launch.overlap),
        };
        // SAFETY: the parameters are those of the kernel: callers pass the struct of the `.cu` file's layout.
        let code = unsafe {
            sys::cuLaunchKernelEx(&config, function.raw, params.as_mut_ptr(), std::ptr::null_mut())
        };
        device.check(&format!("launch of {name}"), code)
    }
}

impl Drop for Kernels {
    fn drop(&mut self) {
        for module in &self.modules {
            // SAFETY: loaded by `load`, unloaded once.
            unsafe { sys::cuModuleUnload(*module) };
        }
    }
}

fn functions(device: &Device, module: sys::CUmodule) -> Result<Vec<sys::CUfunction>> {
    let mut count = 0;
    // SAFETY: pointer to a local, a loaded module.
    device.check("kernel count", unsafe {
        sys::cuModuleGetFunctionCount(&mut count, module)
    })?;
    let mut functions = vec![std::ptr::null_mut(); count as usize];
    // SAFETY: room for `count` handles.
    device.check("kernel list", unsafe {
        sys::cuModuleEnumerateFunctions(functions.as_mut_ptr(), count, module)
    })?;
    Ok(functions)
}

/// Lets a kernel ask for all of a multiprocessor's shared memory; returns how much of it is dynamic.
fn open_shared_memory(device: &Device, function: sys::CUfunction) -> Result<u32> {
    use sys::CUfunction_attribute_enum as Attribute;
    // SAFETY: a function of a loaded module. Its code is on the device from now on, not from its first launch.
    device.check("loading a kernel", unsafe { sys::cuFuncLoad(function) })?;
    let mut fixed = 0;
    // SAFETY: pointer to a local, a loaded function.
    device.check("kernel attribute", unsafe {
        sys::cuFuncGetAttribute(
            &mut fixed,
            Attribute::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES,
            function,
        )
    })?;
    let dynamic = device.shared_bytes.saturating_sub(fixed as u32);
    // SAFETY: a loaded function.
    device.check("kernel attribute", unsafe {
        sys::cuFuncSetAttribute(
            function,
            Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
            dynamic as i32,
        )
    })?;
    Ok(dynamic)
}
