//! Files that are no checkpoint: cut, with headers that lie, incomplete, or of another kind.

use std::fs;

use conclave_worker::checkpoint::header;
use serde_json::{Value, json};

use crate::common::sharded;
use crate::copy::{Copy, NORM, assert_says, join, split};

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
