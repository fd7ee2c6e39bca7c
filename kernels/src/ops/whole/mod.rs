//! One decode token through all layers in one kernel that stays on the device for the whole step.
//!
//! The same formulas as the ops one by one; `one.cu` says how the work is cut and where blocks wait for each other.

pub(crate) mod cuda;
pub(crate) mod fold;
