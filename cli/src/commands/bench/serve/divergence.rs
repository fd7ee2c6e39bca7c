//! `--scenario divergence`: the same prompts alone and beside others, cold and from the prefix cache, through router and
//! workers. With `--deterministic` all ids and log-probabilities are the same bits, or the command fails; without it the
//! share of prompts that part is told. Both take their turn, so that what the mode costs is told, too.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::{Value, json};
use tokio::task::JoinSet;

use super::cluster::Target;
use super::{Call, Prompts, Timing, grpc};
use crate::settings::BenchSettings;

/// Shortest prompt.
const SHORTEST: u32 = 4;
/// Best log-probabilities that are compared beside the sampled token's.
const LOGPROBS: u32 = 5;

/// What is sent: how, with how many clients, and in whose prefix cache. The second pass of a salt finds the first's pages.
const PASSES: [(&str, bool, &str); 5] = [
    ("alone, cold", false, "alone"),
    ("alone again, cold", false, "again"),
    ("beside others, cold", true, "beside"),
    ("alone, from the prefix cache", false, "alone"),
    ("beside others, from the prefix cache", true, "alone"),
];

pub async fn run(settings: &BenchSettings) -> Result<()> {
    let load = &settings.load;
    if load.random_input_len < SHORTEST || load.num_prompts == 0 || load.max_concurrency < 2 {
        bail!(
            "random_input_len must be at least {SHORTEST}, num_prompts 1 and max_concurrency 2: prompts of up to that length \
             are sent alone, and so many beside each other"
        );
    }
    let modes: &[bool] = match load.base_url {
        // It runs already, in one mode.
        Some(_) => &[settings.device.deterministic],
        None => &[true, false],
    };
    let (mut figures, mut parted, mut seconds) = (Vec::new(), 0, Vec::new());
    for &deterministic in modes {
        let mut settings = settings.clone();
        settings.device.deterministic = deterministic;
        title(&settings);
        let passes = passes(&settings).await?;
        if deterministic {
            parted += passes
                .iter()
                .map(|pass| pass.ids.max(pass.logprobs))
                .sum::<usize>();
        }
        figures.push(json!({"deterministic": deterministic, "passes": passes.iter().map(Pass::json).collect::<Value>()}));
        seconds.push([passes[0].seconds, passes[2].seconds]);
    }
    if let [with, without] = seconds[..] {
        println!(
            "  the mode takes {:.2} times as long alone, {:.2} times beside others",
            with[0] / without[0],
            with[1] / without[1]
        );
    }
    super::super::results::write(
        settings.result_filename.as_deref(),
        "divergence",
        &Value::Array(figures),
    )?;
    if parted > 0 {
        bail!("deterministic: {parted} prompts part");
    }
    Ok(())
}

/// How the answers of one pass differ from those of the first.
struct Pass {
    name: &'static str,
    clients: usize,
    seconds: f64,
    cached: u64,
    tokens: u64,
    /// Prompts whose ids differ, whose log-probabilities do, and where the first one does.
    ids: usize,
    logprobs: usize,
    first: Option<(usize, usize)>,
}

impl Pass {
    fn print(&self) {
        let first = self.first.map_or(String::new(), |(prompt, token)| {
            format!(" (the first: prompt {prompt}, token {token})")
        });
        println!(
            "  {:<38} {:>3} clients {:>7.2} s {:>6} tokens cached: {:>3} prompts part in ids, {:>3} in log-probabilities{first}",
            self.name, self.clients, self.seconds, self.cached, self.ids, self.logprobs
        );
    }

    fn json(&self) -> Value {
        json!({
            "pass": self.name, "clients": self.clients, "seconds": self.seconds, "cached_tokens": self.cached,
            "output_tokens": self.tokens, "ids_part": self.ids, "logprobs_part": self.logprobs,
        })
    }
}

async fn passes(settings: &BenchSettings) -> Result<Vec<Pass>> {
    let load = &settings.load;
    let target = Target::reach(settings).await?;
    let prompts = Arc::new(Prompts::new(load, target.vocab));
    // Two runs against the same server must not share what the first has cached.
    let run = format!("bench-divergence-{}", std::process::id());
    let warm = call(&prompts, 0, settings, format!("{run}-warm-up"));
    grpc::complete(&target.grpc().await?, &warm).await?;
    let mut alone = Vec::new();
    let mut found = Vec::new();
    for (name, beside, salt) in PASSES {
        let clients = if beside { load.max_concurrency } else { 1 };
        let began = Instant::now();
        let answers = answers(&target, &prompts, settings, clients, format!("{run}-{salt}")).await?;
        let seconds = began.elapsed().as_secs_f64();
        let expected = if found.is_empty() { &answers } else { &alone };
        let pairs = || answers.iter().zip(expected.iter());
        let differs = |(a, b): &(&Timing, &Timing)| a.ids != b.ids || a.logprobs != b.logprobs;
        let first = pairs().position(|pair| differs(&pair)).map(|index| {
            let (a, b) = (&answers[index].ids, &expected[index].ids);
            let at = a.iter().zip(b).take_while(|(a, b)| a == b).count();
            (index, at)
        });
        let pass = Pass {
            name,
            clients,
            seconds,
            cached: answers.iter().map(|answer| u64::from(answer.cached_tokens)).sum(),
            tokens: answers.iter().map(|answer| answer.ids.len() as u64).sum(),
            ids: pairs().filter(|(a, b)| a.ids != b.ids).count(),
            logprobs: pairs().filter(|(a, b)| a.logprobs != b.logprobs).count(),
            first,
        };
        pass.print();
        found.push(pass);
        if alone.is_empty() {
            alone = answers;
        }
    }
    target.end().await?;
    Ok(found)
}

fn call(prompts: &Prompts, index: usize, settings: &BenchSettings, salt: String) -> Call {
    let longest = settings.load.random_input_len;
    let length = SHORTEST + (index as u32).wrapping_mul(37) % (longest - SHORTEST + 1);
    Call {
        prompt: prompts.some_tokens(index, length),
        output: prompts.output,
        cache_salt: salt,
        wants_ids: true,
        logprobs: Some(LOGPROBS),
        most_pieces: usize::MAX,
    }
}

/// Every prompt's answer, in order.
async fn answers(
    target: &Arc<Target>,
    prompts: &Arc<Prompts>,
    settings: &BenchSettings,
    clients: usize,
    salt: String,
) -> Result<Vec<Timing>> {
    let next = Arc::new(AtomicUsize::new(0));
    let mut running = JoinSet::new();
    for _ in 0..clients {
        let (target, prompts, settings) = (target.clone(), prompts.clone(), settings.clone());
        let (next, salt) = (next.clone(), salt.clone());
        running.spawn(async move {
            let client = target.grpc().await?;
            let mut answers = Vec::new();
            loop {
                let index = next.fetch_add(1, Ordering::Relaxed);
                if index >= settings.load.num_prompts {
                    return anyhow::Ok(answers);
                }
                let call = call(&prompts, index, &settings, salt.clone());
                answers.push((index, grpc::complete(&client, &call).await?));
            }
        });
    }
    let all = running.join_all().await.into_iter().collect::<Result<Vec<_>>>()?;
    let mut all: Vec<(usize, Timing)> = all.into_iter().flatten().collect();
    all.sort_by_key(|(index, _)| *index);
    Ok(all.into_iter().map(|(_, timing)| timing).collect())
}

fn title(settings: &BenchSettings) {
    let load = &settings.load;
    println!(
        "{}: {} prompts of {SHORTEST} to {} tokens, {} tokens generated",
        if settings.device.deterministic {
            "deterministic"
        } else {
            "without the deterministic mode"
        },
        load.num_prompts,
        load.random_input_len,
        load.random_output_len
    );
}
