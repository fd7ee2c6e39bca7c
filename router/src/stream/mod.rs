//! From a sequence's tokens to a client's responses: the request's inbox, its choices, and what is not read yet.

mod choice;
mod constrained;
mod queue;
mod request;
mod response;
mod timing;

pub use choice::{Choice, ChoiceText};
pub use constrained::{Constrained, Ends};
pub use request::{Request, RequestSpec};
pub use response::{CancelOnDrop, ResponseStream};
