//! The checkpoint's chat template, run in bounds.
//!
//! Jinja as transformers sets it up: trim_blocks, lstrip_blocks, loop controls, Python's string methods,
//! `raise_exception`, `strftime_now`, and its `tojson`. A template cannot read files or other templates.
//! Fuel bounds steps and memory together (the engine charges for every byte it makes, before it makes it);
//! the clock and the size of the result are checked as output is written. Time is the thread's own processor
//! time, so that a busy machine does not fail a good template.
//!
//! Keeps invariant T2 of ARCHITECTURE.md.

mod engine;
pub(crate) mod shadow;
mod source;
mod value;

use std::{io, path::Path, time::Duration};

use minijinja::{Environment, Value};

use crate::{
    chat::Roles,
    clock::processor_time,
    error::{Result, TextError},
    json::Json,
    tokenizer::TokenizerConfig,
};

pub use source::load_source;

/// Longest template source, in bytes. Sources come from the checkpoint, never from a request.
pub const MAX_SOURCE_BYTES: usize = 256 << 10;
/// Longest rendered prompt, in bytes.
pub const MAX_RESULT_BYTES: usize = 32 << 20;
/// Processor time of one rendering; larger inputs get `TIME_PER_MIB` more.
pub const MAX_TIME: Duration = Duration::from_millis(100);
const TIME_PER_MIB: Duration = Duration::from_millis(50);
/// Steps of one rendering (about 40 ms of them); one step also pays for 64 bytes of data.
pub const BASE_FUEL: u64 = 1_000_000;
/// Each byte of input is copied, searched and printed a few times: about 8/64 of a step.
const INPUT_BYTES_PER_FUEL: u64 = 4;

/// Text that no template has by itself.
const PROBE: &str = "7f3aprobe";

const NAME: &str = "chat_template";
const TOOLS_NAME: &str = "tool_use";

/// A compiled chat template.
pub struct ChatTemplate {
    plain: Variants,
    /// The same with a `tojson` that understands shadowed characters.
    shadowed: Variants,
    source: String,
    /// Whether content lists are iterated; otherwise they are joined before rendering.
    reads_parts: bool,
    roles: Roles,
}

/// Environments differ in fuel only by request, so each is cheap to clone and then set.
struct Variants {
    environment: Environment<'static>,
    has_tools_template: bool,
}

/// What a template is rendered with.
pub(crate) struct Variables<'a> {
    pub messages: &'a [Json],
    /// `None` is null: the request has no tools.
    pub tools: Option<&'a Json>,
    pub add_generation_prompt: bool,
    /// Further variables of the request.
    pub kwargs: &'a [(String, Json)],
}

impl ChatTemplate {
    /// Compiles the checkpoint's template; `None` if it has none.
    pub fn load(directory: &Path, config: &TokenizerConfig) -> Result<Option<Self>> {
        let Some((file, sources)) = load_source(directory, config)? else {
            return Ok(None);
        };
        Self::compile(&sources, config)
            .map(Some)
            .map_err(|reason| TextError::checkpoint(&file, reason))
    }

    /// Compiles a template file that an operator gives instead of the checkpoint's.
    pub fn load_file(file: &Path, config: &TokenizerConfig) -> Result<Self> {
        let source = std::fs::read_to_string(file).map_err(|error| TextError::checkpoint(file, error))?;
        Self::compile(&[("default".to_owned(), source)], config)
            .map_err(|reason| TextError::checkpoint(file, reason))
    }

    /// Compiles named sources: "default" (or the only one), and maybe "tool_use" for requests with tools.
    pub fn compile(
        sources: &[(String, String)],
        config: &TokenizerConfig,
    ) -> std::result::Result<Self, String> {
        let default = sources.iter().find(|(name, _)| name == "default");
        let (_, default) = default
            .or(sources.first().filter(|_| sources.len() == 1))
            .ok_or("no template has the name \"default\"")?;
        let tools = sources
            .iter()
            .find(|(name, _)| name == TOOLS_NAME)
            .map(|(_, source)| source);
        let variants = |shadowed| {
            let mut environment = engine::environment(config, shadowed);
            for (name, source) in [(NAME, Some(default)), (TOOLS_NAME, tools)] {
                let Some(source) = source else { continue };
                if source.len() > MAX_SOURCE_BYTES {
                    return Err(format!("{} bytes; at most {MAX_SOURCE_BYTES}", source.len()));
                }
                environment
                    .add_template_owned(name, source::without_generation_tags(source))
                    .map_err(|error| engine::describe(&error))?;
            }
            Ok(Variants {
                environment,
                has_tools_template: tools.is_some(),
            })
        };
        let mut template = Self {
            plain: variants(false)?,
            shadowed: variants(true)?,
            source: tools.map_or_else(|| default.clone(), |tools| format!("{default}\n{tools}")),
            reads_parts: false,
            roles: Roles {
                developer: true,
                late_system: true,
                any: true,
            },
        };
        template.reads_parts = template.probe_parts();
        template.roles = template.probe_roles();
        Ok(template)
    }

    /// The source text, of all its variants.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// Whether the template iterates over content given as a list of parts.
    pub fn reads_parts(&self) -> bool {
        self.reads_parts
    }

    /// Which messages the template prints.
    pub(crate) fn roles(&self) -> Roles {
        self.roles
    }

    /// Renders a user message given as one text part: a template that prints the text and nothing of the part's
    /// JSON reads parts.
    fn probe_parts(&self) -> bool {
        let rendered = self.probe(&format!(
            r#"[{{"role": "user", "content": [{{"type": "text", "text": "{PROBE}"}}]}}]"#
        ));
        let whole = rendered.contains(PROBE);
        whole && !rendered.contains(&format!("'{PROBE}'")) && !rendered.contains(&format!("\"{PROBE}\""))
    }

    fn probe_roles(&self) -> Roles {
        let user = r#"{"role": "user", "content": "a"}"#;
        let probe = |role: &str| format!(r#"{{"role": "{role}", "content": "{PROBE}"}}"#);
        let prints = |messages: String| self.probe(&messages).contains(PROBE);
        Roles {
            developer: prints(format!("[{}, {user}]", probe("developer"))),
            late_system: prints(format!("[{user}, {}, {user}]", probe("system"))),
            any: prints(format!("[{user}, {}, {user}]", probe("nobody"))),
        }
    }

    /// What these messages are rendered to; nothing if they are refused.
    fn probe(&self, messages: &str) -> String {
        let Ok(Json::Array(messages)) = crate::json::parse(messages) else {
            return String::new();
        };
        let variables = Variables {
            messages: &messages,
            tools: None,
            add_generation_prompt: true,
            kwargs: &[],
        };
        self.render(&variables, false).unwrap_or_default()
    }

    /// Renders within the bounds. `shadowed`: strings carry shadowed characters.
    pub(crate) fn render(&self, variables: &Variables<'_>, shadowed: bool) -> Result<String> {
        let variants = if shadowed { &self.shadowed } else { &self.plain };
        let bytes = variables.messages.iter().map(weight).sum::<usize>()
            + variables.tools.map_or(0, weight)
            + variables
                .kwargs
                .iter()
                .map(|(_, value)| weight(value))
                .sum::<usize>();
        let mut environment = variants.environment.clone();
        environment.set_fuel(Some(BASE_FUEL + bytes as u64 / INPUT_BYTES_PER_FUEL));
        let name = match variables.tools {
            Some(_) if variants.has_tools_template => TOOLS_NAME,
            _ => NAME,
        };
        let template = environment.get_template(name).map_err(template_error)?;
        let mut output = BoundedOutput::new(bytes);
        match template.render_captured_to(context(variables), &mut output) {
            Ok(_) => {}
            Err(_) if output.exceeded.is_some() => {
                let reason = output.exceeded.unwrap_or_default();
                return Err(TextError::request("messages", reason));
            }
            Err(error) => return Err(template_error(error)),
        }
        String::from_utf8(output.bytes)
            .map_err(|_| TextError::request("messages", "the chat template rendered invalid UTF-8"))
    }
}

fn template_error(error: minijinja::Error) -> TextError {
    TextError::request("messages", engine::describe(&error))
}

fn context(variables: &Variables<'_>) -> Value {
    let messages: Value = variables.messages.iter().map(value::to_value).collect();
    let kwargs = variables.kwargs.iter();
    let pairs = kwargs.map(|(name, json)| (Value::from(name.as_str()), value::to_value(json)));
    Value::from_pairs(pairs.chain([
        (Value::from("messages"), messages),
        (
            Value::from("tools"),
            variables.tools.map_or(Value::from(()), value::to_value),
        ),
        (Value::from("documents"), Value::from(())),
        (
            Value::from("add_generation_prompt"),
            Value::from(variables.add_generation_prompt),
        ),
    ]))
}

/// Bytes of text in a value, roughly.
fn weight(json: &Json) -> usize {
    match json {
        Json::Null | Json::Bool(_) => 1,
        Json::Number(digits) => digits.len(),
        Json::String(text) => text.len() + 1,
        Json::Array(items) => items.iter().map(weight).sum::<usize>() + 1,
        Json::Object(object) => {
            object
                .iter()
                .map(|(key, item)| key.len() + weight(item))
                .sum::<usize>()
                + 1
        }
    }
}

/// Collects the result; refuses to grow past the bounds.
struct BoundedOutput {
    bytes: Vec<u8>,
    start: Duration,
    time: Duration,
    exceeded: Option<String>,
}

impl BoundedOutput {
    fn new(input_bytes: usize) -> Self {
        let mebibytes = u32::try_from(input_bytes >> 20).unwrap_or(u32::MAX);
        Self {
            bytes: Vec::new(),
            start: processor_time(),
            time: MAX_TIME.saturating_add(TIME_PER_MIB.saturating_mul(mebibytes)),
            exceeded: None,
        }
    }
}

impl io::Write for BoundedOutput {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_RESULT_BYTES {
            self.exceeded = Some(format!(
                "the chat template renders more than {MAX_RESULT_BYTES} bytes"
            ));
        } else if processor_time().saturating_sub(self.start) > self.time {
            self.exceeded = Some(format!(
                "the chat template takes more than {} ms",
                self.time.as_millis()
            ));
        }
        if self.exceeded.is_some() {
            return Err(io::Error::other("bound exceeded"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests;
