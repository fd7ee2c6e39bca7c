//! Spellings that vLLM's and SGLang's users have in their hands, brought to ours before the command line is parsed.
//!
//! Underscores in flag names become dashes, multi-letter short flags become long ones, `--no-x` becomes `--x=false`,
//! a flag that can have no effect here is taken with a note, and one that has no counterpart is refused with the reason.
//! Flags whose value is mapped are ordinary arguments of `settings`.

/// Short flags of vLLM.
const SHORT: &[(&str, &str)] = &[
    ("-tp", "--tensor-parallel-size"),
    ("-dp", "--data-parallel-size"),
    ("-pp", "--pipeline-parallel-size"),
    ("-ep", "--enable-expert-parallel"),
    ("-q", "--quantization"),
];

/// Switches that another program has only in the negative.
const NEGATIVE: &[(&str, &str)] = &[("--disable-radix-cache", "--enable-prefix-caching")];

/// What follows a flag that is taken and dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Value {
    None,
    Any,
    /// One of these; another is refused.
    Of(&'static [&'static str]),
}

const TUNING: &str = "how kernels are chosen, compiled and scheduled is not set here";
const ALWAYS: &str = "always so";
const LOGS: &str = "--log and --log-format say what is logged";
const FOUND: &str = "found by itself";

/// Flags that cannot change an answer, and have nothing to do here: taken, with a note.
const TAKEN: &[(&str, Value, &str)] = &[
    ("--compilation-config", Value::Any, TUNING),
    ("--enforce-eager", Value::None, TUNING),
    ("--async-scheduling", Value::None, TUNING),
    ("--attention-backend", Value::Any, TUNING),
    ("--grammar-backend", Value::Any, TUNING),
    ("--all2all-backend", Value::Any, TUNING),
    ("--moe-backend", Value::Any, TUNING),
    ("--moe-runner-backend", Value::Any, TUNING),
    ("--moe-a2a-backend", Value::Any, TUNING),
    ("--disable-custom-all-reduce", Value::None, TUNING),
    ("--disable-cuda-graph", Value::None, TUNING),
    ("--cuda-graph-max-bs", Value::Any, TUNING),
    ("--model-loader-extra-config", Value::Any, TUNING),
    ("--api-server-count", Value::Any, TUNING),
    ("--enable-metrics", Value::None, ALWAYS),
    ("--enable-cache-report", Value::None, ALWAYS),
    ("--enable-prompt-tokens-details", Value::None, ALWAYS),
    ("--enable-request-id-headers", Value::None, ALWAYS),
    ("--enable-dp-attention", Value::None, ALWAYS),
    ("--scheduling-policy", Value::Of(&["fcfs", "priority"]), ALWAYS),
    ("--disable-log-requests", Value::None, LOGS),
    ("--disable-log-stats", Value::None, LOGS),
    ("--disable-uvicorn-access-log", Value::None, LOGS),
    ("--uvicorn-log-level", Value::Any, LOGS),
    ("--dtype", Value::Of(&["auto", "bfloat16"]), FOUND),
    ("--tokenizer-mode", Value::Of(&["auto", "hf"]), FOUND),
    ("--config-format", Value::Of(&["auto", "hf"]), FOUND),
    ("--chat-template-content-format", Value::Of(&["auto"]), FOUND),
];

/// Flags that exist elsewhere and are refused here, and why. docs/from-vllm.md repeats this table.
pub const REFUSED: &[(&[&str], &str)] = &[
    (
        &["--cpu-offload-gb"],
        "weights live where they are computed with; use more workers or a checkpoint of fewer bits",
    ),
    (
        &["--distributed-executor-backend"],
        "workers are processes of this program; start more with --workers or `conclave worker`",
    ),
    (
        &[
            "--nnodes",
            "--node-rank",
            "--master-addr",
            "--dist-init-addr",
            "--data-parallel-address",
            "--data-parallel-size-local",
            "--headless",
        ],
        "start the parts on their machines: `conclave router`, `conclave worker --router ADDR`, `conclave gateway --router ADDR`",
    ),
    (
        &[
            "--decode-context-parallel-size",
            "--prefill-context-parallel-size",
        ],
        "a sequence is on one worker",
    ),
    (
        &["--kv-transfer-config", "--disaggregation-mode"],
        "a worker computes prompts and answers, and hands neither to another",
    ),
    (
        &["--enable-lora", "--lora-modules"],
        "adapters are not served; merge the adapter into the checkpoint",
    ),
    (
        &["--enable-dbo", "--enable-two-batch-overlap"],
        "there is nothing to switch on: long steps over several GPUs overlap exchange and work by themselves; decode steps are not cut",
    ),
    (
        &["--enable-eplb", "--ep-num-redundant-experts"],
        "expert load balancing by measured load is not implemented; placement is fixed by the ranks' room",
    ),
    (
        &["--enable-sleep-mode"],
        "a worker that should give its memory back is stopped; it is ready again in seconds",
    ),
    (&["--limit-mm-per-prompt"], "only text is served"),
    (
        &["--speculative-config", "--speculative-algorithm"],
        "speculative decoding is not implemented, and the released checkpoints hold no draft weights",
    ),
    (
        &["--swap-space"],
        "pages are recomputed or kept in the prefix cache, never swapped to host memory",
    ),
    (
        &["--num-gpu-blocks-override", "--max-total-tokens"],
        "give --kv-cache-memory-bytes or --gpu-memory-utilization",
    ),
    (
        &["--revision", "--tokenizer-revision"],
        "checkpoints are read from a directory; download the revision you want into it",
    ),
    (
        &["--download-dir"],
        "nothing is downloaded; give the checkpoint's directory",
    ),
    (
        &["--tokenizer", "--tokenizer-path", "--hf-config-path"],
        "it is read from the checkpoint's directory",
    ),
    (
        &["--override-generation-config", "--preferred-sampling-params"],
        "defaults of sampling come from the checkpoint's generation_config.json; --generation-config vllm leaves them out",
    ),
    (&["--seed", "--random-seed"], "each request has its own seed"),
    (
        &["--tool-parser-plugin", "--reasoning-parser-plugin"],
        "no code but this program's is run; --tool-call-parser and --reasoning-parser name what there is",
    ),
    (
        &["--enable-log-requests"],
        "give --log-prompts to have prompts in logs and spans",
    ),
    (&["--log-level"], "say --log LEVEL"),
    (
        &["--ssl-ca-certs"],
        "clients are known by their keys: --api-key-file",
    ),
    (
        &["--root-path"],
        "a proxy in front that has a path of its own takes it off",
    ),
];

/// Arguments in our spelling, what is to be said about them, and what is wrong with them.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Normalised {
    pub arguments: Vec<String>,
    pub notes: Vec<String>,
    pub refused: Vec<String>,
}

/// Everything that is wrong with a command line, at once.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{}", list(.0))]
pub struct Refused(pub Vec<String>);

fn list(problems: &[String]) -> String {
    match problems {
        [one] => one.clone(),
        several => format!(
            "{} flags are wrong here\n  {}",
            several.len(),
            several.join("\n  ")
        ),
    }
}

/// Rewrites the arguments after the program's name. What follows `--` is left alone, and so is what means something else
/// to a server there than to the command here: `own`, the command's flags, are not looked up.
pub fn normalise(arguments: Vec<String>, own: &[&str]) -> Normalised {
    let mut ours = Normalised::default();
    let mut arguments = arguments.into_iter().peekable();
    while let Some(argument) = arguments.next() {
        if argument == "--" {
            ours.arguments.push(argument);
            ours.arguments.extend(arguments);
            break;
        }
        if !argument.starts_with('-') {
            ours.arguments.push(argument);
            continue;
        }
        let (name, mut value) = match argument.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (argument.as_str(), None),
        };
        let name = match SHORT.iter().find(|(short, _)| *short == name) {
            Some((_, long)) => (*long).to_owned(),
            None if name.starts_with("--") => name.replace('_', "-"),
            None => name.to_owned(),
        };
        let positive = name.strip_prefix("--no-").map(|rest| format!("--{rest}"));
        let known = positive.as_ref().unwrap_or(&name);
        let is_own = own.iter().any(|own| known.strip_prefix("--") == Some(own));
        let taken = TAKEN.iter().find(|(flag, ..)| flag == known);
        if let Some((flag, follows, why)) = taken.filter(|_| !is_own) {
            if *follows != Value::None && value.is_none() {
                value = arguments.next_if(|next| !next.starts_with('-'));
            }
            match (follows, value) {
                (Value::Of(words), Some(value)) if !words.contains(&value.as_str()) => {
                    let problem = format!("{flag} {value} is not served, only {}", words.join(" or "));
                    ours.refused.push(problem);
                }
                _ => ours.notes.push(format!("{flag} has nothing to do here: {why}")),
            }
            continue;
        }
        let refused = REFUSED.iter().find(|(flags, _)| flags.contains(&known.as_str()));
        if let Some((_, reason)) = refused.filter(|_| !is_own) {
            // What is switched off is off.
            if positive.is_none() {
                ours.refused
                    .push(format!("{name} has no counterpart here: {reason}"));
                arguments.next_if(|next| !next.starts_with('-'));
            }
            continue;
        }
        let negative = NEGATIVE.iter().find(|(negative, _)| *negative == name);
        let positive = negative.map(|(_, ours)| (*ours).to_owned()).or(positive);
        ours.arguments.push(match (value, positive) {
            (Some(value), _) => format!("{name}={value}"),
            (None, Some(positive)) => format!("{positive}=false"),
            (None, None) => name,
        });
    }
    ours
}

#[cfg(test)]
mod tests {
    use super::{Normalised, REFUSED, TAKEN, Value};

    fn normalise(line: Vec<String>) -> Normalised {
        super::normalise(line, &[])
    }

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn other_spellings_become_ours() {
        let line =
            words("serve ./m -tp 2 -ep --max_model_len=4096 --kv_cache_dtype fp8 -- --max_model_len --seed");
        let ours = words(
            "serve ./m --tensor-parallel-size 2 --enable-expert-parallel --max-model-len=4096 --kv-cache-dtype fp8 -- --max_model_len --seed",
        );
        assert_eq!(normalise(line).arguments, ours);
    }

    #[test]
    fn negatives_become_values() {
        let line = words("serve --no-enable-prefix-caching --disable-radix-cache --no-enable-lora");
        let ours = words("serve --enable-prefix-caching=false --enable-prefix-caching=false");
        assert_eq!(normalise(line).arguments, ours);
    }

    #[test]
    fn what_has_nothing_to_do_is_taken_with_its_value_and_a_note() {
        for (flag, follows, why) in TAKEN {
            let value = match follows {
                Value::None => None,
                Value::Any => Some("x"),
                Value::Of(words) => Some(words[0]),
            };
            let spaced = [Some("serve"), Some(flag), value, Some("./m")];
            let spaced = spaced.into_iter().flatten().map(str::to_owned).collect();
            let joined = words(&format!("serve {flag}={} ./m", value.unwrap_or("true")));
            for line in [spaced, joined] {
                let ours = normalise(line);
                assert_eq!(ours.arguments, ["serve", "./m"], "{flag}");
                assert_eq!(ours.notes, [format!("{flag} has nothing to do here: {why}")]);
                assert!(ours.refused.is_empty());
            }
        }
        let ours = normalise(words("serve ./m --dtype float16 --enforce-eager"));
        assert_eq!(
            ours.refused,
            ["--dtype float16 is not served, only auto or bfloat16"]
        );
        assert_eq!((ours.arguments.len(), ours.notes.len()), (2, 1));
    }

    #[test]
    fn what_has_no_counterpart_is_refused_with_the_reason() {
        for (flag, reason) in REFUSED
            .iter()
            .flat_map(|(flags, reason)| flags.iter().map(move |flag| (flag, reason)))
        {
            let ours = normalise(words(&format!(
                "serve {} 4 --port 1",
                flag.replace('-', "_").replacen("__", "--", 1)
            )));
            assert_eq!(
                ours.refused,
                [format!("{flag} has no counterpart here: {reason}")]
            );
            assert_eq!(ours.arguments, ["serve", "--port", "1"]);
        }
    }
}
