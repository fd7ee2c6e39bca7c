//! `conclave plan` on the real M2.7 config prints the figures of `tests/data/minimax-m2/bytes.py`.

use std::process::Command;

fn plan(arguments: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_conclave"))
        .arg("plan")
        .args(arguments)
        .output()
        .expect("runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).expect("UTF-8")
}

fn real(format: &str) -> String {
    format!(
        "{}/../tests/data/minimax-m2/full-size/{format}",
        env!("CARGO_MANIFEST_DIR")
    )
}

#[test]
fn the_table_has_the_figures_of_the_real_model() {
    let text = plan(&[&real("fp8"), "--workers", "2"]);
    for figure in [
        "228,689,764,864",
        "228,703,644,928",
        "10,415,956,480",
        "457.48 GB     426.06 GiB",
        "230.12 GB     214.32 GiB  <- this checkpoint",
        "120.80 GB",
        "122.11 GB",
        "124.84 GB",
        "134.50 GB",
        "253,952 B",
        "126,976 B",
        "163.31",
        "269,257 tokens of bf16 KV, 538,515 of fp8",
        "20.83 GFLOP",
        "49,152 B",
        "1.165 ms/step",
    ] {
        assert!(text.contains(figure), "{figure:?} is not in\n{text}");
    }
    assert!(plan(&[&real("awq")]).contains("1 x h200"));
}

#[test]
fn a_group_too_small_is_shown_as_such() {
    let text = plan(&[&real("bf16"), "--workers", "2", "--gpu", "h100"]);
    assert!(text.contains("does not fit"), "{text}");
}

#[test]
fn json_has_the_same_figures() {
    let report: serde_json::Value =
        serde_json::from_str(&plan(&[&real("fp8"), "--workers", "2", "--json"])).expect("JSON");
    assert_eq!(report["parameters"]["total"], 228_689_764_864u64);
    assert_eq!(report["group"]["kv_tokens_weights_once"]["bf16"], 269_257);
    assert_eq!(report["group"]["ranks"][1]["bytes"]["experts"], 128);
    assert_eq!(report["kv_bytes_per_token"]["fp8"], 126_976);
}
