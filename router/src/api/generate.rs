//! Generate: check, tokenize, submit, stream.

use std::hash::{BuildHasher, RandomState};
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use conclave_plan::random;
use conclave_proto::v1 as pb;
use conclave_router_core::api::{Sampling, SequenceId, Submit};
use tokio::sync::oneshot;
use tokio::time::timeout;
use tonic::{Request, Status};
use tracing::Instrument;

use super::errors::TooLong;
use super::prompt::{self, Prompt};
use super::validate::{self, Checked};
use super::{Context, errors};
use crate::sequencer::Submission;
use crate::stream::{CancelOnDrop, Choice, Constrained, Ends, RequestSpec, ResponseStream};

/// How long a request waits for the sequencer to look at it, which takes microseconds unless it is flooded.
const SUBMIT_TIMEOUT: Duration = Duration::from_secs(1);
/// When to try again after such a flood.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// Serves one call up to the point where its responses stream.
pub async fn generate(
    context: &Arc<Context>,
    request: Request<pb::GenerateRequest>,
) -> Result<ResponseStream, Status> {
    let arrived = Instant::now();
    if context.sequencer.view.borrow().draining {
        return Err(errors::draining());
    }
    let span = crate::trace::request_span(request.metadata());
    let checked = validate::check(request.into_inner(), &context.model)?;
    span.record("request_id", &checked.request_id);
    run(context, checked, arrived, span.clone())
        .instrument(span)
        .await
}

async fn run(
    context: &Arc<Context>,
    mut checked: Checked,
    arrived: Instant,
    span: tracing::Span,
) -> Result<ResponseStream, Status> {
    if context.log_prompts {
        tracing::info!(prompt = %checked.prompt, "prompt");
    }
    let salt = salt(&checked.cache_salt);
    let prompt = prompt::prepare(context, &mut checked, salt).await?;
    let max_new_tokens = room(context, &checked, prompt.tokens.len())?;
    context.metrics.request_n.observe(checked.n.into());
    context.metrics.request_max_tokens.observe(max_new_tokens.into());
    let prompt_tokens = prompt.tokens.len();
    let (guard, submission, admitted) =
        submission(context, checked, prompt, max_new_tokens, salt, arrived, span)?;
    // `admitted` is dropped before `guard` if the client goes away meanwhile: the sequencer either has not seen the
    // submission, and finds it abandoned, or has, and learns of the end.
    let admitted = admitted;
    let submissions = &context.sequencer.submissions;
    match timeout(SUBMIT_TIMEOUT, submissions.send(submission)).await {
        Ok(Ok(())) => {}
        Ok(Err(_)) => return Err(errors::draining()),
        Err(_) => {
            let message = format!("the sequencer took no request for {SUBMIT_TIMEOUT:?}; try again later");
            return Err(errors::exhausted(message, RETRY_AFTER));
        }
    }
    match admitted.await {
        Ok(Ok(())) => Ok(ResponseStream::new(
            guard,
            context.sequencer.view.clone(),
            context.keep_alive_interval,
        )),
        Ok(Err(rejection)) => {
            guard.withdraw();
            Err(errors::rejected(&rejection, prompt_tokens))
        }
        Err(_) => Err(errors::draining()),
    }
}

/// How many tokens may be generated: as asked for, and within the model's length.
fn room(context: &Context, checked: &Checked, prompt: usize) -> Result<u32, Status> {
    let longest = context.model.max_model_len;
    let left = u32::try_from(prompt)
        .ok()
        .and_then(|prompt| longest.checked_sub(prompt));
    let too_long = || {
        Err(errors::too_long(&TooLong {
            prompt,
            asked: checked.max_tokens,
            limit: longest.into(),
            bound: errors::CONTEXT,
        }))
    };
    let Some(left) = left.filter(|&left| left > 0) else {
        return too_long();
    };
    match checked.max_tokens {
        Some(asked) if asked > left => too_long(),
        Some(asked) => Ok(asked),
        None => {
            let default = context.model.defaults.max_new_tokens.unwrap_or(left).min(left);
            // No more than the workers can hold, where the client did not say how much it wants.
            let held = context.sequencer.view.borrow().longest_sequence;
            let fits = held.map_or(u64::MAX, |held| held.saturating_sub(prompt as u64));
            Ok(default.min(u32::try_from(fits).unwrap_or(u32::MAX)).max(1))
        }
    }
}

type Admission = oneshot::Receiver<Result<(), conclave_router_core::api::Rejection>>;

fn submission(
    context: &Arc<Context>,
    checked: Checked,
    prompt: Prompt,
    max_new_tokens: u32,
    salt: u64,
    arrived: Instant,
    span: tracing::Span,
) -> Result<(CancelOnDrop, Submission, Admission), Status> {
    let texts = prompt.choice_texts(context, &checked)?;
    let stop_tokens: Arc<[u32]> = checked.stop_tokens.into();
    let eos: Arc<[u32]> = context.model.eos.as_slice().into();
    let mut sequences = Vec::new();
    let mut permits = Vec::new();
    let mut choices = Vec::new();
    let length = u32::try_from(prompt.tokens.len()).unwrap_or(u32::MAX);
    let masked = prompt.grammar.is_some();
    for (index, text) in (0..).zip(texts) {
        let id = SequenceId(context.next_sequence.fetch_add(1, Ordering::Relaxed));
        let permit = context.sequencer.ends.clone().try_reserve_owned().map_err(|_| {
            errors::exhausted(
                "all sequences that may be alive at once are; try again later",
                RETRY_AFTER,
            )
        })?;
        permits.push((id, permit));
        let (constrained, first_mask) = prompt
            .grammar
            .as_ref()
            .map(|(grammar, mask)| {
                let ends = Ends {
                    stop_tokens: stop_tokens.clone(),
                    earliest: length.saturating_add(checked.min_tokens),
                    length: length.saturating_add(max_new_tokens),
                };
                let mask = ends.put_off(mask.clone(), length);
                let masks = context.sequencer.masks.clone();
                (Constrained::new(grammar, id, length, ends, masks), mask)
            })
            .unzip();
        choices.push(Choice::new(index, text, constrained, eos.clone()));
        sequences.push(Submit {
            id,
            prompt: prompt.tokens.clone(),
            sampling: Arc::new(Sampling {
                seed: choice_seed(checked.seed, index),
                bad_words: prompt.bad_words.clone(),
                ..checked.sampling.clone()
            }),
            max_new_tokens,
            stop_tokens: stop_tokens.clone(),
            // Where there are masks, they know when a stop token may come.
            min_new_tokens: match masked {
                true => 0,
                false => checked.min_tokens.min(max_new_tokens),
            },
            priority: checked.priority,
            cache_salt: salt,
            // One choice's are enough: the prompt is the same.
            prompt_logprobs: checked.output.prompt_logprobs.filter(|_| index == 0),
            masked,
            first_mask,
            generated: Vec::new(),
        });
    }
    let trace_parent = crate::trace::parent_of_steps(&span);
    let spec = RequestSpec {
        request_id: checked.request_id,
        model: context.model.name().to_owned(),
        prompt: prompt.tokens,
        offsets: prompt.offsets,
        prompt_logprobs: checked.output.prompt_logprobs.is_some(),
        arrived,
        span,
    };
    let request = crate::stream::Request::new(
        spec,
        choices,
        permits,
        context.pool.clone(),
        context.metrics.clone(),
    );
    let (reply, admitted) = oneshot::channel();
    let submission = Submission {
        sequences,
        sink: request.clone(),
        trace_parent,
        reply,
    };
    Ok((CancelOnDrop::new(request), submission, admitted))
}

/// Choices differ, and the same seed gives the same choices.
pub fn choice_seed(seed: u64, choice: u32) -> u64 {
    random::next(&mut seed.wrapping_add(u64::from(choice).wrapping_mul(random::STEP)))
}

/// Salts as the core knows them. Keyed by this process, so that no client can find two salts of one number.
fn salt(salt: &str) -> u64 {
    static KEYS: LazyLock<RandomState> = LazyLock::new(RandomState::new);
    if salt.is_empty() {
        return 0;
    }
    KEYS.hash_one(salt)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_of_choices_differ_and_are_repeatable() {
        let seeds: std::collections::HashSet<u64> = (0..4)
            .flat_map(|seed| (0..128).map(move |i| choice_seed(seed, i)))
            .collect();
        assert_eq!(seeds.len(), 4 * 128);
        assert_eq!(choice_seed(7, 3), choice_seed(7, 3));
    }

    #[test]
    fn salts_tell_tenants_apart() {
        assert_eq!(salt(""), 0);
        assert_eq!(salt("a"), salt("a"));
        assert_ne!(salt("a"), salt("b"));
    }
}
