//! `--scenario text`: what text costs beside prefill, from short prompts to long ones. Chats of words, one at a time:
//! template and tokenizer alone, then time to first token and the share of it that was prefill.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use conclave_proto::v1::conclave_client::ConclaveClient;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::tokenize_request::Input;
use conclave_proto::v1::{
    Chat, ChatMessage, GenerateRequest, MetricsRequest, SamplingParams, TokenizeRequest,
    chat_message::Content,
};
use tonic::transport::Channel;

use super::cluster::Target;
use crate::settings::BenchSettings;

type Client = ConclaveClient<Channel>;

const PREFILL_SUM: &str = "vllm:request_prefill_time_seconds_sum";
const WORDS: [&str; 16] = [
    "the", "function", "returns", "a", "list", "of", "tokens", "and", "reads", "its", "input", "from",
    "this", "file", "before", "it",
];

pub async fn run(settings: &BenchSettings) -> Result<()> {
    let target = Target::reach(settings).await?;
    let mut client = target.grpc().await?;
    // Before anything is measured: the caches of both sides, and how many tokens a word has.
    let sample = 1000;
    let (tokens, _) = tokenize(&mut client, chat(sample, 0)).await?;
    let per_word = f64::from(tokens) / sample as f64;
    generate(&mut client, chat(64, 0)).await?;
    println!(
        "{:>8}{:>16}{:>16}{:>12}{:>16}{:>16}",
        "tokens", "text first ms", "text again ms", "TTFT ms", "prefill ms", "TTFT/prefill"
    );
    for (seed, &length) in settings.batch.iter().enumerate() {
        let words = (length as f64 / per_word) as usize;
        let prompt = |salt: usize| chat(words, seed * 4 + salt + 1);
        let (tokens, first) = tokenize(&mut client, prompt(0)).await?;
        let (_, again) = tokenize(&mut client, prompt(0)).await?;
        let before = prefill_seconds(&mut client).await?;
        let whole = generate(&mut client, prompt(1)).await?;
        let prefill = prefill_seconds(&mut client).await? - before;
        println!(
            "{tokens:>8}{:>16.2}{:>16.2}{:>12.1}{:>16.1}{:>16.3}",
            first * 1e3,
            again * 1e3,
            whole * 1e3,
            prefill * 1e3,
            whole / prefill
        );
    }
    target.end().await
}

/// A system prompt and a question of so many words, drawn by the seed.
fn chat(words: usize, seed: usize) -> Chat {
    let mut state = seed as u64;
    let mut word = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        WORDS[(state >> 60) as usize]
    };
    let text: Vec<&str> = (0..words).map(|_| word()).collect();
    let message = |role: &str, text: &str| ChatMessage {
        role: role.to_owned(),
        content: Some(Content::Text(text.to_owned())),
        ..ChatMessage::default()
    };
    Chat {
        messages: vec![message("user", &text.join(" "))],
        ..Chat::default()
    }
}

/// Tokens, and the seconds that the call took.
async fn tokenize(client: &mut Client, chat: Chat) -> Result<(u32, f64)> {
    let request = TokenizeRequest {
        input: Some(Input::Chat(chat)),
        ..TokenizeRequest::default()
    };
    let began = Instant::now();
    let answer = client.tokenize(request).await.context("tokenize")?.into_inner();
    Ok((
        u32::try_from(answer.token_ids.len())?,
        began.elapsed().as_secs_f64(),
    ))
}

/// Seconds to the first token of one.
async fn generate(client: &mut Client, chat: Chat) -> Result<f64> {
    let request = GenerateRequest {
        prompt: Some(Prompt::Chat(chat)),
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(1),
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        ..GenerateRequest::default()
    };
    let began = Instant::now();
    let mut stream = client.generate(request).await.context("generate")?.into_inner();
    let mut first = None;
    while let Some(message) = stream.message().await? {
        if matches!(message.event, Some(Event::Delta(_))) {
            first.get_or_insert_with(|| began.elapsed().as_secs_f64());
        }
    }
    first.context("no token came")
}

/// As the router counts it, of all requests so far.
async fn prefill_seconds(client: &mut Client) -> Result<f64> {
    let text = client.metrics(MetricsRequest {}).await?.into_inner().text;
    let value = text
        .lines()
        .find(|line| line.starts_with(PREFILL_SUM))
        .and_then(|line| line.rsplit(' ').next()?.parse().ok());
    match value {
        Some(value) => Ok(value),
        None => bail!("the router does not tell {PREFILL_SUM}"),
    }
}
