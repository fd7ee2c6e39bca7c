//! Speed of whole steps at MiniMax-M2.7's shapes with random weights, against the floor measured on the spot:
//!
//! `gpu_bench [--format int4|ct|fp8|bf16] [--layers 62] [--kv bf16|e4m3] [--decode BATCH:CONTEXT,..] [--prefill TOKENS,..]
//!  [--steps 64] [--profile BATCH:CONTEXT] [--profile-prefill TOKENS] [--zipf 1.0] [--deterministic on|off] [--one on|off]
//!  [--fp8-activations on|off] [--trace CONTEXT,..] [--json FILE]`, or `gpu_bench --sample ROWS,..`
//!
//! `--one`: a lone token as one kernel, or by six kernels a layer.
//! `--trace`: where that kernel's blocks spend their cycles.
//! `--sample`: sampling alone, without a model.
//!
//! Floor of a decode step: the bytes that a checkpoint of this format holds of every weight touched, plus keys and
//! values, over the measured read bandwidth.

#![expect(clippy::unwrap_used, reason = "a benchmark fails where it stands")]

mod model;
mod run;
mod sample;

use std::time::Instant;

use conclave_kernels::backend::KvDtype;
use model::{Kinds, Setup};

pub struct Arguments {
    pub kinds: Kinds,
    pub layers: usize,
    pub kv: KvDtype,
    pub decode: Vec<(usize, usize)>,
    pub prefill: Vec<usize>,
    pub steps: usize,
    pub profile: Vec<(usize, usize)>,
    pub profile_prefill: Vec<usize>,
    pub zipf: f32,
    pub deterministic: bool,
    pub fp8_activations: bool,
    pub one: String,
    pub trace: Vec<usize>,
    pub json: Option<String>,
    pub sample: Vec<usize>,
}

fn pairs(text: &str) -> Vec<(usize, usize)> {
    let pair = |item: &str| {
        let (a, b) = item.split_once(':').unwrap();
        (a.parse().unwrap(), b.parse().unwrap())
    };
    text.split(',').map(pair).collect()
}

fn numbers(text: &str) -> Vec<usize> {
    text.split(',').map(|item| item.parse().unwrap()).collect()
}

fn arguments() -> Arguments {
    let mut found = Arguments {
        kinds: Kinds::named("int4"),
        layers: 62,
        kv: KvDtype::Bf16,
        decode: Vec::new(),
        prefill: Vec::new(),
        steps: 64,
        profile: Vec::new(),
        profile_prefill: Vec::new(),
        zipf: 0.0,
        deterministic: false,
        fp8_activations: false,
        one: "on".into(),
        trace: Vec::new(),
        json: None,
        sample: Vec::new(),
    };
    let mut list = std::env::args().skip(1);
    while let Some(name) = list.next() {
        let value = list.next().unwrap();
        match name.as_str() {
            "--format" => found.kinds = Kinds::named(&value),
            "--layers" => found.layers = value.parse().unwrap(),
            "--kv" => {
                found.kv = if value == "e4m3" {
                    KvDtype::Fp8E4m3
                } else {
                    KvDtype::Bf16
                }
            }
            "--decode" => found.decode = pairs(&value),
            "--prefill" => found.prefill = numbers(&value),
            "--steps" => found.steps = value.parse().unwrap(),
            "--profile" => found.profile = pairs(&value),
            "--profile-prefill" => found.profile_prefill = numbers(&value),
            "--zipf" => found.zipf = value.parse().unwrap(),
            "--deterministic" => found.deterministic = value == "on",
            "--fp8-activations" => found.fp8_activations = value == "on",
            "--one" => found.one = value,
            "--trace" => found.trace = numbers(&value),
            "--sample" => found.sample = numbers(&value),
            "--json" => found.json = Some(value),
            other => panic!("unknown argument {other}"),
        }
    }
    found
}

fn main() {
    let start = Instant::now();
    let arguments = arguments();
    if !arguments.sample.is_empty() {
        return sample::bench(&arguments.sample);
    }
    let mut setup = Setup::new(&arguments);
    println!("device            {}", setup.describe());
    println!(
        "ready             {:.2} s after start, {:.1} GB of weights",
        start.elapsed().as_secs_f64(),
        setup.weight_bytes() as f64 / 1e9
    );
    println!(
        "read bandwidth    {:.3} TB/s (measured now)",
        setup.bandwidth / 1e12
    );
    println!(
        "memory            {:.1} GB free of {:.1}",
        setup.free().0 as f64 / 1e9,
        setup.free().1 as f64 / 1e9
    );
    let mut lines = Vec::new();
    println!("case                      tok/s    ms/step  floor ms  ratio   GB read  experts/layer");
    for &(batch, context) in &arguments.decode {
        lines.push(run::decode(&mut setup, batch, context, arguments.steps));
    }
    for &context in &arguments.trace {
        run::trace(&mut setup, context);
    }
    for &tokens in &arguments.prefill {
        lines.push(run::prefill(&mut setup, tokens));
    }
    for &(batch, context) in &arguments.profile {
        run::profile_decode(&mut setup, batch, context);
    }
    for &tokens in &arguments.profile_prefill {
        run::profile_prefill(&mut setup, tokens);
    }
    if let Some(file) = arguments.json {
        std::fs::write(file, format!("[\n{}\n]\n", lines.join(",\n"))).unwrap();
    }
}
