//! `conclave plan` for people.

use std::fmt::Write;

use super::report::{CheckpointSize, Group, Report};
use crate::units::{gb, gib, thousands};

pub fn render(report: &Report) -> String {
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "{}: {}, {} layers, hidden {}, {} experts ({} per token), up to {} tokens, quantization {}",
        report.model,
        report.family,
        report.layers,
        report.hidden,
        report.experts,
        report.experts_per_token,
        thousands(report.max_position as u64),
        report.quantization,
    );
    parameters(&mut out, report);
    sizes(&mut out, "Checkpoint", &report.checkpoint);
    sizes(&mut out, "One expert", &report.expert_bytes);
    traffic(&mut out, report);
    group(&mut out, &report.group);
    bounds(&mut out, report);
    out
}

fn parameters(out: &mut String, report: &Report) {
    let p = &report.parameters;
    let rows = [
        ("embedding", p.embedding),
        ("head", p.head),
        ("q projection", p.layer.q),
        ("k projection", p.layer.k),
        ("v projection", p.layer.v),
        ("o projection", p.layer.o),
        ("attention per layer", p.layer.attention),
        ("norms per layer", p.layer.norms),
        ("gate per layer", p.layer.gate),
        ("selection bias per layer", p.layer.bias),
        ("one expert", p.layer.expert),
        ("experts per layer", p.layer.experts),
        ("layer", p.layer.total),
        ("all attention", p.attention),
        ("all experts", p.experts),
        ("total", p.total),
        ("FP8 scales, if FP8", report.fp8_scale_elements),
        ("total with FP8 scales", p.total + report.fp8_scale_elements),
        ("active per token", p.active),
        ("active, with the embedding table", p.active + p.embedding),
    ];
    let _ = writeln!(out, "\nParameters");
    for (name, value) in rows {
        let _ = writeln!(out, "  {name:<44}{:>20}", thousands(value));
    }
}

fn sizes(out: &mut String, title: &str, rows: &[CheckpointSize]) {
    let _ = writeln!(out, "\n{title}");
    for row in rows {
        let mark = if row.this { "  <- this checkpoint" } else { "" };
        let size = if row.bytes < 1 << 30 {
            format!("{:>20} B", thousands(row.bytes))
        } else {
            format!(
                "{:>10} GB {:>10} GiB",
                gb(row.bytes as f64),
                gib(row.bytes as f64)
            )
        };
        let _ = writeln!(out, "  {:<44}{size}{mark}", row.format);
    }
}

fn traffic(out: &mut String, report: &Report) {
    let kv = &report.kv_bytes_per_token;
    let dispatch = &report.dispatch_bytes_per_token_and_layer;
    let _ = writeln!(out, "\nPer token");
    let rows = [
        ("KV cache, bf16", format!("{} B", thousands(kv.bf16))),
        ("KV cache, fp8", format!("{} B", thousands(kv.fp8))),
        (
            "dispatch per layer, bf16",
            format!("{} B", thousands(dispatch.bf16)),
        ),
        (
            "dispatch per layer, fp8 with scales",
            format!("{} B", thousands(dispatch.fp8)),
        ),
        (
            "operations with weights",
            format!("{:.2} GFLOP", report.flops_per_token as f64 / 1e9),
        ),
        (
            "operations of attention at 8,192 tokens",
            format!("{:.2} GFLOP", report.attention_flops_at_8192 as f64 / 1e9),
        ),
    ];
    for (name, value) in rows {
        let _ = writeln!(out, "  {name:<44}{value:>20}");
    }
    let _ = writeln!(out, "\nExperts of a layer that a batch is expected to touch");
    for distinct in &report.distinct_experts {
        let _ = writeln!(out, "  batch {:<38}{:>20.2}", distinct.batch, distinct.experts);
    }
}

fn group(out: &mut String, group: &Group) {
    let _ = writeln!(
        out,
        "\n{} x {}, {} GiB used of each, before activations",
        group.workers,
        group.gpu,
        gib(group.memory_bytes_per_rank as f64),
    );
    let _ = writeln!(
        out,
        "  rank  experts   replicated      experts        total    KV tokens bf16   KV tokens fp8"
    );
    for rank in &group.ranks {
        let bytes = &rank.bytes;
        let kv = if rank.fits {
            format!(
                "{:>17} {:>15}",
                thousands(rank.kv_tokens.bf16),
                thousands(rank.kv_tokens.fp8)
            )
        } else {
            format!(
                "  does not fit: {} GB too much",
                gb((bytes.total() - group.memory_bytes_per_rank) as f64)
            )
        };
        let _ = writeln!(
            out,
            "  {:>4}  {:>7} {:>9} GB {:>9} GB {:>9} GB {kv}",
            bytes.rank,
            bytes.experts,
            gb(bytes.replicated as f64),
            gb(bytes.expert_weights as f64),
            gb(bytes.total() as f64),
        );
    }
    let once = &group.kv_tokens_weights_once;
    let _ = writeln!(
        out,
        "  were attention not replicated, the group would hold {} tokens of bf16 KV, {} of fp8",
        thousands(once.bf16),
        thousands(once.fp8)
    );
    let imbalance: Vec<String> = group
        .imbalance
        .iter()
        .map(|row| format!("{:.2} at {}", row.max_over_mean, row.batch))
        .collect();
    let _ = writeln!(
        out,
        "  most loaded rank over the mean, uniform routing, by tokens in a step: {}",
        imbalance.join(", ")
    );
}

fn bounds(out: &mut String, report: &Report) {
    let _ = writeln!(
        out,
        "\nDecode, bounded by reading at data-sheet bandwidth (a ceiling, not a forecast; bf16 KV)"
    );
    for bound in &report.decode_bounds {
        let _ = writeln!(
            out,
            "  batch {:>4}, context {:>6}: weights {:>8} GB + KV {:>8} GB -> {:>8.3} ms/step {:>10.0} tok/s",
            bound.batch,
            bound.context,
            gb(bound.weight_bytes),
            gb(bound.kv_bytes),
            bound.milliseconds,
            bound.tokens_per_second,
        );
    }
}
