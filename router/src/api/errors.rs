//! Statuses of the client API. Every one says which field, which value and what to do; details are those of
//! google.rpc, so that the gateway and clients need not read sentences.

use std::collections::HashMap;
use std::fmt::Display;
use std::time::Duration;

use conclave_router_core::api::Rejection;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, FieldViolation, StatusExt};

/// Characters of a client's value that an error repeats.
const MAX_SHOWN: usize = 64;
/// Violations that one answer lists.
const MAX_VIOLATIONS: usize = 16;
/// The domain of `ErrorInfo`.
const DOMAIN: &str = "conclave";

/// What programs look for in a request that is longer than the context.
const TOO_LONG: &str = "CONTEXT_LENGTH_EXCEEDED";

/// Collects everything that is wrong with a request.
#[derive(Default)]
pub struct Violations {
    list: Vec<FieldViolation>,
    too_long: bool,
}

impl Violations {
    /// `field` is the path in the request, `problem` says what is wrong and what to do.
    pub fn add(&mut self, field: impl Into<String>, value: impl Display, problem: impl Display) {
        if self.list.len() < MAX_VIOLATIONS {
            let value = shown(value);
            self.list
                .push(FieldViolation::new(field, format!("{value}: {problem}")));
        }
    }

    /// The request is too long for the model, whatever else is wrong with it.
    pub fn too_long(&mut self) {
        self.too_long = true;
    }

    pub fn finish(self) -> Result<(), Status> {
        let Some(first) = self.list.first() else {
            return Ok(());
        };
        let more = match self.list.len() {
            1 => String::new(),
            n => format!(" (and {} more)", n - 1),
        };
        let message = format!("{} = {}{more}", first.field, first.description);
        let mut details = ErrorDetails::with_bad_request(self.list);
        if self.too_long {
            details.set_error_info(TOO_LONG, DOMAIN, []);
        }
        Err(Status::with_error_details(
            Code::InvalidArgument,
            message,
            details,
        ))
    }
}

/// One wrong field.
pub fn invalid(field: impl Into<String>, value: impl Display, problem: impl Display) -> Status {
    let mut violations = Violations::default();
    violations.add(field, value, problem);
    match violations.finish() {
        Err(status) => status,
        Ok(()) => Status::invalid_argument("the request is not valid"),
    }
}

/// Prompt and answer together are longer than what bounds them.
pub struct TooLong {
    pub prompt: usize,
    /// `max_tokens`, if the client gave it.
    pub asked: Option<u32>,
    pub limit: u64,
    /// Whose limit it is, as the beginning of a sentence.
    pub bound: &'static str,
}

/// The model's own bound.
pub const CONTEXT: &str = "this model's maximum context length is";

/// Its reason and its numbers stand in the details, too: clients shorten a conversation by them.
pub fn too_long(length: &TooLong) -> Status {
    let TooLong {
        prompt,
        asked,
        limit,
        bound,
    } = *length;
    let left = limit.saturating_sub(prompt as u64);
    let (field, message) = if left == 0 {
        let message = format!(
            "prompt = {prompt} tokens: {bound} {limit} tokens, of which at least one must be left for the answer; \
             shorten the prompt"
        );
        ("prompt", message)
    } else {
        let asked = asked.unwrap_or_default();
        let message = format!(
            "sampling.max_tokens = {asked}: {bound} {limit} tokens, of which the prompt has {prompt}: at most {left} are left; \
             ask for fewer or shorten the prompt"
        );
        ("sampling.max_tokens", message)
    };
    let mut numbers = vec![
        ("prompt_tokens", prompt.to_string()),
        ("limit", limit.to_string()),
    ];
    numbers.extend(asked.map(|asked| ("max_tokens", asked.to_string())));
    let numbers = numbers.into_iter().map(|(name, value)| (name.to_owned(), value));
    let violation = FieldViolation::new(field, message.as_str());
    let mut details = ErrorDetails::with_bad_request(vec![violation]);
    details.set_error_info(TOO_LONG, DOMAIN, numbers.collect::<HashMap<_, _>>());
    Status::with_error_details(Code::InvalidArgument, message, details)
}

/// A field about which the text layer has said everything.
pub fn invalid_text(field: &str, problem: &str) -> Status {
    let violation = FieldViolation::new(field, problem);
    Status::with_error_details(
        Code::InvalidArgument,
        format!("{field}: {problem}"),
        ErrorDetails::with_bad_request(vec![violation]),
    )
}

pub fn unknown_model(name: &str, served: &[String]) -> Status {
    let name = shown(name);
    let mut details = ErrorDetails::with_resource_info("model", name.clone(), "", "not served here");
    details.set_error_info("MODEL_NOT_FOUND", DOMAIN, [("model".to_owned(), name.clone())]);
    Status::with_error_details(
        Code::NotFound,
        format!("model = {name}: not served here; use {}", served.join(" or ")),
        details,
    )
}

/// Something is full; try again after a while.
pub fn exhausted(message: impl Into<String>, retry_after: Duration) -> Status {
    let mut details = ErrorDetails::with_retry_info(Some(retry_after));
    details.set_error_info("OVERLOADED", DOMAIN, []);
    Status::with_error_details(Code::ResourceExhausted, message, details)
}

pub fn draining() -> Status {
    let mut details = ErrorDetails::with_retry_info(Some(Duration::from_secs(1)));
    details.set_error_info("DRAINING", DOMAIN, []);
    Status::with_error_details(
        Code::Unavailable,
        "this router is shutting down; send the request to another one or try again later",
        details,
    )
}

/// `prompt`: its tokens.
pub fn rejected(rejection: &Rejection, prompt: usize) -> Status {
    match *rejection {
        Rejection::QueueFull {
            limit,
            retry_after_ms,
        } => exhausted(
            format!("{limit} sequences are waiting, which is all that may (--max-waiting); try again later"),
            Duration::from_millis(retry_after_ms),
        ),
        Rejection::TooLong { tokens, limit } => too_long(&TooLong {
            prompt,
            asked: u32::try_from(tokens.saturating_sub(prompt as u64)).ok(),
            limit,
            bound: "the KV pages of one worker hold",
        }),
        Rejection::Draining => draining(),
    }
}

/// A value as errors repeat it: short, and on one line.
pub fn shown(value: impl Display) -> String {
    let value = value.to_string();
    let mut short: String = value
        .chars()
        .take(MAX_SHOWN)
        .map(|c| if c.is_control() { '\u{fffd}' } else { c })
        .collect();
    if value.chars().nth(MAX_SHOWN).is_some() {
        short.push('…');
    }
    short
}
