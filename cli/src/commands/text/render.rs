//! `conclave render`: a chat request on standard input, its prompt on standard output.

use std::io::{self, Write};

use anyhow::Result;

use crate::settings::RenderSettings;

/// The text comes exactly, with no line break of ours after it; ids come as a JSON list.
pub fn run(settings: &RenderSettings) -> Result<()> {
    let text = super::load(&settings.text)?;
    let rendered = text.render_chat(&super::chat(&super::read_stdin()?)?)?;
    let mut out = io::stdout().lock();
    if settings.tokens {
        writeln!(out, "{}", serde_json::to_string(&rendered.ids)?)?;
    } else {
        out.write_all(rendered.text.as_bytes())?;
    }
    Ok(out.flush()?)
}
