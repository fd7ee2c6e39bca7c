//! libnccl.so.2, opened at run time: the dozen calls that the exchange needs, and what their results mean.
//!
//! cudarc has the same calls, but looks for `libnccl.so`, which only development packages have, and panics without it.
//! Must stay true: a result is an integer until it was looked at: later libraries have codes that this one does not know.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;

use cudarc::driver::sys::CUstream;
use libloading::Library;

use crate::backend::{KernelError, Result};

/// What the dynamic linker is asked for, in this order.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The first with non-blocking communicators that can be aborted at any time, as major, minor, patch.
const OLDEST: Version = Version(2, 18, 0);
/// Bytes of a unique id.
pub const ID_BYTES: usize = 128;

pub(super) const SUCCESS: c_int = 0;
pub(super) const IN_PROGRESS: c_int = 7;
/// `ncclUint8`: everything travels as bytes.
pub(super) const BYTES: c_int = 1;
/// The library's mark for "as you like".
const UNDEFINED: c_int = c_int::MIN;

pub(super) type Comm = *mut c_void;

/// What NCCL takes from the environment alone, unless the user has set it. Memory of CUDA's older allocator: three ranks of a
/// host connect within 0.1 s, with the newer one's in a second.
const ENVIRONMENT: [(&str, &str); 1] = [("NCCL_CUMEM_ENABLE", "0")];

/// Sets [`ENVIRONMENT`].
///
/// # Safety
/// No other thread has been started.
pub unsafe fn set_environment() {
    for (name, value) in ENVIRONMENT {
        if std::env::var_os(name).is_none() {
            // SAFETY: by the caller's word nobody reads or writes it at the same time.
            unsafe { std::env::set_var(name, value) };
        }
    }
}

/// What rank 0 draws and every rank of a communicator is given.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub struct UniqueId(pub [u8; ID_BYTES]);

impl fmt::Debug for UniqueId {
    /// Whoever knows it can join: it stays out of logs.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("UniqueId(..)")
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(u32, u32, u32);

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.0, self.1, self.2)
    }
}

impl Version {
    /// From the library's number: 2.18.3 is 21803, and before 2.9 it was 2803.
    fn from_code(code: c_int) -> Version {
        let code = code.unsigned_abs();
        if code < 10_000 {
            return Version(code / 1000, code / 100 % 10, code % 100);
        }
        Version(code / 10_000, code / 100 % 100, code % 100)
    }

    fn code(self) -> c_uint {
        self.0 * 10_000 + self.1 * 100 + self.2
    }
}

/// `ncclConfig_t` as 2.18 had it: later ones only append, and read as much as `size` says.
#[repr(C)]
pub(super) struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
}

impl Config {
    pub(super) fn new(blocking: bool) -> Config {
        Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST.code(),
            blocking: c_int::from(blocking),
            cga_cluster_size: UNDEFINED,
            min_ctas: UNDEFINED,
            max_ctas: UNDEFINED,
            net_name: std::ptr::null(),
            split_share: UNDEFINED,
        }
    }
}

/// The library's calls. Every one is as `nccl.h` declares it.
pub struct Nccl {
    pub version: Version,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    pub(super) init: unsafe extern "C" fn(*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int,
    pub(super) abort: unsafe extern "C" fn(Comm) -> c_int,
    pub(super) async_error: unsafe extern "C" fn(Comm, *mut c_int) -> c_int,
    pub(super) group_start: unsafe extern "C" fn() -> c_int,
    pub(super) group_end: unsafe extern "C" fn() -> c_int,
    pub(super) send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    pub(super) recv: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Comm, CUstream) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    last_error: unsafe extern "C" fn(Comm) -> *const c_char,
    /// Keeps the code above mapped.
    _library: Library,
}

impl Nccl {
    /// The library, opened once for the process. `Unsupported` says what is missing.
    pub fn open() -> Result<&'static Nccl> {
        static OPENED: OnceLock<std::result::Result<Nccl, String>> = OnceLock::new();
        OPENED
            .get_or_init(Nccl::load)
            .as_ref()
            .map_err(|problem| KernelError::Unsupported(problem.clone()))
    }

    fn load() -> std::result::Result<Nccl, String> {
        let mut problems = Vec::new();
        let opened = NAMES.iter().find_map(|name| {
            // SAFETY: NCCL's initialisers only set up its own state.
            let library = unsafe { Library::new(*name) };
            library.map_err(|error| problems.push(reason(&error))).ok()
        });
        let library = opened.ok_or_else(|| {
            format!(
                "no NCCL: {}; install NCCL {OLDEST} or newer, or name its folder in LD_LIBRARY_PATH, or choose --transport ipc or tcp",
                problems.join("; ")
            )
        })?;
        let missing = |error: libloading::Error| {
            format!("this NCCL cannot be used: {error}; {OLDEST} or newer is needed")
        };
        let mut code = 0;
        // SAFETY: the types are those of `nccl.h`, the same in every version that has the name; the pointers live as
        // long as `_library`, which is never closed.
        let nccl = unsafe {
            let version = *library
                .get::<unsafe extern "C" fn(*mut c_int) -> c_int>("ncclGetVersion")
                .map_err(missing)?;
            let answer = version(&mut code);
            if answer != SUCCESS {
                return Err(format!("this NCCL does not say its version: error {answer}"));
            }
            Nccl {
                version: Version::from_code(code),
                get_unique_id: *library.get("ncclGetUniqueId").map_err(missing)?,
                init: *library.get("ncclCommInitRankConfig").map_err(missing)?,
                abort: *library.get("ncclCommAbort").map_err(missing)?,
                async_error: *library.get("ncclCommGetAsyncError").map_err(missing)?,
                group_start: *library.get("ncclGroupStart").map_err(missing)?,
                group_end: *library.get("ncclGroupEnd").map_err(missing)?,
                send: *library.get("ncclSend").map_err(missing)?,
                recv: *library.get("ncclRecv").map_err(missing)?,
                error_string: *library.get("ncclGetErrorString").map_err(missing)?,
                last_error: *library.get("ncclGetLastError").map_err(missing)?,
                _library: library,
            }
        };
        if nccl.version < OLDEST {
            return Err(format!(
                "this NCCL is {}; {OLDEST} or newer is needed",
                nccl.version
            ));
        }
        Ok(nccl)
    }

    /// A new communicator's id; the process that draws it must live until all ranks have joined.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; ID_BYTES]);
        // SAFETY: pointer to a local of the size that the library fills.
        let code = unsafe { (self.get_unique_id)(&mut id) };
        self.check("unique id", code)?;
        Ok(id)
    }

    pub(super) fn check(&self, what: &str, code: c_int) -> Result<()> {
        match code {
            SUCCESS => Ok(()),
            code => Err(self.error(what, code)),
        }
    }

    pub(super) fn error(&self, what: &str, code: c_int) -> KernelError {
        // SAFETY: both give strings that live as long as the library, or null.
        let (name, detail) = unsafe {
            (
                text((self.error_string)(code)),
                text((self.last_error)(std::ptr::null_mut())),
            )
        };
        let detail = if detail.is_empty() {
            String::new()
        } else {
            format!(": {detail}")
        };
        KernelError::Device {
            device: format!("nccl {}", self.version),
            what: format!("{what}: {name} ({code}){detail}"),
        }
    }
}

/// What the dynamic linker says; its own error only says that it failed.
fn reason(error: &libloading::Error) -> String {
    std::error::Error::source(error).map_or_else(|| error.to_string(), ToString::to_string)
}

/// # Safety
/// Null, or a string that ends.
unsafe fn text(pointer: *const c_char) -> String {
    if pointer.is_null() {
        return String::new();
    }
    // SAFETY: by the caller's word.
    unsafe { CStr::from_ptr(pointer) }
        .to_string_lossy()
        .trim()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_the_library_writes_them() {
        assert_eq!(Version::from_code(22_809).to_string(), "2.28.9");
        assert_eq!(Version::from_code(2_804).to_string(), "2.8.4");
        assert_eq!(OLDEST.code(), 21_800);
        assert!(Version::from_code(21_703) < OLDEST && Version::from_code(22_100) > OLDEST);
    }

    /// Runs wherever the tests do: with the library this is its version, without it the error says what to do.
    #[test]
    fn a_missing_library_says_so() {
        match Nccl::open() {
            Ok(nccl) => assert!(nccl.version >= OLDEST),
            Err(error) => assert!(error.to_string().contains("LD_LIBRARY_PATH"), "{error}"),
        }
    }
}
