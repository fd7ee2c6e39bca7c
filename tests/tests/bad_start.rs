//! What must not start, or must not join: each ends with a status of its own and one clear reason, and a cluster that
//! runs goes on.
//!
//! Every way to spoil a file is in `worker/tests/checkpoint/main.rs`, every lie of a config in `plan/tests/config.rs`, every
//! wrong Hello in `router/tests/cluster.rs`; here are real processes with one case of each kind.
//!
//! Proves invariant F1 of ARCHITECTURE.md.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use conclave_tests::{Client, Healthy, Server, data};
use serde_json::{Value, json};
use tempfile::TempDir;

const ENDS_WITHIN: Duration = Duration::from_secs(120);

/// Runs a command that must fail; its output.
fn refused(args: &[&str]) -> String {
    let mut process = Server::spawn(args, &[]);
    let status = process.wait(ENDS_WITHIN);
    let output = process.output();
    assert_eq!(status.code(), Some(1), "{args:?}: {output}");
    assert!(!output.contains("panicked"), "{args:?}: {output}");
    output
}

fn serve_refused(args: &[&str]) -> String {
    refused(
        &[
            &["serve", "--port", "0", "--grpc-port", "0", "--workers", "2"],
            args,
        ]
        .concat(),
    )
}

/// A checkpoint of a test, spoilt by `spoil`.
fn spoilt(name: &str, spoil: impl FnOnce(&Path)) -> TempDir {
    let copy = tempfile::tempdir().expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        fs::copy(data::tiny(name).join(file), copy.path().join(file)).expect("copy");
    }
    spoil(copy.path());
    copy
}

fn edit_config(folder: &Path, key: &str, value: Value) {
    let path = folder.join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("read")).expect("JSON");
    config[key] = value;
    fs::write(path, config.to_string()).expect("write");
}

/// Changes the bytes of model.safetensors.
fn edit_model(folder: &Path, edit: impl FnOnce(&mut Vec<u8>)) {
    let path = folder.join("model.safetensors");
    let mut bytes = fs::read(&path).expect("read");
    edit(&mut bytes);
    fs::write(path, bytes).expect("write");
}

/// Renames a tensor in the header, to a name of the same length.
fn rename(bytes: &mut [u8], from: &str, to: &str) {
    assert_eq!(from.len(), to.len());
    let at = bytes
        .windows(from.len())
        .position(|window| window == from.as_bytes())
        .expect("the name is there");
    bytes[at..at + to.len()].copy_from_slice(to.as_bytes());
}

#[test]
fn spoilt_checkpoints_are_refused_by_file_and_tensor() {
    type Spoil = fn(&Path);
    let cases: [(&str, Spoil, &[&str]); 12] = [
        (
            "truncated",
            |d| edit_model(d, |b| b.truncate(b.len() - 4096)),
            &["model.safetensors", "data_offsets"],
        ),
        (
            "no header",
            |d| edit_model(d, |b| b.truncate(5)),
            &["model.safetensors", "header"],
        ),
        (
            "header length",
            |d| edit_model(d, |b| b[7] = 0x7f),
            &["model.safetensors", "header length"],
        ),
        (
            "header",
            |d| edit_model(d, |b| b[9] = b'!'),
            &["model.safetensors", "header"],
        ),
        (
            "empty",
            |d| edit_model(d, Vec::clear),
            &["model.safetensors", "it is empty"],
        ),
        (
            "no file",
            |d| fs::remove_file(d.join("model.safetensors")).expect("remove"),
            &["model.safetensors", "missing"],
        ),
        (
            "a missing tensor",
            |d| {
                edit_model(d, |b| {
                    rename(b, "layers.1.self_attn.q_proj", "layers.1.self_attn.x_proj")
                })
            },
            &["model.layers.1.self_attn.q_proj", "is there"],
        ),
        (
            "a wrong shape",
            |d| edit_config(d, "hidden_size", json!(256)),
            &["expected"],
        ),
        (
            "NaN",
            |d| edit_model(d, |b| b.iter_mut().rev().take(64).for_each(|byte| *byte = 0xff)),
            &["model.safetensors", "NaN"],
        ),
        (
            "an architecture",
            |d| edit_config(d, "architectures", json!(["LlamaForCausalLM"])),
            &["LlamaForCausalLM"],
        ),
        (
            "experts < top-k",
            |d| edit_config(d, "num_local_experts", json!(2)),
            &["num_experts_per_tok"],
        ),
        (
            "10^9 layers",
            |d| edit_config(d, "num_hidden_layers", json!(1_000_000_000)),
            &["num_hidden_layers"],
        ),
    ];
    for (name, spoil, says) in cases {
        let folder = spoilt("tiny-hd64/bf16", spoil);
        let output = serve_refused(&[folder.path().to_str().expect("UTF-8"), "--skip-tokenizer-init"]);
        for part in says {
            assert!(output.contains(part), "{name}: no {part:?} in {output}");
        }
    }
    let output = serve_refused(&["/no/such/folder"]);
    assert!(output.contains("/no/such/folder"), "{output}");
    let tokenizer = data::tiny("tiny-hd64/bf16");
    let output = serve_refused(&[tokenizer.to_str().expect("UTF-8")]);
    assert!(
        output.contains("tokenizer.json") && output.contains("--skip-tokenizer-init"),
        "{output}"
    );
}

#[test]
fn fp8_activations_need_fp8_weights() {
    let folder = data::tiny("tiny-hd64/bf16");
    let model = folder.to_str().expect("UTF-8");
    let output = serve_refused(&[model, "--skip-tokenizer-init", "--fp8-activations", "on"]);
    assert!(output.contains("no weight is FP8"), "{output}");
}

#[test]
fn a_port_in_use_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = taken.local_addr().expect("an address").port().to_string();
    for flags in [
        ["--port", &port, "--grpc-port", "0"],
        ["--port", "0", "--grpc-port", &port],
    ] {
        port_in_use(&refused(&[&["serve"], &flags[..]].concat()), &port);
    }
    let output = refused(&["gateway", "--router", "127.0.0.1:1", "--port", &port]);
    port_in_use(&output, &port);
}

/// Which one, what to do, and the cause once.
fn port_in_use(output: &str, port: &str) {
    for part in [port, "port 0 for any free one"] {
        assert!(output.contains(part), "no {part:?} in {output}");
    }
    assert_eq!(output.matches("in use").count(), 1, "{output}");
}

#[test]
fn more_workers_than_experts_are_refused() {
    let output = refused(&["serve", "--port", "0", "--grpc-port", "0", "--workers", "17"]);
    assert!(
        output.contains("workers is 17") && output.contains("give at most 16"),
        "{output}"
    );
}

#[test]
fn workers_that_do_not_belong_are_refused_and_the_cluster_goes_on() {
    let router = Server::router(&["--expected-workers", "1"]);
    let (grpc, cluster) = (router.address("gRPC"), router.address("workers"));
    let worker = |args: &[&str]| Server::worker(&cluster, args);
    let first = worker(&["--rank", "0"]);
    let gateway = Server::gateway(&[&grpc]);
    let client = Client::new(&gateway.address("HTTP"));
    let healthy = Healthy::start(&client, 2);

    let other = data::tiny("tiny-hd64/bf16");
    let stranger = |mut process: Server, says: &[&str]| {
        let status = process.wait(ENDS_WITHIN);
        let output = process.output();
        assert_eq!(status.code(), Some(1), "{output}");
        for part in says {
            assert!(output.contains(part), "no {part:?} in {output}");
        }
    };
    stranger(
        worker(&["--rank", "0"]),
        &["rank = 0", "give each worker its own --rank"],
    );
    stranger(worker(&[other.to_str().expect("UTF-8")]), &["checkpoint"]);
    stranger(worker(&["--block-size", "32"]), &["block"]);
    stranger(
        Server::worker(&grpc, &[]),
        &[
            "no workers are served there",
            "the port that the router prints for workers",
        ],
    );
    healthy.finish();
    for process in [router, gateway, first] {
        assert_eq!(process.stop().code(), Some(0));
    }
}
