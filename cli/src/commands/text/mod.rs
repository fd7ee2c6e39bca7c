//! `conclave render` and `conclave parse`: what a server makes of a request, and of a model's output, without one.
//!
//! Requests are read by the gateway's code and rendered and parsed by the router's, so that what is printed here is
//! what would be served.

mod parse;
mod render;

use std::io::{self, Read};

use anyhow::{Context, Result, anyhow, bail};
use conclave_text::Text;
use conclave_text::chat::Chat;
use conclave_text::parse::ParserNames;

use crate::model_path;
use crate::settings::TextSettings;

pub use parse::run as parse;
pub use render::run as render;

/// Longest input on standard input.
const MAX_STDIN_BYTES: u64 = 64 << 20;

fn load(settings: &TextSettings) -> Result<Text> {
    let given = settings.checkpoint.path();
    let parsers = ParserNames {
        reasoning: settings.format.reasoning_parser.clone(),
        tool_calls: settings.format.tool_call_parser.clone(),
    };
    let found = model_path::find_at(given)?;
    Ok(Text::load_with_template(
        &found.path,
        &parsers,
        settings.format.chat_template.as_deref(),
    )?)
}

/// The conversation in a `/v1/chat/completions` body.
fn chat(body: &[u8]) -> Result<Chat> {
    let wire = conclave_gateway::chat_of_request(body).map_err(|problem| anyhow!(problem))?;
    conclave_router::chat_from_wire(wire).map_err(|status| anyhow!("{}", status.message()))
}

fn read_stdin() -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = io::stdin().take(MAX_STDIN_BYTES + 1).read_to_end(&mut bytes);
    read.context("standard input cannot be read")?;
    if bytes.len() as u64 > MAX_STDIN_BYTES {
        bail!("standard input is longer than {MAX_STDIN_BYTES} bytes");
    }
    Ok(bytes)
}
