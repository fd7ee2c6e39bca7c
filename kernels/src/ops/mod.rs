//! One folder per op: formula and shapes, CPU code, tests.

pub(crate) mod attention;
pub(crate) mod combine;
pub(crate) mod embed;
pub(crate) mod experts;
pub(crate) mod head;
pub(crate) mod linear;
pub(crate) mod qkv;
pub(crate) mod quantise;
pub(crate) mod rmsnorm;
pub(crate) mod route;
pub(crate) mod sample;
#[cfg(feature = "cuda")]
pub(crate) mod whole;
