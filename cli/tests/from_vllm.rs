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
        let flag = cells.next().expect("a flag").trim().trim_matches('`');
        let reason = cells.next().expect("a reason").trim();
        let message = serve(flag);
        assert_eq!(
            message,
            format!("conclave: {flag} has no counterpart here: {reason}\n")
        );
        seen += 1;
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
