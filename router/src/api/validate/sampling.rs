//! Sampling parameters, each within its range.

use std::fmt::Display;

use conclave_proto::v1::SamplingParams;
use conclave_router_core::api::Sampling;

use super::super::errors::Violations;
use super::super::limits::*;
use crate::model::Model;

pub(super) fn sampling(v: &mut Violations, params: &SamplingParams, model: &Model) -> Sampling {
    let defaults = &model.defaults;
    let repetition = params
        .repetition_penalty
        .or(defaults.repetition_penalty)
        .unwrap_or(1.0);
    let top_p = params.top_p.or(defaults.top_p).unwrap_or(1.0);
    let top_k = params
        .top_k
        .map_or(i64::from(defaults.top_k.unwrap_or(0)), i64::from);
    // NaN is in no range. What is too small for a normal number is nothing to divide by: workers take it for 0.
    if !(f32::MIN_POSITIVE..=1.0).contains(&top_p) {
        v.add("sampling.top_p", top_p, "must be above 0 and at most 1");
    }
    if !(MIN_REPETITION_PENALTY..=MAX_REPETITION_PENALTY).contains(&repetition) {
        let problem =
            format!("must be between {MIN_REPETITION_PENALTY} and {MAX_REPETITION_PENALTY}; 1 is neutral");
        v.add("sampling.repetition_penalty", repetition, problem);
    }
    if top_k < -1 {
        v.add(
            "sampling.top_k",
            top_k,
            "must be 0 or -1 for all tokens, or a positive number",
        );
    }
    Sampling {
        temperature: within(
            v,
            "sampling.temperature",
            params.temperature.or(defaults.temperature).unwrap_or(1.0),
            0.0,
            MAX_TEMPERATURE,
        ),
        top_k: u32::try_from(top_k).unwrap_or(0),
        top_p,
        min_p: within(
            v,
            "sampling.min_p",
            params.min_p.or(defaults.min_p).unwrap_or(0.0),
            0.0,
            1.0,
        ),
        repetition_penalty: repetition,
        presence_penalty: within(
            v,
            "sampling.presence_penalty",
            params.presence_penalty.unwrap_or(0.0),
            -MAX_PENALTY,
            MAX_PENALTY,
        ),
        frequency_penalty: within(
            v,
            "sampling.frequency_penalty",
            params.frequency_penalty.unwrap_or(0.0),
            -MAX_PENALTY,
            MAX_PENALTY,
        ),
        logit_bias: logit_bias(v, params, model),
        ..Sampling::default()
    }
}

fn logit_bias(v: &mut Violations, params: &SamplingParams, model: &Model) -> Vec<(u32, f32)> {
    let mut entries: Vec<(u32, f32)> = params.logit_bias.iter().map(|(&id, &bias)| (id, bias)).collect();
    // The map of the wire has no order; the same request must give the same message.
    entries.sort_unstable_by_key(|&(id, _)| id);
    if entries.len() > MAX_LOGIT_BIAS {
        too_many(v, "sampling.logit_bias", entries.len(), MAX_LOGIT_BIAS);
        return Vec::new();
    }
    for &(id, bias) in &entries {
        if id >= model.vocab {
            let problem = format!("token id out of range; the vocabulary has {} tokens", model.vocab);
            v.add("sampling.logit_bias", id, problem);
        }
        within(
            v,
            &format!("sampling.logit_bias[{id}]"),
            bias,
            -MAX_BIAS,
            MAX_BIAS,
        );
    }
    entries
}

/// `max_tokens` and `min_tokens`. What is more than the model's length is refused together with the prompt's tokens,
/// once they are known: clients take from that answer how much is left. No token at all may be asked for beside an echo
/// of the prompt.
pub(super) fn lengths(
    v: &mut Violations,
    params: &SamplingParams,
    has_echo: bool,
    model: &Model,
) -> (Option<u32>, u32) {
    let longest = model.max_model_len;
    let least = u32::from(!has_echo);
    let max_tokens = params.max_tokens.map(|n| {
        let checked = u32::try_from(n).ok().filter(|&n| n >= least);
        if checked.is_none() {
            let problem = format!("must be between {least} and the model's length, {longest}");
            v.add("sampling.max_tokens", n, problem);
        }
        checked.unwrap_or(1)
    });
    let most = max_tokens.unwrap_or(longest).min(longest);
    let min_tokens = u32::try_from(params.min_tokens).ok().filter(|&n| n <= most);
    if min_tokens.is_none() {
        let problem = format!("must be between 0 and max_tokens, {most}");
        v.add("sampling.min_tokens", params.min_tokens, problem);
    }
    (max_tokens, min_tokens.unwrap_or(0))
}

pub(super) fn stop_tokens(v: &mut Violations, params: &SamplingParams, model: &Model) -> Vec<u32> {
    let asked = &params.stop_token_ids;
    let mut tokens = if params.ignore_eos {
        Vec::new()
    } else {
        model.eos.clone()
    };
    if asked.len() > MAX_STOP_TOKENS {
        too_many(v, "sampling.stop_token_ids", asked.len(), MAX_STOP_TOKENS);
        return tokens;
    }
    for &id in asked {
        if id >= model.vocab {
            let problem = format!("token id out of range; the vocabulary has {} tokens", model.vocab);
            v.add("sampling.stop_token_ids", id, problem);
        } else if !tokens.contains(&id) {
            tokens.push(id);
        }
    }
    tokens
}

pub(super) fn strings(v: &mut Violations, field: &str, list: &[String], most: usize, longest: usize) {
    if list.len() > most {
        too_many(v, field, list.len(), most);
        return;
    }
    for (i, text) in list.iter().enumerate() {
        if text.is_empty() || text.len() > longest {
            let problem = format!("must have 1 to {longest} bytes");
            v.add(format!("{field}[{i}]"), format_args!("{text:?}"), problem);
        }
    }
}

fn too_many(v: &mut Violations, field: &str, count: usize, most: usize) {
    v.add(
        field,
        format_args!("{count} entries"),
        format!("at most {most} are allowed"),
    );
}

fn within(v: &mut Violations, field: &str, value: f32, low: f32, high: f32) -> f32 {
    // NaN is in no range.
    if !(value >= low && value <= high) {
        v.add(field, value, range(low, high));
    }
    value
}

fn range(low: impl Display, high: impl Display) -> String {
    format!("must be a number between {low} and {high}")
}
