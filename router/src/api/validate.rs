//! A Generate request, checked field by field against the table in `limits`. Nothing here tokenizes or allocates
//! in proportion to anything but the request itself.
//!
//! Must stay true: what leaves here as [`Checked`] cannot make a worker or the core fail.
//!
//! Keeps invariant B2 of ARCHITECTURE.md.

mod sampling;

use std::fmt::{self, Display};

use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::structured_output::Kind;
use conclave_proto::v1::{Chat, GenerateRequest, OutputOptions, SamplingParams, StructuredOutput};
use conclave_router_core::api::Sampling;
use tonic::Status;

use super::errors::{Violations, unknown_model};
use super::limits::*;
use crate::model::Model;
use conclave_text::grammar::Constraint;
use conclave_text::stop::{MAX_STOP_STRING_BYTES, MAX_STOP_STRINGS};
use sampling::{lengths, sampling, stop_tokens, strings};

/// A request whose fields are all within their ranges. Lengths in tokens are checked when they are known.
pub struct Checked {
    pub request_id: String,
    pub prompt: Input,
    pub n: u32,
    pub seed: u64,
    /// Without seed and bad words, which are filled in per choice and by the text pool.
    pub sampling: Sampling,
    pub bad_words: Vec<String>,
    /// As asked for, and at least 1; the model's length limits it further.
    pub max_tokens: Option<u32>,
    pub min_tokens: u32,
    pub stop: Vec<String>,
    /// Tokens that end a sequence: eos unless ignored, then the client's.
    pub stop_tokens: Vec<u32>,
    pub priority: i32,
    pub cache_salt: String,
    /// Keep only so many of the prompt's last tokens.
    pub truncate: Option<u32>,
    pub output: OutputSpec,
    /// The form that the output is held to.
    pub structured: Option<Constraint>,
}

/// What the prompt is given as.
pub enum Input {
    Text { text: String, add_special_tokens: bool },
    Ids(Vec<u32>),
    Chat(Chat),
}

/// As `--log-prompts` writes it.
impl Display for Input {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Input::Text { text, .. } => write!(f, "{text:?}"),
            Input::Ids(ids) => write!(f, "{ids:?}"),
            Input::Chat(chat) => write!(f, "{:?}", chat.messages),
        }
    }
}

/// What the client wants to see.
#[derive(Clone, Debug)]
pub struct OutputSpec {
    pub logprobs: Option<u32>,
    pub prompt_logprobs: Option<u32>,
    pub echo: bool,
    /// The prompt is scored and echoed, and nothing after it is shown: the one token that is computed stays here.
    pub echo_alone: bool,
    pub skip_special_tokens: bool,
    pub include_stop: bool,
    /// False: token ids only.
    pub text: bool,
}

/// Checks a request; lists everything that is wrong with it.
pub fn check(request: GenerateRequest, model: &Model) -> Result<Checked, Status> {
    let has_tokenizer = model.text.is_some();
    if !model.serves(&request.model) {
        return Err(unknown_model(&request.model, &model.names));
    }
    let mut v = Violations::default();
    let id_is_plain = request.request_id.bytes().all(|b| b.is_ascii_graphic());
    if request.request_id.len() > MAX_REQUEST_ID_BYTES || !id_is_plain {
        let problem = format!("must be printable ASCII of at most {MAX_REQUEST_ID_BYTES} bytes");
        v.add("request_id", &request.request_id, problem);
    }
    if request.n > MAX_N {
        v.add("n", request.n, format!("must be between 1 and {MAX_N}"));
    }
    if request.cache_salt.len() > MAX_SALT_BYTES {
        let problem = format!("must have at most {MAX_SALT_BYTES} bytes");
        v.add("cache_salt", &request.cache_salt, problem);
    }
    let truncate = truncation(&mut v, request.truncate_prompt_tokens, model);
    let is_chat = matches!(request.prompt, Some(Prompt::Chat(_)));
    let mut output = output(&mut v, request.output.unwrap_or_default(), has_tokenizer);
    if output.echo && (is_chat || !output.text) {
        v.add(
            "output.echo",
            true,
            "needs a prompt of text or ids, and text output; leave it out",
        );
    }
    let params = request.sampling.unwrap_or_default();
    let mut sampling = sampling(&mut v, &params, model);
    sampling.logprobs = output.logprobs;
    let lengths = lengths(&mut v, &params, output.echo, model);
    output.echo_alone = lengths.0 == Some(0);
    let stop_tokens = stop_tokens(&mut v, &params, model);
    strings(
        &mut v,
        "sampling.stop",
        &params.stop,
        MAX_STOP_STRINGS,
        MAX_STOP_STRING_BYTES,
    );
    strings(
        &mut v,
        "sampling.bad_words",
        &params.bad_words,
        MAX_BAD_WORDS,
        MAX_BAD_WORD_BYTES,
    );
    let structured = request.structured.and_then(constraint);
    text_alone(&mut v, &params, &output, structured.is_some(), has_tokenizer);
    let prompt = input(
        &mut v,
        request.prompt,
        request.add_special_tokens,
        model,
        has_tokenizer,
    );
    v.finish()?;
    let Some(prompt) = prompt else {
        return Err(super::errors::invalid(
            "prompt",
            "unset",
            "give text, token_ids or chat",
        ));
    };
    Ok(Checked {
        request_id: if request.request_id.is_empty() {
            crate::random::request_id()
        } else {
            request.request_id
        },
        prompt,
        n: request.n.max(1),
        seed: params.seed.unwrap_or_else(crate::random::u64),
        sampling,
        bad_words: params.bad_words,
        max_tokens: lengths.0.map(|asked| asked.max(1)),
        min_tokens: lengths.1,
        stop: params.stop,
        stop_tokens,
        priority: request.priority,
        cache_salt: request.cache_salt,
        truncate,
        output,
        structured,
    })
}

/// Refuses what only text can do where there is none.
fn text_alone(
    v: &mut Violations,
    params: &SamplingParams,
    output: &OutputSpec,
    is_structured: bool,
    has_tokenizer: bool,
) {
    if let Some(first) = params.stop.first().filter(|_| !output.text) {
        v.add(
            "sampling.stop",
            first,
            needs_text(has_tokenizer, "use stop_token_ids"),
        );
    }
    if let Some(first) = params.bad_words.first().filter(|_| !has_tokenizer) {
        v.add("sampling.bad_words", first, needs_text(false, "use logit_bias"));
    }
    if is_structured && !has_tokenizer {
        v.add("structured", "set", needs_text(false, "leave it out"));
    }
}

/// The text layer checks what is in it.
fn constraint(structured: StructuredOutput) -> Option<Constraint> {
    Some(match structured.kind? {
        Kind::JsonSchema(schema) => Constraint::JsonSchema(schema),
        Kind::JsonObject(true) => Constraint::JsonObject,
        Kind::JsonObject(false) => return None,
        Kind::Regex(regex) => Constraint::Regex(regex),
        Kind::Choice(choices) => Constraint::Choice(choices.values),
        Kind::Grammar(grammar) => Constraint::Grammar(grammar),
    })
}

fn needs_text(has_tokenizer: bool, instead: &str) -> String {
    let why = if has_tokenizer {
        "needs text, but skip_detokenize is set"
    } else {
        "needs a tokenizer, and this router runs without one (--skip-tokenizer-init)"
    };
    format!("{why}; {instead}")
}

fn input(
    v: &mut Violations,
    prompt: Option<Prompt>,
    add_special_tokens: Option<bool>,
    model: &Model,
    has_tokenizer: bool,
) -> Option<Input> {
    let kind = |v: &mut Violations, field: &str| {
        if !has_tokenizer {
            v.add(field, "text", needs_text(false, "give token ids"));
        }
    };
    match prompt {
        None => {
            v.add("prompt", "unset", "give text, token_ids or chat");
            None
        }
        Some(Prompt::Text(text)) => {
            kind(v, "prompt");
            if text.is_empty() {
                v.add("prompt", "\"\"", "empty; give at least one character");
            }
            if let Some(longest) = longest_prompt_bytes(model).filter(|&longest| text.len() > longest) {
                let problem = format!(
                    "more than the model's length of {} tokens can hold, which is at most {longest} bytes",
                    model.max_model_len
                );
                v.add("prompt", format_args!("{} bytes", text.len()), problem);
                v.too_long();
            }
            Some(Input::Text {
                text,
                add_special_tokens: add_special_tokens.unwrap_or(true),
            })
        }
        Some(Prompt::TokenIds(ids)) => {
            check_ids(v, "prompt", &ids.ids, model);
            Some(Input::Ids(ids.ids))
        }
        Some(Prompt::Chat(chat)) => {
            kind(v, "chat");
            if chat.messages.is_empty() {
                v.add("chat.messages", "[]", "empty; give at least one message");
            }
            Some(Input::Chat(chat))
        }
    }
}

fn longest_prompt_bytes(model: &Model) -> Option<usize> {
    model.text.as_ref()?.longest_prompt_bytes
}

/// Token ids of a client, as a prompt or to be decoded.
pub fn check_ids(v: &mut Violations, field: &str, ids: &[u32], model: &Model) {
    if ids.is_empty() {
        v.add(field, "[]", "empty; give at least one token id");
    }
    if let Some((i, id)) = (0..).zip(ids).find(|&(_, &id): &(usize, _)| id >= model.vocab) {
        let problem = format!("token id out of range; the vocabulary has {} tokens", model.vocab);
        v.add(format!("{field}[{i}]"), id, problem);
    }
}

fn truncation(v: &mut Violations, asked: Option<i64>, model: &Model) -> Option<u32> {
    match asked {
        None => None,
        Some(-1) => Some(model.max_model_len.saturating_sub(1)),
        Some(n) => {
            let kept = u32::try_from(n)
                .ok()
                .filter(|&n| n >= 1 && n < model.max_model_len);
            if kept.is_none() {
                let problem = format!("must be -1, or between 1 and {}", model.max_model_len - 1);
                v.add("truncate_prompt_tokens", n, problem);
            }
            kept
        }
    }
}

fn output(v: &mut Violations, output: OutputOptions, has_tokenizer: bool) -> OutputSpec {
    let counts = [
        ("output.logprobs", output.logprobs),
        ("output.prompt_logprobs", output.prompt_logprobs),
    ];
    for (field, count) in counts {
        if let Some(count) = count.filter(|&count| count > MAX_LOGPROBS) {
            v.add(field, count, format!("must be between 0 and {MAX_LOGPROBS}"));
        }
    }
    OutputSpec {
        logprobs: output.logprobs,
        prompt_logprobs: output.prompt_logprobs,
        echo: output.echo,
        echo_alone: false,
        skip_special_tokens: output.skip_special_tokens.unwrap_or(true),
        include_stop: output.include_stop_str_in_output,
        text: has_tokenizer && !output.skip_detokenize,
    }
}
