//! `conclave generate`: one prompt over gRPC, the answer printed as it comes.
//!
//! The answer goes to standard output, reasoning and figures to standard error, so that the output can be piped.

use std::io::{self, IsTerminal, Read, Write};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use conclave_proto::v1::chat_message::Content;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::{Chat, ChatMessage, Delta, GenerateRequest, SamplingParams, Usage};

use crate::grpc_client::{connect, refused};
use crate::settings::GenerateSettings;

/// Longest prompt read from standard input.
const MAX_STDIN_BYTES: u64 = 16 << 20;

pub async fn run(settings: &GenerateSettings) -> Result<()> {
    let request = request(settings)?;
    let mut client = connect(&settings.router).await?;
    let started = Instant::now();
    let mut stream = client.generate(request).await.map_err(refused)?.into_inner();
    let mut printer = Printer::new(started);
    loop {
        let message = tokio::select! {
            message = stream.message() => message.map_err(refused)?,
            interrupted = tokio::signal::ctrl_c() => {
                // Dropping the stream cancels the request.
                interrupted?;
                eprintln!();
                bail!("interrupted");
            }
        };
        match message.and_then(|message| message.event) {
            None => break,
            Some(Event::Delta(delta)) => printer.delta(&delta)?,
            Some(Event::Finished(finished)) if !finished.error.is_empty() => {
                bail!("{}", finished.error)
            }
            Some(Event::Usage(usage)) => printer.usage(&usage)?,
            Some(Event::KeepAlive(keep_alive)) => {
                tracing::info!(reason = keep_alive.reason, "the cluster is changing")
            }
            Some(Event::Finished(_) | Event::Started(_)) => {}
        }
    }
    Ok(())
}

fn request(settings: &GenerateSettings) -> Result<GenerateRequest> {
    let text = match settings.prompt.as_str() {
        "-" => read_stdin()?,
        prompt => prompt.to_owned(),
    };
    let message = |role: &str, text: String| ChatMessage {
        role: role.into(),
        content: Some(Content::Text(text)),
        ..ChatMessage::default()
    };
    let prompt = if settings.raw {
        Prompt::Text(text)
    } else {
        let system = settings
            .system
            .iter()
            .map(|system| message("system", system.clone()));
        Prompt::Chat(Chat {
            messages: system.chain([message("user", text)]).collect(),
            ..Chat::default()
        })
    };
    let max_tokens = settings.max_tokens.map(i64::try_from).transpose();
    Ok(GenerateRequest {
        model: settings.served_model.clone(),
        prompt: Some(prompt),
        sampling: Some(SamplingParams {
            temperature: settings.temperature,
            top_p: settings.top_p,
            top_k: settings.top_k,
            seed: settings.seed,
            max_tokens: max_tokens.context("--max-tokens is too large")?,
            stop: settings.stop.clone(),
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    })
}

fn read_stdin() -> Result<String> {
    let mut text = String::new();
    let read = io::stdin().take(MAX_STDIN_BYTES + 1).read_to_string(&mut text);
    read.context("the prompt on standard input is not text")?;
    if text.len() as u64 > MAX_STDIN_BYTES {
        bail!("the prompt on standard input is longer than {MAX_STDIN_BYTES} bytes");
    }
    Ok(text)
}

/// Writes pieces as they come and remembers when.
struct Printer {
    started: Instant,
    first: Option<Duration>,
    in_reasoning: bool,
    dim: bool,
}

impl Printer {
    fn new(started: Instant) -> Printer {
        Printer {
            started,
            first: None,
            in_reasoning: false,
            dim: io::stderr().is_terminal(),
        }
    }

    fn delta(&mut self, delta: &Delta) -> io::Result<()> {
        self.first.get_or_insert_with(|| self.started.elapsed());
        let (dim, plain) = if self.dim {
            ("\x1b[2m", "\x1b[0m")
        } else {
            ("", "")
        };
        if !delta.reasoning.is_empty() {
            self.in_reasoning = true;
            eprint!("{dim}{}{plain}", delta.reasoning);
        }
        if !delta.text.is_empty() {
            if std::mem::take(&mut self.in_reasoning) {
                eprintln!();
            }
            let mut out = io::stdout().lock();
            out.write_all(delta.text.as_bytes())?;
            out.flush()?;
        }
        Ok(())
    }

    fn usage(&mut self, usage: &Usage) -> io::Result<()> {
        let mut out = io::stdout().lock();
        out.write_all(b"\n")?;
        out.flush()?;
        let first = self.first.unwrap_or_default();
        let rest = self.started.elapsed().saturating_sub(first).as_secs_f64();
        let later = usage.completion_tokens.saturating_sub(1);
        eprintln!(
            "{} prompt tokens ({} cached), {} generated; first after {:.0} ms, then {:.1} tok/s",
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            first.as_secs_f64() * 1e3,
            if rest > 0.0 { f64::from(later) / rest } else { 0.0 },
        );
        Ok(())
    }
}
