//! Every config in the repository is read, and configs that lie are refused with the field, the value and advice.
//!
//! Proves invariant C1 of ARCHITECTURE.md.

use std::path::{Path, PathBuf};

use conclave_plan::config::{self, Config};
use conclave_plan::limits;
use conclave_plan::model::{QkNorm, Scoring};
use conclave_plan::quant::{Int4Layout, QuantFormat};
use serde_json::{Value, json};

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data/minimax-m2")
        .join(path)
}

fn read(path: &str) -> Config {
    config::read(&data(path), None).unwrap_or_else(|error| panic!("{path}: {error}"))
}

/// The error that a change of tiny-hd64/`format`'s config leads to.
fn refused(format: &str, change: Value) -> String {
    match config::read(&data(&format!("tiny-hd64/{format}")), Some(&change)) {
        Ok(_) => panic!("{change} was accepted"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_real_config_is_read() {
    let spec = read("full-size/fp8").spec;
    assert_eq!(
        (spec.hidden, spec.vocab, spec.layers.len(), spec.max_position),
        (3072, 200_064, 62, 204_800)
    );
    assert_eq!(
        (spec.bos_token_id, spec.eos_token_ids.as_slice()),
        (Some(200_019), &[200_020][..])
    );
    let layer = &spec.layers[61];
    let attention = &layer.attention;
    assert_eq!(
        (attention.heads, attention.kv_heads, attention.head_dim),
        (48, 8, 128)
    );
    assert_eq!((attention.rotary_dim, attention.rope_theta), (64, 5e6));
    assert_eq!(attention.qk_norm, QkNorm::WholeProjection);
    assert_eq!(
        (layer.moe.experts, layer.moe.top_k, layer.moe.intermediate),
        (256, 8, 1536)
    );
    assert_eq!(layer.moe.scoring, Scoring::Sigmoid);
    assert!(layer.moe.selection_bias && layer.moe.renormalize);
}

#[test]
fn quantisation_is_told_for_every_format() {
    let format = |path: &str| read(path).quant.map(|quant| quant.format);
    let int4 = |layout, group, zero_points| {
        Some(QuantFormat::Int4 {
            layout,
            group,
            zero_points,
        })
    };
    assert_eq!(format("tiny-hd64/bf16"), None);
    assert_eq!(
        format("tiny-hd64/fp8"),
        Some(QuantFormat::Fp8Block { block: [128, 128] })
    );
    assert_eq!(format("tiny-hd64/awq"), int4(Int4Layout::AwqGemm, 128, true));
    assert_eq!(format("tiny-hd64/gptq"), int4(Int4Layout::Gptq, 128, true));
    assert_eq!(
        format("tiny-hd64/ct-int4"),
        int4(Int4Layout::PackQuantized, 128, false)
    );
    assert_eq!(
        format("full-size/ct-int4-g32"),
        int4(Int4Layout::PackQuantized, 32, false)
    );

    let quant = read("full-size/ct-int4-g32").quant.expect("quantised");
    assert!(quant.covers("model.layers.0.block_sparse_moe.experts.7.w1"));
    assert!(!quant.covers("model.layers.0.self_attn.q_proj"));
    assert!(!quant.covers("model.layers.0.block_sparse_moe.gate"));
    assert_eq!(quant.method(), "compressed-tensors");
}

#[test]
fn overrides_are_merged_and_lists_per_layer_follow() {
    let read = |change: Value| config::read(&data("full-size/fp8"), Some(&change));
    let four = read(json!({"num_hidden_layers": 4})).expect("fewer layers");
    assert_eq!(four.spec.layers.len(), 4);
    assert_eq!(four.raw["attn_type_list"], json!([1, 1, 1, 1]));
    assert_eq!(
        read(json!({"num_hidden_layers": 70}))
            .expect("more layers")
            .spec
            .layers
            .len(),
        70
    );

    let nested = read(json!({"quantization_config": {"fmt": "e4m3"}})).expect("nested");
    assert_eq!(nested.raw["quantization_config"]["quant_method"], "fp8");

    let error = read(json!([1])).expect_err("a list").to_string();
    assert!(error.contains("hf-overrides") && error.contains("[1]"), "{error}");
}

#[test]
fn configs_saved_by_newer_tools_are_read() {
    let change = json!({"rope_theta": null, "rotary_dim": null,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}});
    let spec = config::read(&data("tiny-hd64/bf16"), Some(&change))
        .expect("nested rope")
        .spec;
    let attention = &spec.layers[0].attention;
    assert_eq!((attention.rope_theta, attention.rotary_dim), (1e6, 32));
}

#[test]
fn a_config_that_lies_is_refused_by_name() {
    let cases = [
        (
            json!({"num_attention_heads": 7}),
            [
                "num_key_value_heads",
                "2",
                "does not divide num_attention_heads 7",
            ],
        ),
        (
            json!({"num_key_value_heads": 4}),
            ["num_key_value_heads", "4", "does not divide"],
        ),
        (
            json!({"num_experts_per_tok": 9}),
            ["num_experts_per_tok", "9", "above num_local_experts 6"],
        ),
        (
            json!({"num_experts_per_tok": 0}),
            ["num_experts_per_tok", "0", "from 1 to 64"],
        ),
        (
            json!({"num_hidden_layers": 0}),
            ["num_hidden_layers", "0", "from 1 to 1024"],
        ),
        (
            json!({"num_hidden_layers": 1_000_000_000}),
            ["num_hidden_layers", "1000000000", "from 1 to 1024"],
        ),
        (
            json!({"num_hidden_layers": -3}),
            ["num_hidden_layers", "-3", "from 1 to 1024"],
        ),
        (
            json!({"num_hidden_layers": 2.5}),
            ["num_hidden_layers", "2.5", "whole number"],
        ),
        (
            json!({"num_hidden_layers": null}),
            ["num_hidden_layers", "null", "is needed"],
        ),
        (
            json!({"hidden_size": "128"}),
            ["hidden_size", "\"128\"", "whole number"],
        ),
        (
            json!({"hidden_size": u64::MAX}),
            ["hidden_size", "18446744073709551615", "65536"],
        ),
        (
            json!({"vocab_size": 1u64 << 40}),
            ["vocab_size", "1099511627776", "4194304"],
        ),
        (
            json!({"head_dim": null, "hidden_size": 100}),
            ["head_dim", "null", "no whole number"],
        ),
        (
            json!({"num_attention_heads": 1022, "head_dim": 1024}),
            ["num_attention_heads", "1022", "wider than 65536"],
        ),
        (json!({"rotary_dim": 33}), ["rotary_dim", "33", "must be even"]),
        (
            json!({"rotary_dim": 66}),
            ["rotary_dim", "66", "at most head_dim 64"],
        ),
        (
            json!({"rope_theta": "NaN"}),
            ["rope_theta", "NaN", "a number above 0"],
        ),
        (
            json!({"rope_theta": -1}),
            ["rope_theta", "-1", "a number above 0"],
        ),
        (json!({"rope_theta": null}), ["rope_theta", "null", "is needed"]),
        (
            json!({"rope_scaling": {"type": "yarn"}}),
            ["rope_scaling", "yarn", "not supported"],
        ),
        (json!({"rms_norm_eps": 0}), ["rms_norm_eps", "0", "above 0"]),
        (
            json!({"max_position_embeddings": 0}),
            ["max_position_embeddings", "0", "from 1 to"],
        ),
        (
            json!({"attn_type_list": [1, 1]}),
            ["attn_type_list", "[1,1]", "2 entries for num_hidden_layers 3"],
        ),
        (
            json!({"attn_type_list": [1, 0, 1]}),
            ["attn_type_list", "[1,0,1]", "layer 1"],
        ),
        (
            json!({"architectures": ["LlamaForCausalLM"]}),
            [
                "architectures",
                "Llama",
                "MiniMaxM2ForCausalLM (MiniMax-M2, M2.5, M2.7)",
            ],
        ),
        (
            json!({"architectures": null, "model_type": "llama"}),
            ["model_type", "llama", "supported: MiniMaxM2"],
        ),
        (
            json!({"model_type": "llama"}),
            ["model_type", "llama", "minimax_m2"],
        ),
        (
            json!({"scoring_func": "tanh"}),
            ["scoring_func", "tanh", "sigmoid, softmax"],
        ),
        (
            json!({"qk_norm_type": "odd"}),
            ["qk_norm_type", "odd", "per_layer"],
        ),
        (json!({"use_qk_norm": 1}), ["use_qk_norm", "1", "true or false"]),
        (json!({"hidden_act": "gelu"}), ["hidden_act", "gelu", "silu"]),
        (
            json!({"shared_intermediate_size": 64}),
            ["shared_intermediate_size", "64", "only 0"],
        ),
        (
            json!({"eos_token_id": 384}),
            ["eos_token_id", "384", "below vocab_size 384"],
        ),
        (
            json!({"eos_token_id": [2, -1]}),
            ["eos_token_id", "[2,-1]", "below vocab_size 384"],
        ),
        (
            json!({"bos_token_id": 1e9}),
            ["bos_token_id", "1000000000", "from 0 to 383"],
        ),
        (
            json!({"quantization_config": {"quant_method": "bnb"}}),
            ["quantization_config.quant_method", "bnb", "supported: fp8"],
        ),
        (
            json!({"quantization_config": "fp8"}),
            ["quantization_config", "fp8", "must be an object"],
        ),
    ];
    for (change, parts) in cases {
        let error = refused("bf16", change.clone());
        for part in parts {
            assert!(error.contains(part), "{change}: {error:?} lacks {part:?}");
        }
    }
}

#[test]
fn quantisation_that_does_not_fit_is_refused() {
    let quant = |change: Value| json!({"quantization_config": change});
    let cases = [
        (
            "fp8",
            quant(json!({"weight_block_size": [64, 128]})),
            "quantization_config.weight_block_size",
        ),
        ("fp8", quant(json!({"fmt": "e5m2"})), "quantization_config.fmt"),
        ("awq", quant(json!({"bits": 8})), "quantization_config.bits is 8"),
        (
            "awq",
            quant(json!({"version": "marlin"})),
            "quantization_config.version",
        ),
        (
            "awq",
            quant(json!({"group_size": -1})),
            "quantization_config.group_size is -1",
        ),
        ("awq", quant(json!({"group_size": 12})), "must be a multiple of 8"),
        (
            "awq",
            json!({"hidden_size": 192}),
            "groups of 128 do not divide hidden_size 192",
        ),
        (
            "gptq",
            quant(json!({"desc_act": true})),
            "quantization_config.desc_act is true",
        ),
        (
            "ct-int4",
            quant(json!({"format": "marlin-24"})),
            "quantization_config.format",
        ),
        (
            "ct-int4",
            quant(json!({"config_groups": {"group_0": {"weights": {"num_bits": 8}}}})),
            "quantization_config.config_groups.group_0.weights.num_bits is 8",
        ),
    ];
    for (format, change, part) in cases {
        let error = refused(format, change.clone());
        assert!(error.contains(part), "{change}: {error:?} lacks {part:?}");
    }
}

#[test]
fn a_file_that_is_no_config_is_refused() {
    let parse = |text: &[u8]| match config::parse(Path::new("m/config.json"), text, None) {
        Ok(_) => panic!("accepted"),
        Err(error) => error.to_string(),
    };
    // Python writes NaN; JSON has none. The line names the field.
    let error = parse(b"{\n \"hidden_size\": 8,\n \"rope_theta\": NaN\n}");
    assert!(
        error.contains("m/config.json") && error.contains("`\"rope_theta\": NaN`"),
        "{error}"
    );
    let error = parse(b"{\"rope_theta\": 1e400}");
    assert!(error.contains("rope_theta"), "{error}");
    assert!(parse(b"[]").contains("not a JSON object"));
    assert!(parse(b"").contains("not valid JSON"));
    assert!(parse(b"{\"model_type\": \"\xff\"}").contains("not valid JSON"));
    let deep = "[".repeat(100_000);
    assert!(parse(deep.as_bytes()).contains("recursion limit"));

    let error = config::read(Path::new("/nowhere"), None)
        .expect_err("absent")
        .to_string();
    assert!(
        error.contains("/nowhere/config.json") && error.contains("directory of a Hugging Face"),
        "{error}"
    );
}

#[test]
fn the_size_limit_is_reached() {
    let dir = std::env::temp_dir().join(format!("conclave-plan-{}", std::process::id()));
    std::fs::create_dir_all(&dir).expect("temporary directory");
    let text = std::fs::read_to_string(data("tiny-hd64/bf16/config.json")).expect("config");
    let mut fits = text.into_bytes();
    fits.resize(limits::MAX_CONFIG_BYTES as usize, b' ');
    let path = dir.join("config.json");
    std::fs::write(&path, &fits).expect("write");
    assert!(config::read(&dir, None).is_ok());
    fits.push(b' ');
    std::fs::write(&path, &fits).expect("write");
    let error = config::read(&dir, None).expect_err("too long").to_string();
    assert!(error.contains("longer than 1048576 bytes"), "{error}");
    std::fs::remove_dir_all(&dir).expect("remove");
}
