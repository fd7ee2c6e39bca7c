//! Corrupt, lying and incomplete checkpoints: each refused with the file and the tensor.
//!
//! Proves invariant C1 of ARCHITECTURE.md.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::{repository, sharded, tiny};
use conclave_worker::checkpoint::{Checkpoint, header};
use conclave_worker::weights::{Form, Part, Progress, WeightSource};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A copy of a tiny checkpoint that may be spoilt.
struct Copy {
    directory: TempDir,
}

impl Copy {
    fn of(checkpoint: &str) -> Copy {
        let directory = tempfile::tempdir().unwrap();
        let from = repository().join("tests/data/minimax-m2").join(checkpoint);
        for entry in fs::read_dir(from).unwrap() {
            let path = entry.unwrap().path();
            if !path.ends_with("reference.safetensors") {
                fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        Copy { directory }
    }

    /// The tiny BF16 checkpoint, in three files.
    fn in_parts() -> Copy {
        let directory = tempfile::tempdir().unwrap();
        sharded::write(directory.path());
        Copy { directory }
    }

    fn path(&self, file: &str) -> PathBuf {
        self.directory.path().join(file)
    }

    fn model(&self) -> Vec<u8> {
        fs::read(self.path("model.safetensors")).unwrap()
    }

    fn set_model(&self, bytes: &[u8]) {
        fs::write(self.path("model.safetensors"), bytes).unwrap();
    }

    /// Changes the header's JSON; the data stays as it is.
    fn edit_header(&self, edit: impl FnOnce(&mut serde_json::Map<String, Value>)) {
        let bytes = self.model();
        let (json, data) = split(&bytes);
        let mut header: Value = serde_json::from_slice(json).unwrap();
        edit(header.as_object_mut().unwrap());
        self.set_model(&join(&serde_json::to_vec(&header).unwrap(), data));
    }

    /// Changes the bytes of one tensor.
    fn edit_tensor(&self, name: &str, edit: impl FnOnce(&mut [u8])) {
        let mut bytes = self.model();
        let (json, data) = split(&bytes);
        let header: Value = serde_json::from_slice(json).unwrap();
        let start = bytes.len() - data.len();
        let offsets = &header[name]["data_offsets"];
        let range = |at: usize| start + offsets[at].as_u64().unwrap() as usize;
        let (from, to) = (range(0), range(1));
        edit(&mut bytes[from..to]);
        self.set_model(&bytes);
    }

    fn open_error(&self) -> String {
        match Checkpoint::open(self.directory.path(), None) {
            Ok(_) => panic!("it was opened"),
            Err(error) => error.to_string(),
        }
    }

    /// Opens and reads everything; the error of whichever step refuses it.
    fn load_error(&self) -> String {
        load(self.directory.path()).expect_err("it was loaded")
    }
}

fn load(directory: &Path) -> Result<(), String> {
    let source = WeightSource::open(directory, None).map_err(|error| error.to_string())?;
    let spec = source.spec().clone();
    let mut parts = vec![Part::Replicated];
    for (layer, shape) in (0u32..).zip(&spec.layers) {
        parts.extend((0..shape.moe.experts as u32).map(|expert| Part::Expert { layer, expert }));
    }
    source
        .read_in(&parts, 2, &Progress::new(), &|| false)
        .map_err(|error| error.to_string())?;
    for part in parts {
        match part {
            Part::Expert { layer, expert } => drop(
                source
                    .expert(layer, expert, Form::Rows)
                    .map_err(|error| error.to_string())?,
            ),
            Part::Replicated => {
                use conclave_worker::weights::modules;
                source
                    .linear(&modules::embedding(&spec), Form::Rows)
                    .map_err(|error| error.to_string())?;
                for layer in 0..spec.layers.len() {
                    let layer = modules::layer(&spec, layer);
                    for linear in [&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate] {
                        source
                            .linear(linear, Form::Rows)
                            .map_err(|error| error.to_string())?;
                    }
                    source
                        .vector(&layer.attention_norm)
                        .map_err(|error| error.to_string())?;
                }
            }
        }
    }
    Ok(())
}

fn split(bytes: &[u8]) -> (&[u8], &[u8]) {
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[8..].split_at(length)
}

fn join(json: &[u8], data: &[u8]) -> Vec<u8> {
    [&(json.len() as u64).to_le_bytes(), json, data].concat()
}

fn assert_says(error: &str, parts: &[&str]) {
    for part in parts {
        assert!(error.contains(part), "{error:?} lacks {part:?}");
    }
}

const NORM: &str = "model.norm.weight";
const Q: &str = "model.layers.0.self_attn.q_proj";

#[test]
fn every_checkpoint_of_the_tests_loads_whole() {
    for name in ["bf16", "fp8", "awq", "gptq", "ct-int4"] {
        load(&repository().join("tests/data/minimax-m2/tiny-hd64").join(name)).unwrap();
    }
    load(Copy::in_parts().directory.path()).unwrap();
}

#[test]
fn a_file_cut_at_any_place_is_refused() {
    let copy = Copy::of("tiny-hd64/ct-int4");
    let whole = copy.model();
    let cuts = (0..64)
        .chain((64..whole.len()).step_by(4096))
        .chain([whole.len() - 1]);
    for length in cuts {
        copy.set_model(&whole[..length]);
        assert_says(&copy.open_error(), &["model.safetensors"]);
    }
    let mut longer = whole.clone();
    longer.push(0);
    copy.set_model(&longer);
    assert_says(&copy.open_error(), &["model.safetensors", "tensors end after"]);
}

#[test]
fn header_lengths_that_lie_are_refused_without_an_allocation() {
    let copy = Copy::of("tiny-hd64/ct-int4");
    let whole = copy.model();
    let lie = |length: u64| {
        let mut bytes = whole.clone();
        bytes[..8].copy_from_slice(&length.to_le_bytes());
        copy.set_model(&bytes);
        copy.open_error()
    };
    assert_says(&lie(0), &["header"]);
    assert_says(&lie(7), &["header"]);
    assert_says(
        &lie(header::MAX_HEADER_BYTES + 1),
        &["header length is 100000001"],
    );
    assert_says(&lie(1 << 63), &["header length is 9223372036854775808"]);
    assert_says(&lie(u64::MAX), &["header length"]);
    assert_says(&lie(header::MAX_HEADER_BYTES), &["the file ends after"]);
}

#[test]
fn headers_that_are_no_header_are_refused() {
    let copy = Copy::of("tiny-hd64/ct-int4");
    let (deep, nul) = (b"[".repeat(100_000), vec![0u8; 64]);
    for json in [
        &b"[]"[..],
        b"null",
        b"{",
        b"\xff\xfe{}",
        b"{\"a\":{\"dtype\":\"F32\"}}",
        b"{}{}",
        &deep,
        &nul,
    ] {
        copy.set_model(&join(json, &[]));
        assert_says(&copy.open_error(), &["model.safetensors", "header"]);
    }
}

/// Each kind of error that the reference crate has for the bytes of a file, made so that the crate itself gives it. Its
/// others are of single reads (`TensorNotFound`, `InvalidTensorView`, `IoError`) and of writing (`JsonError`); what stands
/// for them here: missing tensors, wrong shapes and files that are no files, in the tests below.
#[test]
fn every_error_kind_of_the_reference_crate_is_refused_here_too() {
    use safetensors::SafeTensorError as Kind;
    let tensor = |dtype: &str, shape: &str, from: u64, to: u64| {
        format!(r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{from},{to}]}}}}"#)
    };
    let file = |header: &str, data: usize| join(header.as_bytes(), &vec![0; data]);
    let length = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
    type Is = fn(&Kind) -> bool;
    let cases: [(Vec<u8>, Is); 11] = [
        (vec![1, 2, 3], |kind| matches!(kind, Kind::HeaderTooSmall)),
        (length(header::MAX_HEADER_BYTES + 1), |kind| {
            matches!(kind, Kind::HeaderTooLarge)
        }),
        (length(1 << 63), |kind| matches!(kind, Kind::HeaderTooLarge)),
        (length(100), |kind| matches!(kind, Kind::InvalidHeaderLength)),
        (join(b"\xff\xfe", &[]), |kind| {
            matches!(kind, Kind::InvalidHeader(_))
        }),
        (join(b"{", &[]), |kind| {
            matches!(kind, Kind::InvalidHeaderDeserialization(_))
        }),
        (file(&tensor("F32", "[2]", 4, 12), 12), |kind| {
            matches!(kind, Kind::InvalidOffset(_))
        }),
        (file(&tensor("F32", "[2]", 0, 4), 4), |kind| {
            matches!(kind, Kind::TensorInvalidInfo)
        }),
        (file(&tensor("F32", "[2]", 0, 8), 9), |kind| {
            matches!(kind, Kind::MetadataIncompleteBuffer)
        }),
        (
            file(&tensor("F32", "[4294967296,4294967296,4294967296]", 0, 8), 8),
            |kind| matches!(kind, Kind::ValidationOverflow),
        ),
        (file(&tensor("F4", "[1]", 0, 1), 1), |kind| {
            matches!(kind, Kind::MisalignedSlice)
        }),
    ];
    for (bytes, is) in cases {
        let kind = safetensors::SafeTensors::deserialize(&bytes).expect_err("the crate refuses it");
        let copy = Copy::of("tiny-hd64/ct-int4");
        copy.set_model(&bytes);
        let error = copy.open_error();
        assert!(is(&kind), "another kind: {kind:?} ({error})");
        assert_says(&error, &["model.safetensors"]);
    }
}

#[test]
fn tensors_that_lie_about_their_place_are_refused_by_name() {
    type Edit = fn(&mut Value);
    let cases: [(&str, Edit); 7] = [
        ("the end lies before the begin", |info| {
            let (a, b) = (info["data_offsets"][0].clone(), info["data_offsets"][1].clone());
            info["data_offsets"] = json!([b, a]);
        }),
        ("BF16 [129] takes 258 bytes", |info| info["shape"] = json!([129])),
        ("no whole number of bytes that fits", |info| {
            info["shape"] = json!([1u64 << 40, 1u64 << 40])
        }),
        ("takes 512 bytes", |info| info["dtype"] = json!("F32")),
        ("unknown variant", |info| info["dtype"] = json!("F33")),
        ("invalid value", |info| info["shape"] = json!([-1])),
        ("the file holds", |info| {
            let from = info["data_offsets"][0].as_u64().unwrap();
            info["shape"] = json!([1u64 << 30]);
            info["data_offsets"] = json!([from, from + (2u64 << 30)]);
        }),
    ];
    for (expected, edit) in cases {
        let copy = Copy::of("tiny-hd64/bf16");
        copy.edit_header(|header| edit(&mut header[NORM]));
        assert_says(&copy.open_error(), &["model.safetensors", "tensor", expected]);
    }
}

#[test]
fn overlaps_holes_and_tensors_listed_twice_are_refused() {
    let copy = Copy::of("tiny-hd64/bf16");
    let other = "model.layers.0.input_layernorm.weight";
    copy.edit_header(|header| header[other]["data_offsets"] = header[NORM]["data_offsets"].clone());
    assert_says(&copy.open_error(), &["tensor"]);
    let copy = Copy::of("tiny-hd64/bf16");
    copy.edit_header(|header| drop(header.remove(other)));
    assert_says(&copy.open_error(), &["leaves a hole"]);
    let copy = Copy::of("tiny-hd64/bf16");
    let bytes = copy.model();
    let (json, data) = split(&bytes);
    let text = String::from_utf8(json.to_vec()).unwrap();
    let entry = format!("{{\"{NORM}\":{{\"dtype\":\"BF16\",\"shape\":[0],\"data_offsets\":[0,0]}},");
    let twice = text.trim_end().replacen('{', &entry, 1);
    copy.set_model(&join(twice.as_bytes(), data));
    assert_says(&copy.open_error(), &[NORM, "listed twice"]);
}

#[test]
fn a_sharded_checkpoint_must_be_complete_and_agree_with_its_index() {
    let second = &sharded::part(2);
    let copy = Copy::in_parts();
    fs::remove_file(copy.path(second)).unwrap();
    assert_says(&copy.open_error(), &[second, "No such file"]);

    let copy = Copy::in_parts();
    fs::copy(copy.path(&sharded::part(1)), copy.path(second)).unwrap();
    assert_says(&copy.open_error(), &[second, "the file does not hold it"]);

    let copy = Copy::in_parts();
    fs::remove_file(copy.path("model.safetensors.index.json")).unwrap();
    assert_says(&copy.open_error(), &["model.safetensors.index.json", "in parts"]);

    let edit = |edit: fn(&mut Value)| {
        let copy = Copy::in_parts();
        let path = copy.path("model.safetensors.index.json");
        let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        edit(&mut index["weight_map"]);
        fs::write(&path, serde_json::to_vec(&index).unwrap()).unwrap();
        copy.open_error()
    };
    // The tensor is in another file than the index says.
    let moved = edit(|map| map[NORM] = json!("model-00001-of-00003.safetensors"));
    assert_says(&moved, &[NORM]);
    assert_says(
        &edit(|map| map["no.such.tensor"] = json!("model-00001-of-00003.safetensors")),
        &["no.such.tensor"],
    );
    for name in [
        "../model.safetensors",
        "/etc/passwd",
        "a/b.safetensors",
        "model.bin",
        "",
    ] {
        let copy = Copy::in_parts();
        let path = copy.path("model.safetensors.index.json");
        fs::write(&path, json!({"weight_map": {"a": name}}).to_string()).unwrap();
        assert_says(&copy.open_error(), &["no plain file name"]);
    }
    assert_says(&edit(|map| *map = json!({})), &["names 0 files"]);
    assert_says(&edit(|map| *map = json!([])), &["index.json"]);
}

#[test]
fn what_is_no_file_is_refused() {
    let copy = Copy::of("tiny-hd64/ct-int4");
    fs::remove_file(copy.path("model.safetensors")).unwrap();
    assert_says(&copy.open_error(), &["model.safetensors", "missing"]);
    fs::create_dir(copy.path("model.safetensors")).unwrap();
    assert_says(&copy.open_error(), &["model.safetensors"]);
    fs::remove_dir(copy.path("model.safetensors")).unwrap();
    fs::write(copy.path("model.safetensors"), b"").unwrap();
    assert_says(&copy.open_error(), &["it is empty"]);
    fs::remove_file(copy.path("config.json")).unwrap();
    assert_says(&copy.open_error(), &["config.json"]);
}

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

#[test]
fn the_identity_is_of_config_and_table_and_not_of_the_layout() {
    let id =
        |path: &Path, overrides: Option<&Value>| Checkpoint::open(path, overrides).unwrap().id().to_owned();
    let data = repository().join("tests/data/minimax-m2");
    let whole = id(&tiny(), None);
    assert_eq!(whole, id(Copy::in_parts().directory.path(), None));
    assert_ne!(whole, id(&data.join("tiny-hd64/fp8"), None));
    assert_ne!(whole, id(&tiny(), Some(&json!({"num_hidden_layers": 2}))));
    let copy = Copy::of("tiny-hd64/bf16");
    let config: Value = serde_json::from_slice(&fs::read(copy.path("config.json")).unwrap()).unwrap();
    let reversed: serde_json::Map<String, Value> = config
        .as_object()
        .unwrap()
        .iter()
        .rev()
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    fs::write(
        copy.path("config.json"),
        serde_json::to_vec_pretty(&reversed).unwrap(),
    )
    .unwrap();
    assert_eq!(whole, id(copy.directory.path(), None));
}

#[test]
fn tied_embeddings_and_extra_layers_are_understood() {
    let copy = Copy::of("tiny-hd64/bf16");
    let path = copy.path("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["tie_word_embeddings"] = json!(true);
    fs::write(&path, config.to_string()).unwrap();
    // An MTP layer after the last one, and no head.
    copy.edit_header(|header| {
        let head = header.remove("lm_head.weight").unwrap();
        header.insert("model.layers.3.eh_proj.weight".into(), head);
    });
    load(copy.directory.path()).unwrap();
    let source = WeightSource::open(copy.directory.path(), None).unwrap();
    use conclave_worker::weights::modules;
    assert_eq!(modules::head(source.spec()), modules::embedding(source.spec()));
}

#[test]
fn fewer_layers_by_override_load_only_theirs() {
    let source = WeightSource::open(&tiny(), Some(&json!({"num_hidden_layers": 1}))).unwrap();
    let all = WeightSource::open(&tiny(), None).unwrap();
    assert_eq!(source.stored_by_kind().experts * 3, all.stored_by_kind().experts);
    let progress = Progress::new();
    source
        .read_in(&[Part::Replicated], 2, &progress, &|| false)
        .unwrap();
    assert_eq!(progress.get().0, source.stored_bytes(&[Part::Replicated]));
    assert!(
        source
            .read_in(&[Part::Replicated], 2, &progress, &|| true)
            .unwrap_err()
            .to_string()
            .contains("cancelled")
    );
}
