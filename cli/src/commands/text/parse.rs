//! `conclave parse`: a model's raw output on standard input, what a client would get of it on standard output.
//!
//! The output is taken to follow a prompt of this checkpoint's template: where that ends in `<think>`, it begins
//! within the reasoning.

use anyhow::{Context, Result};
use conclave_text::detokenize::Detokenizer;
use conclave_text::json::{self, Json, object};
use conclave_text::output::OutputOptions;
use conclave_text::parse::{End, Pieces, ToolCallDelta};
use conclave_text::{ChatOutput, Text};

use crate::settings::{EndedBy, ParseSettings};

/// Any will do: call ids are not printed.
const CALL_ID_SEED: u64 = 0;

pub fn run(settings: &ParseSettings) -> Result<()> {
    let text = super::load(&settings.text)?;
    let chat = text.render_chat(&super::chat(request(settings)?.as_bytes())?)?;
    let raw = String::from_utf8(super::read_stdin()?).context("standard input is not UTF-8")?;
    let end = match settings.finish_reason {
        EndedBy::Stop => End::Stop,
        EndedBy::Length => End::Cut,
    };
    let ids = text.encode_prompt(&raw, false)?;
    let parsed = if settings.cut_every_byte {
        by_bytes(&text, &chat.output, &ids, end)
    } else {
        by_tokens(&text, &chat.output, &ids, end)?
    };
    println!("{}", parsed.to_json().to_python());
    Ok(())
}

/// The smallest request with these tools.
fn request(settings: &ParseSettings) -> Result<String> {
    let tools = match &settings.tools {
        None => "[]".to_owned(),
        Some(file) => std::fs::read_to_string(file).with_context(|| format!("--tools {}", file.display()))?,
    };
    Ok(format!(
        r#"{{"messages": [{{"role": "user", "content": ""}}], "tools": {tools}}}"#
    ))
}

/// A whole output.
#[derive(Default)]
struct Parsed {
    reasoning: String,
    content: String,
    /// Names and the arguments' JSON text.
    calls: Vec<(String, String)>,
}

impl Parsed {
    fn add(&mut self, reasoning: &str, text: &str, calls: Vec<ToolCallDelta>) {
        self.reasoning += reasoning;
        self.content += text;
        for call in calls {
            if let Some(name) = call.name {
                self.calls.push((name, String::new()));
            }
            if let Some((_, arguments)) = self.calls.last_mut() {
                *arguments += &call.arguments;
            }
        }
    }

    fn to_json(&self) -> Json {
        let call = |(name, arguments): &(String, String)| {
            // What is no whole JSON is shown as it is.
            let arguments = json::parse(arguments).unwrap_or_else(|_| Json::from(arguments.as_str()));
            object([("name", Json::from(name.as_str())), ("arguments", arguments)])
        };
        object([
            ("reasoning", Json::from(self.reasoning.as_str())),
            ("content", Json::from(self.content.as_str())),
            ("tool_calls", Json::Array(self.calls.iter().map(call).collect())),
        ])
    }
}

/// As a server does it: all tokens through the output stage.
fn by_tokens(text: &Text, chat: &ChatOutput, ids: &[u32], end: End) -> Result<Parsed> {
    let options = OutputOptions {
        stop_token_ids: text.eos_token_ids(),
        ..OutputOptions::default()
    };
    let mut output = text.output(options, Some(chat), CALL_ID_SEED)?;
    let mut parsed = Parsed::default();
    for delta in [output.push(ids), output.finish(end)] {
        parsed.add(&delta.reasoning, &delta.text, delta.tool_calls);
    }
    Ok(parsed)
}

/// Byte after byte. Tokens that the format knows as markers stay whole: they are no text in a stream either. Like the
/// decoder of a stream, a character goes on when its last byte is there.
fn by_bytes(text: &Text, chat: &ChatOutput, ids: &[u32], end: End) -> Parsed {
    let mut parsed = Parsed::default();
    let mut parser = text.output_parser(chat, CALL_ID_SEED);
    let mut push = |id: Option<u32>, piece: &str| match &mut parser {
        None => parsed.content += piece,
        Some(parser) => {
            let mut pieces = Pieces::default();
            parser.push(id, piece, &mut pieces);
            parsed.add(&pieces.reasoning, &pieces.text, pieces.tool_calls);
        }
    };
    let tokenizer = text.tokenizer();
    let mut decoder = Detokenizer::new(tokenizer.clone(), true);
    let mut piece = String::new();
    for &id in ids {
        piece.clear();
        decoder.push(id, &mut piece);
        if tokenizer.added_tokens().iter().any(|token| token.id == id) {
            push(Some(id), &piece);
            continue;
        }
        let mut waiting = Vec::new();
        for &byte in piece.as_bytes() {
            waiting.push(byte);
            if let Ok(character) = std::str::from_utf8(&waiting) {
                push(None, character);
                waiting.clear();
            }
        }
    }
    piece.clear();
    decoder.finish(&mut piece);
    push(None, &piece);
    if let Some(parser) = &mut parser {
        let mut pieces = Pieces::default();
        parser.finish(end, &mut pieces);
        parsed.add(&pieces.reasoning, &pieces.text, pieces.tool_calls);
    }
    parsed
}
