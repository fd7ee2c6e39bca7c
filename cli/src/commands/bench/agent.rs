//! `--scenario agent`: a coding agent's conversation, turn by turn, with and without the prefix cache.
//!
//! Every turn's prompt is the turn before, what was generated there, and a tool's result of fresh tokens. The
//! conversation is sent twice: once as it is, and once with a `cache_salt` of its own for every turn, so that the same
//! prompts find nothing in the cache. Prompts are token ids: what is measured is the router's reuse, not a text's.

use std::fmt::Write as _;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use conclave_plan::random;

use super::serve::{Call, Target, complete};
use crate::settings::{AgentSettings, BenchSettings};

/// What SGLang's users are told that its cache takes off the time to first token on prefixes of 8K tokens and more.
const PUBLISHED_CUT: &str = "30 to 60%";

/// One turn as measured.
struct Turn {
    prompt: u32,
    cached: u32,
    /// Tokens that no step has computed before: the turn's own and the last generated one.
    new: u32,
    warm: Duration,
    /// Without the cache, if measured.
    cold: Option<Duration>,
}

pub async fn run(settings: &BenchSettings) -> Result<()> {
    let asked = &settings.agent;
    let target = Target::reach(settings).await?;
    let measured = measure(&target, settings).await;
    target.end().await?;
    print!("{}", render(asked, &measured?));
    Ok(())
}

async fn measure(target: &Target, settings: &BenchSettings) -> Result<Vec<Turn>> {
    let (asked, load) = (&settings.agent, &settings.load);
    if asked.turn_output_len == 0 {
        bail!("turn_output_len must be at least 1");
    }
    let mut random = Tokens::new(load.seed, target.vocab);
    // Two runs against the same server must not share what the first has cached.
    let run = format!("bench-agent-{}-{}", std::process::id(), load.seed);
    let call = |prompt: &[u32], salt: String| Call {
        prompt: prompt.to_vec(),
        output: asked.turn_output_len,
        cache_salt: salt,
        wants_ids: true,
        logprobs: None,
        most_pieces: usize::MAX,
    };
    // Before anything is measured, one request warms both sides up.
    complete(target, load, &call(&random.draw(64), format!("{run}-warm-up")))
        .await
        .context("the first request failed")?;

    let mut prompt = random.draw(asked.shared_prefix_len);
    let mut prompts = Vec::new();
    let mut turns: Vec<Turn> = Vec::new();
    for at in 0..asked.turns {
        prompt.extend(random.draw(asked.turn_input_len));
        let timing = complete(target, load, &call(&prompt, run.clone()))
            .await
            .with_context(|| format!("turn {} of {} tokens failed", at + 1, prompt.len()))?;
        turns.push(Turn {
            prompt: timing.prompt_tokens,
            cached: timing.cached_tokens,
            new: if at == 0 {
                timing.prompt_tokens
            } else {
                asked.turn_input_len + 1
            },
            warm: timing.first,
            cold: None,
        });
        prompts.push(prompt.clone());
        if timing.ids.len() != timing.tokens as usize {
            bail!("the server does not tell which tokens it generated; its answers cannot be continued");
        }
        prompt.extend(timing.ids);
    }
    let stride = asked.cold_every as usize;
    // The last turn is one of them.
    let first = prompts.len().saturating_sub(1) % stride;
    for (at, (turn, prompt)) in turns
        .iter_mut()
        .zip(&prompts)
        .enumerate()
        .skip(first)
        .step_by(stride)
    {
        let timing = complete(target, load, &call(prompt, format!("{run}-cold-{at}"))).await?;
        if timing.cached_tokens > 0 {
            bail!(
                "turn {}: {} tokens were found under a salt that nobody used before",
                at + 1,
                timing.cached_tokens
            );
        }
        turn.cold = Some(timing.first);
    }
    Ok(turns)
}

fn render(asked: &AgentSettings, turns: &[Turn]) -> String {
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let mut out = format!(
        "{} turns over a shared prefix of {} tokens; each adds {} and generates {}\n\n\
         turn  prompt  cached  computed    new  TTFT ms  without cache    cut\n",
        asked.turns, asked.shared_prefix_len, asked.turn_input_len, asked.turn_output_len
    );
    for (at, turn) in turns.iter().enumerate() {
        // Writing to a string cannot fail.
        let _ = writeln!(
            out,
            "{:>4}  {:>6}  {:>6}  {:>8}  {:>5}  {:>7.1}  {:>13}  {:>5}",
            at + 1,
            turn.prompt,
            turn.cached,
            turn.prompt - turn.cached,
            turn.new,
            ms(turn.warm),
            turn.cold
                .map_or("-".to_owned(), |cold| format!("{:.1}", ms(cold))),
            turn.cold.map_or("-".to_owned(), |cold| format!(
                "{:.0}%",
                cut(turn.warm, cold) * 100.0
            ))
        );
    }
    let later = turns.get(1..).unwrap_or_default();
    if later.is_empty() {
        return out;
    }
    let beyond = later
        .iter()
        .map(|turn| i64::from(turn.prompt - turn.cached) - i64::from(turn.new));
    let share = |of: fn(&Turn) -> u32| later.iter().map(|turn| u64::from(of(turn))).sum::<u64>() as f64;
    let both: Vec<(Duration, Duration)> = later
        .iter()
        .filter_map(|turn| Some((turn.warm, turn.cold?)))
        .collect();
    let mean = |times: Duration| ms(times) / both.len().max(1) as f64;
    let warm = both.iter().map(|(warm, _)| warm).sum();
    let cold = both.iter().map(|(_, cold)| cold).sum();
    let _ = writeln!(
        out,
        "\nafter the first turn: {:.1}% of prompt tokens cached; at most {} computed beyond the new ones (pages are whole)\n\
         mean TTFT of {} turns measured both ways: {:.1} ms with the cache, {:.1} ms without: cut by {:.0}% \
         (published for SGLang on such prefixes: {PUBLISHED_CUT})",
        share(|turn| turn.cached) / share(|turn| turn.prompt) * 100.0,
        beyond.max().unwrap_or(0),
        both.len(),
        mean(warm),
        mean(cold),
        cut(warm, cold) * 100.0
    );
    out
}

/// The share of time that the cache takes off.
fn cut(warm: Duration, cold: Duration) -> f64 {
    if cold.is_zero() {
        return 0.0;
    }
    1.0 - warm.as_secs_f64() / cold.as_secs_f64()
}

/// Tokens drawn at random, the same for the same seed.
struct Tokens {
    state: u64,
    vocab: u64,
}

impl Tokens {
    fn new(seed: u64, vocab: u32) -> Tokens {
        Tokens {
            state: seed,
            vocab: u64::from(vocab.max(1)),
        }
    }

    fn draw(&mut self, count: u32) -> Vec<u32> {
        (0..count).map(|_| self.next()).collect()
    }

    fn next(&mut self) -> u32 {
        ((random::next(&mut self.state) >> 32) % self.vocab) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_tells_what_was_computed_beyond_the_new_tokens() {
        let asked = AgentSettings {
            turns: 2,
            shared_prefix_len: 100,
            turn_input_len: 20,
            turn_output_len: 4,
            cold_every: 1,
        };
        let ms = Duration::from_millis;
        let turns = [
            Turn {
                prompt: 120,
                cached: 0,
                new: 120,
                warm: ms(50),
                cold: Some(ms(50)),
            },
            Turn {
                prompt: 144,
                cached: 112,
                new: 21,
                warm: ms(10),
                cold: Some(ms(100)),
            },
        ];
        let table = render(&asked, &turns);
        assert!(
            table.contains("   2     144     112        32     21     10.0          100.0    90%"),
            "{table}"
        );
        assert!(
            table.contains("77.8% of prompt tokens cached; at most 11 computed beyond"),
            "{table}"
        );
        assert!(table.contains("cut by 90%"), "{table}");
    }

    #[test]
    fn tokens_repeat_with_their_seed_and_stay_in_the_vocabulary() {
        let draw = |seed| Tokens::new(seed, 100).draw(50);
        assert_eq!(draw(1), draw(1));
        assert_ne!(draw(1), draw(2));
        assert!(draw(3).iter().all(|&token| token < 100));
    }
}
