//! The command lines that users of vLLM and SGLang follow today are understood, and what has no counterpart is refused as
//! docs/from-vllm.md says.

use std::fs;
use std::process::Command;

/// What `serve` says to this command line. The model is missing on purpose: that error comes after all flags were read.
fn serve(line: &str) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_conclave"))
        .arg("serve")
        .args(line.split_whitespace())
        .output()
        .expect("runs");
    assert!(!output.status.success());
    String::from_utf8_lossy(&output.stderr).into_owned()
}

const UNDERSTOOD: &str = "model ./minimax-m2-7: there is no such directory";

#[test]
fn the_guides_command_lines_are_understood() {
    for line in [
        "--model ./minimax-m2-7 --served-model-name minimax-m2-7 --tensor-parallel-size 2 --quantization fp8 \
         --enable-expert-parallel --max-model-len 32768 --kv-cache-dtype fp8_e5m2 --gpu-memory-utilization 0.92 \
         --enable-chunked-prefill --max-num-seqs 32 --port 8000",
        "--model-path ./minimax-m2-7 --tp 2 --quantization fp8 --enable-moe-ep --context-length 32768 --port 30000",
        "./minimax-m2-7 -tp 3 --max-num-seqs 20 --max-num-batched-tokens 8192 --max_model_len 64K",
        "./minimax-m2-7 --moe-expert-parallel-size 2 --trust-remote-code --enable-auto-tool-choice \
         --tool-call-parser minimax_m2 --reasoning-parser minimax_m2 --host 0.0.0.0",
        "./minimax-m2-7 --trust-remote-code -tp 4 --enable-auto-tool-choice --tool-call-parser minimax_m2 \
         --reasoning-parser minimax_m2_append_think --compilation-config {\"mode\":3} --dtype bfloat16 --enforce-eager",
        "--model-path ./minimax-m2-7 --tp-size 8 --ep-size 8 --tool-call-parser minimax-m2 --reasoning-parser \
         minimax-append-think --trust-remote-code --mem-fraction-static 0.85 --enable-metrics",
    ] {
        let message = serve(line);
        assert!(message.contains(UNDERSTOOD), "{line}: {message}");
    }
}

#[test]
fn what_cannot_be_done_is_refused_with_the_reason() {
    for (line, reason) in [
        (
            "./minimax-m2-7 --pipeline-parallel-size 2",
            "layers are not split",
        ),
        (
            "./minimax-m2-7 --no-enable-chunked-prefill",
            "prefill is always chunked",
        ),
        ("./minimax-m2-7 --kv-cache-dtype int8", "possible values"),
        ("./minimax-m2-7 --max-modle-len 5", "--max-model-len"),
    ] {
        let message = serve(line);
        assert!(message.contains(reason), "{line}: {message}");
    }
}

/// As `vllm serve ORG/NAME` finds what `hf download ORG/NAME` has put there.
#[test]
fn a_name_of_the_hub_is_looked_up_in_its_cache() {
    let home = tempfile::tempdir().expect("temporary directory");
    let repository = home.path().join("hub/models--Org--Some-M2");
    let snapshot = repository.join("snapshots/0123abc");
    for directory in [&snapshot, &repository.join("refs")] {
        fs::create_dir_all(directory).expect("creates");
    }
    fs::write(repository.join("refs/main"), "0123abc").expect("writes");
    let demo = concat!(env!("CARGO_MANIFEST_DIR"), "/../models/demo");
    for file in fs::read_dir(demo).expect("models/demo") {
        let file = file.expect("an entry");
        std::os::unix::fs::symlink(file.path(), snapshot.join(file.file_name())).expect("links");
    }
    let plan = |name: &str| {
        Command::new(env!("CARGO_BIN_EXE_conclave"))
            .args(["plan", "--json", name])
            .env("HF_HOME", home.path())
            .output()
            .expect("runs")
    };
    let found = plan("Org/Some-M2");
    let report: serde_json::Value = serde_json::from_slice(&found.stdout).expect("JSON");
    assert_eq!(report["model"], "Org/Some-M2");
    assert!(!plan("Org/Other").status.success());
}

#[test]
fn everything_that_is_wrong_is_said_at_once() {
    let message =
        serve("./m --swap-space 4 --port 1 --max-modle-len 5 --dtype half --quux --reasoning-parser nobody");
    let lines: Vec<&str> = message.lines().map(str::trim).collect();
    assert_eq!(
        lines,
        [
            "conclave: 4 flags are wrong here",
            "--swap-space has no counterpart here: pages are recomputed or kept in the prefix cache, never swapped to host memory",
            "--dtype half is not served, only auto or bfloat16",
            "--max-modle-len is not a flag of serve; did you mean --max-model-len?",
            "--quux is not a flag of serve",
        ]
    );
}

#[test]
fn the_page_lists_every_refused_flag_with_the_programs_words() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/from-vllm.md");
    let page = fs::read_to_string(page).expect("docs/from-vllm.md");
    let section = page
        .split("## Flags that are refused")
        .nth(1)
        .expect("the section");
    let rows = section.lines().filter(|line| line.starts_with("| `--"));
    let mut seen = 0;
    for row in rows {
        let mut cells = row.trim_matches('|').splitn(2, " | ");
        let flags = cells.next().expect("flags").trim();
        let reason = cells.next().expect("a reason").trim();
        let flags: Vec<&str> = flags.split(", ").map(|flag| flag.trim_matches('`')).collect();
        let lines: Vec<String> = flags
            .iter()
            .map(|flag| format!("{flag} has no counterpart here: {reason}\n"))
            .collect();
        let expected = match &lines[..] {
            [one] => format!("conclave: {one}"),
            several => format!(
                "conclave: {} flags are wrong here\n  {}",
                several.len(),
                several.join("  ")
            ),
        };
        assert_eq!(serve(&flags.join(" ")), expected);
        seen += flags.len();
    }
    let source = include_str!("../src/spelling.rs");
    let table = source
        .split("pub const REFUSED")
        .nth(1)
        .and_then(|rest| rest.split("];").next())
        .expect("the table");
    assert_eq!(
        seen,
        table.matches("\"--").count(),
        "flags on the page and in the program"
    );
}
