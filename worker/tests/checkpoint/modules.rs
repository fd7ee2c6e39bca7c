//! Tensors that do not make the model's modules: of another shape or type, missing, or with values that spoil it.

use conclave_worker::weights::WeightSource;
use serde_json::{Value, json};

use crate::copy::{Copy, NORM, Q, assert_says, join, split};

/// Replaces one tensor's entry and its data by another of the same name.
fn reshaped(checkpoint: &str, name: &str, dtype: &str, shape: &[usize], bytes: usize) -> Copy {
    let copy = Copy::of(checkpoint);
    let whole = copy.model();
    let (json, data) = split(&whole);
    let mut header: Value = serde_json::from_slice(json).unwrap();
    let end = data.len();
    let object = header.as_object_mut().unwrap();
    // The old one keeps its bytes under a name that nobody asks for.
    let old = object.remove(name).unwrap();
    object.insert("unused".into(), old);
    object.insert(
        name.into(),
        json!({"dtype": dtype, "shape": shape, "data_offsets": [end, end + bytes]}),
    );
    copy.set_model(&join(
        &serde_json::to_vec(&header).unwrap(),
        &[data, &vec![0; bytes]].concat(),
    ));
    copy
}

#[test]
fn modules_of_another_shape_or_type_are_refused_by_name() {
    let q = |suffix: &str| format!("{Q}.{suffix}");
    let cases = [
        (
            "bf16",
            q("weight"),
            "BF16",
            vec![384, 64],
            384 * 64 * 2,
            "expected [384, 128]",
        ),
        (
            "bf16",
            q("weight"),
            "I32",
            vec![384, 128],
            384 * 128 * 4,
            "expected BF16, F16 or F32",
        ),
        (
            "bf16",
            q("weight"),
            "F8_E4M3",
            vec![384, 128],
            384 * 128,
            ".weight_scale_inv is not there",
        ),
        ("bf16", NORM.into(), "BF16", vec![64], 128, "expected [128]"),
        (
            "fp8",
            q("weight_scale_inv"),
            "F32",
            vec![6, 1],
            24,
            "expected [3, 1]",
        ),
        (
            "fp8",
            q("weight"),
            "BF16",
            vec![384, 128],
            384 * 128 * 2,
            "expected F8_E4M3",
        ),
        ("awq", q("qzeros"), "I32", vec![1, 47], 47 * 4, "expected [1, 48]"),
        (
            "awq",
            q("scales"),
            "F16",
            vec![3, 384],
            3 * 384 * 2,
            "3 groups do not divide 128",
        ),
        ("awq", q("qweight"), "I32", vec![128, 47], 128 * 47 * 4, "qweight"),
        ("gptq", q("scales"), "F16", vec![0, 384], 0, "0 groups"),
        (
            "ct-int4",
            q("weight_scale"),
            "BF16",
            vec![384],
            768,
            "expected [384, groups]",
        ),
        (
            "ct-int4",
            q("weight_packed"),
            "I32",
            vec![384, 15],
            384 * 60,
            "expected [384, 16]",
        ),
    ];
    for (checkpoint, name, dtype, shape, bytes, expected) in cases {
        let checkpoint = format!("tiny-hd64/{checkpoint}");
        let error = if name == NORM {
            let copy = reshaped(&checkpoint, &name, dtype, &shape, bytes);
            let source = WeightSource::open(copy.directory.path(), None).unwrap();
            let module = conclave_worker::weights::modules::final_norm(source.spec());
            source.vector(&module).unwrap_err().to_string()
        } else {
            reshaped(&checkpoint, &name, dtype, &shape, bytes).load_error()
        };
        assert_says(&error, &["model.safetensors", &name, expected]);
    }
}

#[test]
fn missing_and_ambiguous_modules_are_refused_by_name() {
    let rename = |checkpoint: &str, from: &str, to: &str| {
        let copy = Copy::of(checkpoint);
        copy.edit_header(|header| {
            let info = header.remove(from).unwrap();
            header.insert(to.into(), info);
        });
        copy.load_error()
    };
    let expert = "model.layers.1.block_sparse_moe.experts.3.w2";
    assert_says(
        &rename("tiny-hd64/bf16", &format!("{expert}.weight"), "unused"),
        &[expert, "none of its tensors"],
    );
    assert_says(
        &rename("tiny-hd64/awq", &format!("{expert}.qzeros"), "unused"),
        &[expert, ".qzeros is not there"],
    );
    let norm = "model.layers.0.input_layernorm.weight";
    assert_says(&rename("tiny-hd64/bf16", norm, "unused"), &[norm, "not there"]);
    let both = rename(
        "tiny-hd64/awq",
        &format!("{expert}.scales"),
        &format!("{expert}.weight"),
    );
    assert_says(&both, &[expert, "several formats"]);
    let biased = rename("tiny-hd64/bf16", "lm_head.weight", &format!("{expert}.bias"));
    assert_says(&biased, &[expert, ".bias", "not supported"]);
    let zeros = rename(
        "tiny-hd64/ct-int4",
        "lm_head.weight",
        &format!("{expert}.weight_zero_point"),
    );
    assert_says(&zeros, &[expert, "weight_zero_point"]);
}

#[test]
fn values_that_spoil_the_model_are_refused_by_name() {
    let spoil = |checkpoint: &str, name: &str, at: usize, with: &[u8]| {
        let copy = Copy::of(&format!("tiny-hd64/{checkpoint}"));
        copy.edit_tensor(name, |bytes| bytes[at..at + with.len()].copy_from_slice(with));
        let error = copy.load_error();
        assert_says(&error, &["model.safetensors", name]);
        error
    };
    let nan = f32::NAN.to_le_bytes();
    assert_says(
        &spoil("fp8", &format!("{Q}.weight"), 1234, &[0x7f]),
        &["value 1234"],
    );
    assert_says(
        &spoil("fp8", &format!("{Q}.weight_scale_inv"), 4, &nan),
        &["value 1"],
    );
    let large = (-255f32).to_le_bytes();
    assert_says(
        &spoil("fp8", &format!("{Q}.weight_scale_inv"), 0, &large),
        &["value 0 is -255", "below 255"],
    );
    assert_says(
        &spoil("bf16", &format!("{Q}.weight"), 10, &[0x80, 0x7f]),
        &["value 5"],
    );
    spoil("awq", &format!("{Q}.scales"), 0, &[0, 0x7c]);
    spoil("ct-int4", &format!("{Q}.weight_scale"), 2, &[0xc0, 0xff]);
    let order = spoil("gptq", &format!("{Q}.g_idx"), 4 * 7, &3i32.to_le_bytes());
    assert_says(&order, &["input 7 is of group 3", "act order"]);
    let shape = spoil("ct-int4", &format!("{Q}.weight_shape"), 0, &999i64.to_le_bytes());
    assert_says(&shape, &["[999, 128]"]);
}
