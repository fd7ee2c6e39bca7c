//! Spellings that vLLM's and SGLang's users have in their hands, brought to ours before the command line is parsed.
//!
//! Underscores in flag names become dashes, multi-letter short flags become long ones, `--no-x` becomes `--x=false`,
//! and a flag that has no counterpart is refused with the reason. Flags whose value is mapped are ordinary arguments
//! of `settings`.

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

/// Flags that exist elsewhere and are refused here: the flag and why. docs/from-vllm.md repeats this table.
pub const REFUSED: &[(&str, &str)] = &[
    (
        "--cpu-offload-gb",
        "weights live where they are computed with; use more workers or a checkpoint of fewer bits",
    ),
    (
        "--distributed-executor-backend",
        "workers are processes of this program; start more with --workers or `conclave worker`",
    ),
    (
        "--enable-lora",
        "adapters are not served; merge the adapter into the checkpoint",
    ),
    (
        "--enable-dbo",
        "there is nothing to switch on: long steps over several GPUs overlap exchange and work by themselves; decode steps are not cut",
    ),
    (
        "--enable-eplb",
        "expert load balancing by measured load is not implemented; placement is fixed by the ranks' room",
    ),
    (
        "--enable-sleep-mode",
        "a worker that should give its memory back is stopped; it is ready again in seconds",
    ),
    ("--limit-mm-per-prompt", "only text is served"),
    (
        "--speculative-config",
        "speculative decoding is not implemented, and the released checkpoints hold no draft weights",
    ),
    (
        "--speculative-algorithm",
        "speculative decoding is not implemented, and the released checkpoints hold no draft weights",
    ),
    (
        "--swap-space",
        "pages are recomputed or kept in the prefix cache, never swapped to host memory",
    ),
    (
        "--revision",
        "checkpoints are read from a directory; download the revision you want into it",
    ),
    (
        "--download-dir",
        "nothing is downloaded; give the checkpoint's directory",
    ),
];

/// What was refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{flag} has no counterpart here: {reason}")]
pub struct Refused {
    pub flag: String,
    pub reason: &'static str,
}

/// Rewrites the arguments after the program's name. What follows `--` is left alone.
pub fn normalise(arguments: Vec<String>) -> Result<Vec<String>, Refused> {
    let mut rewritten = Vec::with_capacity(arguments.len());
    let mut literal = false;
    for argument in arguments {
        literal |= argument == "--";
        if literal || !argument.starts_with('-') {
            rewritten.push(argument);
            continue;
        }
        let (name, value) = match argument.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (argument.as_str(), None),
        };
        let name = match SHORT.iter().find(|(short, _)| *short == name) {
            Some((_, long)) => (*long).to_owned(),
            None if name.starts_with("--") => name.replace('_', "-"),
            None => name.to_owned(),
        };
        if let Some((_, reason)) = REFUSED.iter().find(|(flag, _)| *flag == name) {
            return Err(Refused { flag: name, reason });
        }
        let negated = NEGATIVE
            .iter()
            .find(|(negative, _)| *negative == name)
            .map(|(_, ours)| (*ours).to_owned());
        let negated = negated.or_else(|| name.strip_prefix("--no-").map(|rest| format!("--{rest}")));
        rewritten.push(match (value, negated) {
            (Some(value), _) => format!("{name}={value}"),
            (None, Some(ours)) => format!("{ours}=false"),
            (None, None) => name,
        });
    }
    Ok(rewritten)
}

#[cfg(test)]
mod tests {
    use super::{REFUSED, normalise};

    fn words(line: &str) -> Vec<String> {
        line.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn other_spellings_become_ours() {
        let line = words("serve ./m -tp 2 -ep --max_model_len=4096 --kv_cache_dtype fp8 -- --max_model_len");
        let ours = words(
            "serve ./m --tensor-parallel-size 2 --enable-expert-parallel --max-model-len=4096 --kv-cache-dtype fp8 -- --max_model_len",
        );
        assert_eq!(normalise(line), Ok(ours));
    }

    #[test]
    fn negatives_become_values() {
        let line = words("serve --no-enable-prefix-caching --disable-radix-cache");
        let ours = words("serve --enable-prefix-caching=false --enable-prefix-caching=false");
        assert_eq!(normalise(line), Ok(ours));
    }

    #[test]
    fn what_has_no_counterpart_is_refused_with_the_reason() {
        for (flag, reason) in REFUSED {
            let error = normalise(words(&format!("serve {flag}=4"))).expect_err(flag);
            assert_eq!((error.flag.as_str(), error.reason), (*flag, *reason));
        }
        let error = normalise(words("serve --swap_space 4"))
            .expect_err("refused")
            .to_string();
        assert!(
            error.starts_with("--swap-space has no counterpart here: "),
            "{error}"
        );
    }
}
