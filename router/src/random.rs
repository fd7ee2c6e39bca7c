//! Random bytes of the operating system: seeds nobody asked for, request ids, the secret of an epoch.

/// `N` random bytes.
pub fn bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    if getrandom::fill(&mut bytes).is_err() {
        // No entropy source at all: secrets would be guessable, so there is nothing sensible to go on with.
        panic!("the operating system gives no random bytes");
    }
    bytes
}

/// A random number.
pub fn u64() -> u64 {
    u64::from_le_bytes(bytes())
}

/// A name for a request that has none.
pub fn request_id() -> String {
    format!("req-{:016x}{:016x}", u64(), u64())
}
