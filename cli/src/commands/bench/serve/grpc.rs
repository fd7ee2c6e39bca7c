//! One Generate call over gRPC.

use std::time::Instant;

use anyhow::{Result, bail};
use conclave_proto::v1::conclave_client::ConclaveClient;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::{GenerateRequest, OutputOptions, SamplingParams, TokenIds};
use tonic::transport::Channel;

use super::{Call, Timing};

pub async fn complete(client: &ConclaveClient<Channel>, call: &Call) -> Result<Timing> {
    let request = GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds {
            ids: call.prompt.clone(),
        })),
        sampling: Some(SamplingParams {
            temperature: Some(0.0),
            max_tokens: Some(i64::from(call.output)),
            ignore_eos: true,
            ..SamplingParams::default()
        }),
        cache_salt: call.cache_salt.clone(),
        output: call.logprobs.map(|logprobs| OutputOptions {
            logprobs: Some(logprobs),
            ..OutputOptions::default()
        }),
        ..GenerateRequest::default()
    };
    let started = Instant::now();
    let mut stream = client.clone().generate(request).await?.into_inner();
    let mut timing = Timing::default();
    let mut last = started;
    while let Some(message) = stream.message().await? {
        match message.event {
            Some(Event::Delta(delta)) => {
                let now = Instant::now();
                if timing.first.is_zero() {
                    timing.first = now - started;
                } else {
                    timing.gaps.push(now - last);
                }
                last = now;
                timing.ids.extend(delta.token_ids);
                for entry in delta.logprobs {
                    let all = entry.sampled.into_iter().chain(entry.top);
                    timing.logprobs.extend(all.map(|one| one.logprob.to_bits()));
                }
                timing.total = now - started;
            }
            Some(Event::Finished(finished)) if !finished.error.is_empty() => {
                bail!("{}", finished.error)
            }
            Some(Event::Usage(usage)) => {
                timing.prompt_tokens = usage.prompt_tokens;
                timing.tokens = usage.completion_tokens;
                timing.cached_tokens = usage.cached_tokens;
            }
            _ => {}
        }
    }
    Ok(timing)
}
