//! INT4 as checkpoints store it, which GPUs repack by themselves, says the same as the rows that CPUs compute on; and what is
//! read from the file is what is mapped.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod common;

use common::{repository, tiny};
use conclave_kernels::weight::{Bytes, HostInt4, HostWeight, PackedInt4, PackedOrder, ScaleType};
use conclave_worker::weights::{Form, WeightSource, modules};

/// Output of an AWQ word's eight that nibble n holds.
const AWQ: [usize; 8] = [0, 2, 4, 6, 1, 3, 5, 7];

/// All bytes, read in two parts.
fn read(bytes: &Bytes) -> Vec<u8> {
    let mut read = vec![0; (**bytes).as_ref().len()];
    let cut = read.len() / 3;
    let (first, second) = read.split_at_mut(cut);
    bytes.read_at(0, first).expect("the first part");
    bytes.read_at(cut, second).expect("the rest");
    assert_eq!(read, (**bytes).as_ref(), "read and mapped");
    read
}

fn nibble(words: &[u8], word: usize, n: usize) -> u8 {
    words[word * 4 + n / 2] >> (4 * (n % 2)) & 15
}

/// Value, scale and zero point of (output, input) where the checkpoint has them.
fn stored(
    packed: &PackedInt4,
    words: &[u8],
    outputs: usize,
    inputs: usize,
    (o, i): (usize, usize),
) -> (u8, f32, u8) {
    let (scales, group) = (read(&packed.scales), i / packed.group);
    let across = |n: usize| match packed.order {
        PackedOrder::Outputs => AWQ.iter().position(|&output| output == n).expect("one of eight"),
        PackedOrder::Inputs | PackedOrder::Rows => n,
    };
    let (value, at) = match packed.order {
        PackedOrder::Rows => (
            nibble(words, (o * inputs + i) / 8, i % 8),
            o * (inputs / packed.group) + group,
        ),
        PackedOrder::Inputs => (nibble(words, i / 8 * outputs + o, i % 8), group * outputs + o),
        PackedOrder::Outputs => (
            nibble(words, i * (outputs / 8) + o / 8, across(o % 8)),
            group * outputs + o,
        ),
    };
    let two = |at: usize| [scales[2 * at], scales[2 * at + 1]];
    let scale = match packed.scale_type {
        ScaleType::F16 => half::f16::from_le_bytes(two(at)).to_f32(),
        ScaleType::Bf16 => half::bf16::from_le_bytes(two(at)).to_f32(),
        ScaleType::F32 => f32::from_le_bytes(scales[4 * at..4 * at + 4].try_into().expect("four bytes")),
    };
    let zero = packed.zeros.as_ref().map_or(8, |zeros| {
        nibble(&read(zeros), group * (outputs / 8) + o / 8, across(o % 8)) + packed.zeros_less
    });
    (value, scale, zero)
}

fn rows(host: &HostInt4, inputs: usize, (o, i): (usize, usize)) -> (u8, f32, u8) {
    let at = o * (inputs / host.group) + i / host.group;
    let byte = (*host.packed).as_ref()[(o * inputs + i) / 2];
    (
        byte >> (4 * (i % 2)) & 15,
        host.scales[at],
        host.zeros.as_ref().map_or(8, |zeros| zeros[at]),
    )
}

#[test]
fn packed_and_repacked_are_the_same_weights() {
    let mut seen = Vec::new();
    for folder in [
        "tiny-hd64/ct-int4",
        "tiny-hd64/gptq",
        "tiny-hd64/awq",
        "tiny-hd128/awq",
    ] {
        let source = WeightSource::open(&repository().join("tests/data/minimax-m2").join(folder), None)
            .expect("a checkpoint");
        let layer = modules::layer(source.spec(), 0);
        let expert = modules::expert(source.spec(), 1, 0);
        for module in [&layer.q, &layer.o, &expert.gate, &expert.down] {
            let linear = |form| source.linear(module, form).expect("a module").data;
            let (HostWeight::Packed(packed), HostWeight::Int4(host)) =
                (linear(Form::Packed), linear(Form::Rows))
            else {
                // compressed-tensors leaves attention as it is.
                assert!(
                    matches!(linear(Form::Packed), HostWeight::Bf16(_)),
                    "{}",
                    module.name
                );
                continue;
            };
            assert_eq!(packed.group, host.group, "{}", module.name);
            let (outputs, inputs) = (module.out_features, module.in_features);
            let words = read(&packed.words);
            // Every output with some inputs of every group, and every input of some outputs.
            let some = (0..outputs).flat_map(|o| (o % 7..inputs).step_by(29).map(move |i| (o, i)));
            for at in some.chain((0..inputs).map(|i| (i % outputs, i))) {
                let found = stored(&packed, &words, outputs, inputs, at);
                assert_eq!(found, rows(&host, inputs, at), "{folder} {} {at:?}", module.name);
            }
            seen.push(packed.order);
        }
    }
    for order in [PackedOrder::Rows, PackedOrder::Inputs, PackedOrder::Outputs] {
        assert!(seen.contains(&order), "{order:?}");
    }
}

#[test]
fn a_file_that_has_become_too_short_is_named() {
    let folder = tempfile::tempdir().expect("a folder");
    for file in ["config.json", "model.safetensors"] {
        std::fs::copy(tiny().join(file), folder.path().join(file)).expect("a copy");
    }
    let source = WeightSource::open(folder.path(), None).expect("a checkpoint");
    let head = source
        .linear(&modules::head(source.spec()), Form::Packed)
        .expect("a module");
    let HostWeight::Bf16(bytes) = head.data else {
        panic!("the head is not BF16");
    };
    let path = folder.path().join("model.safetensors");
    std::fs::File::options()
        .write(true)
        .open(&path)
        .and_then(|file| file.set_len(100))
        .expect("cut short");
    // Mapped, these bytes would end the process.
    let error = bytes
        .read_at(0, &mut [0; 64])
        .expect_err("bytes that are gone")
        .to_string();
    assert!(error.contains(&path.display().to_string()), "{error}");
}
