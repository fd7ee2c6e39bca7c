//! The figures of the real MiniMax-M2.7 config, equal to what `tests/data/minimax-m2/bytes.py` prints, and sizes of
//! the small checkpoints, equal to their files.

use std::fs;
use std::path::{Path, PathBuf};

use conclave_plan::balance::{busiest_rank_experts, max_over_mean_load};
use conclave_plan::config::{self, Config};
use conclave_plan::gpu::{H100, H200};
use conclave_plan::memory::{expert_capacity, fewest_ranks, kv_bytes_per_token, kv_tokens, ranks};
use conclave_plan::model::ModelSpec;
use conclave_plan::parameters::Parameters;
use conclave_plan::placement::Placement;
use conclave_plan::roofline;
use conclave_plan::storage::{FP8_BLOCK, LinearFormat, StorageFormat};
use serde_json::Value;

fn data(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../tests/data/minimax-m2")
        .join(path)
}

fn read(path: &str) -> Config {
    config::read(&data(path), None).unwrap_or_else(|error| panic!("{path}: {error}"))
}

fn real() -> ModelSpec {
    read("full-size/fp8").spec
}

const FP8: StorageFormat = StorageFormat {
    attention: FP8_BLOCK,
    experts: FP8_BLOCK,
};
const INT4: StorageFormat = StorageFormat {
    attention: LinearFormat::awq(128),
    experts: LinearFormat::awq(128),
};

#[test]
fn parameters() {
    let p = Parameters::of(&real());
    assert_eq!((p.embedding, p.head), (614_596_608, 614_596_608));
    let layer = p.layer;
    assert_eq!(
        (layer.q, layer.k, layer.v, layer.o),
        (18_874_368, 3_145_728, 3_145_728, 18_874_368)
    );
    assert_eq!((layer.attention, layer.norms), (44_040_192, 13_312));
    assert_eq!((layer.gate, layer.bias), (786_432, 256));
    assert_eq!(
        (layer.expert, layer.experts, layer.total),
        (14_155_776, 3_623_878_656, 3_668_718_848)
    );
    assert_eq!((p.attention, p.experts), (2_730_491_904, 224_680_476_672));
    assert_eq!(p.total, 228_689_764_864);
    assert_eq!(p.active, 10_415_956_480);
}

#[test]
fn checkpoint_bytes_per_format() {
    let mixed = |attention, experts| StorageFormat { attention, experts };
    let int4 = LinearFormat::awq(128);
    let cases = [
        (StorageFormat::SIXTEEN_BIT, "457.48", "426.06"),
        (FP8, "230.12", "214.32"),
        (INT4, "120.80", "112.51"),
        (mixed(FP8_BLOCK, int4), "122.11", "113.73"),
        (mixed(LinearFormat::SixteenBit, int4), "124.84", "116.27"),
        (
            mixed(LinearFormat::SixteenBit, LinearFormat::pack_quantized(32)),
            "134.50",
            "125.26",
        ),
    ];
    for (format, gb, gib) in cases {
        let total = format.bytes(&real()).total() as f64;
        assert_eq!(
            (
                format!("{:.2}", total / 1e9),
                format!("{:.2}", total / f64::from(1 << 30))
            ),
            (gb.into(), gib.into())
        );
    }
    assert_eq!(FP8.bytes(&real()).expert, 14_155_776 + 3_456);
    assert_eq!(INT4.bytes(&real()).expert, 7_354_368);
    assert_eq!(StorageFormat::SIXTEEN_BIT.bytes(&real()).expert, 28_311_552);
}

#[test]
fn the_format_follows_from_the_config() {
    let format = |path: &str| {
        let config = read(path);
        StorageFormat::of(&config.spec, config.quant.as_ref())
    };
    assert_eq!(format("full-size/bf16"), StorageFormat::SIXTEEN_BIT);
    assert_eq!(format("full-size/fp8"), FP8);
    assert_eq!(format("full-size/awq"), INT4);
    let packed = format("full-size/ct-int4-g32");
    assert_eq!(packed.attention, LinearFormat::SixteenBit);
    assert_eq!(packed.experts, LinearFormat::pack_quantized(32));
}

#[test]
fn kv_cache() {
    assert_eq!(kv_bytes_per_token(&real(), 2), 253_952);
    assert_eq!(kv_bytes_per_token(&real(), 1), 126_976);
    let fits = |gpus: u64, format: StorageFormat, value_bytes| {
        let weights = format.bytes(&real()).total();
        kv_tokens(
            gpus * H200.usable_bytes,
            weights,
            kv_bytes_per_token(&real(), value_bytes),
        )
    };
    assert_eq!((fits(1, INT4, 2), fits(1, INT4, 1)), (112_020, 224_041));
    assert_eq!((fits(2, FP8, 2), fits(2, FP8, 1)), (269_257, 538_515));
    assert_eq!(fits(1, FP8, 2), 0);
}

#[test]
fn distinct_experts() {
    let expected = [
        (1, "8.00"),
        (2, "15.75"),
        (4, "30.53"),
        (8, "57.42"),
        (16, "101.96"),
        (32, "163.31"),
        (64, "222.44"),
        (128, "251.60"),
        (256, "255.92"),
    ];
    for (batch, experts) in expected {
        assert_eq!(
            format!("{:.2}", roofline::distinct_experts(256, 8, batch)),
            experts
        );
    }
}

#[test]
fn reading_bounds_a_step() {
    // (format, GPUs, KV bytes, batch, context) -> weights GB, KV GB, ms
    let cases = [
        (INT4, 1.0, 2, 1, 0, "6.49", "0.00", "1.353"),
        (INT4, 1.0, 2, 32, 8192, "77.31", "66.57", "29.976"),
        (INT4, 1.0, 1, 256, 65536, "119.54", "2130.30", "468.717"),
        (FP8, 2.0, 2, 1, 8192, "11.18", "2.08", "1.381"),
        (FP8, 2.0, 2, 256, 0, "228.83", "0.00", "23.836"),
        (FP8, 2.0, 1, 32, 65536, "147.53", "266.29", "43.106"),
    ];
    for (format, gpus, kv, batch, context, weights, cache, ms) in cases {
        let bytes = roofline::step_bytes(&real(), &format, batch, context, kv);
        let seconds = bytes.seconds(gpus * H200.bandwidth);
        let found = (
            format!("{:.2}", bytes.weights / 1e9),
            format!("{:.2}", bytes.kv / 1e9),
            format!("{:.3}", seconds * 1e3),
        );
        assert_eq!(found, (weights.into(), cache.into(), ms.into()));
    }
    assert_eq!(
        format!("{:.2}", roofline::flops_per_token(&real()) as f64 / 1e9),
        "20.83"
    );
    assert_eq!(
        format!("{:.2}", roofline::attention_flops(&real(), 8192) as f64 / 1e9),
        "12.48"
    );
    assert_eq!(roofline::dispatch_bytes_bf16(&real()), 49_152);
    assert_eq!(roofline::dispatch_bytes_fp8(&real()), 25_344);
}

#[test]
fn uniform_routing_loads_ranks_unevenly() {
    let expected = [
        (2, [1.26, 1.10, 1.05, 1.03, 1.02]),
        (4, [1.75, 1.26, 1.12, 1.06, 1.04]),
        (8, [2.55, 1.54, 1.26, 1.13, 1.09]),
    ];
    for (ranks, figures) in expected {
        for (batch, figure) in [1, 8, 32, 128, 256].into_iter().zip(figures) {
            let found = max_over_mean_load(&Placement::even(256, ranks), 8, batch, 400);
            assert!(
                (found / figure - 1.0).abs() < 0.03,
                "{ranks} ranks, {batch} tokens: {found}, not {figure}"
            );
        }
    }
}

#[test]
fn the_busiest_rank_reads_more_than_its_share() {
    let bytes =
        |batch, ranks| roofline::busiest_rank_bytes(&real(), &FP8, (batch, ranks), 0, 2).weights / 1e9;
    let share = |batch, ranks| {
        let expected = roofline::distinct_experts(256, 8, batch) / f64::from(ranks);
        busiest_rank_experts(&Placement::even(256, ranks), 8, batch as u32, 400) / expected
    };
    // One token: of eight experts the busier of two ranks has 5.1 in the mean.
    for (batch, ranks, figure) in [(1, 2, 1.27), (8, 2, 1.08), (32, 4, 1.10), (128, 8, 1.03)] {
        let found = share(batch, ranks);
        assert!(
            (found / figure - 1.0).abs() < 0.03,
            "{batch} tokens, {ranks} ranks: {found}, not {figure}"
        );
    }
    let alone = roofline::step_bytes(&real(), &FP8, 32, 0, 2).weights / 1e9;
    assert_eq!(bytes(32, 1), alone);
    assert!(bytes(32, 2) > alone / 2.0 && bytes(32, 2) < alone * 0.6);
}

#[test]
fn ranks_hold_their_experts_and_what_all_hold() {
    let spec = real();
    let two = ranks(&spec, &FP8, &Placement::even(256, 2));
    let all = FP8.bytes(&spec);
    assert_eq!(
        two.iter().map(|rank| rank.experts).collect::<Vec<_>>(),
        [128, 128]
    );
    assert_eq!(
        two.iter().map(|rank| rank.expert_weights).sum::<u64>(),
        all.experts
    );
    assert_eq!(two[0].total(), all.replicated() + all.experts / 2);
    // Published guides count weights once and come to 6 H100 for BF16; attention replicated on each rank needs a seventh.
    let fewest = |format, memory| fewest_ranks(&spec, &format, memory, 1 << 30).expect("fits");
    let on = |format| {
        (
            fewest(format, H200.usable_bytes),
            fewest(format, H100.usable_bytes),
        )
    };
    assert_eq!(on(FP8), (2, 3));
    assert_eq!(on(INT4), (1, 2));
    assert_eq!(on(StorageFormat::SIXTEEN_BIT), (4, 7));
    assert_eq!(expert_capacity(&spec, &FP8, 4 << 30, 0), 0);
    let error = fewest_ranks(&spec, &FP8, 4 << 30, 0)
        .expect_err("too small")
        .to_string();
    assert!(error.contains("one expert of each layer"), "{error}");
}

/// Bytes of all tensors in a safetensors file: what follows the header.
fn tensor_bytes(path: &Path) -> u64 {
    let file = fs::read(path).expect("checkpoint");
    let header = u64::from_le_bytes(file[..8].try_into().expect("8 bytes"));
    file.len() as u64 - 8 - header
}

#[test]
fn sizes_of_the_small_checkpoints_are_exact() {
    let formats = ["bf16", "fp8", "awq", "gptq", "ct-int4"].map(|format| format!("tiny-hd64/{format}"));
    let others = [
        "tiny-hd128/bf16",
        "tiny-hd128/fp8",
        "tiny-hd128/awq",
        "../../../models/demo",
    ]
    .map(str::to_owned);
    for path in formats.into_iter().chain(others) {
        let config = read(&path);
        let format = StorageFormat::of(&config.spec, config.quant.as_ref());
        let found = format.bytes(&config.spec).total();
        assert_eq!(
            found,
            tensor_bytes(&data(&path).join("model.safetensors")),
            "{path}"
        );
    }
    let demo: Value = read("../../../models/demo").raw;
    assert_eq!(demo["vocab_size"], 3072);
}
