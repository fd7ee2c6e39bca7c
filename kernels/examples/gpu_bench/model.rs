//! MiniMax-M2.7's shapes with random weights on the device, and the bytes of a checkpoint of that format.

use conclave_kernels::backend::*;
use conclave_kernels::cuda::{CudaBackend, WeightKind};
use conclave_plan::model::*;

use crate::Arguments;

pub const HIDDEN: usize = 3072;
pub const HEADS: usize = 48;
pub const KV_HEADS: usize = 8;
pub const HEAD_DIM: usize = 128;
pub const EXPERTS: usize = 256;
pub const TOP_K: usize = 8;
pub const INTER: usize = 1536;
pub const VOCAB: usize = 200_064;
pub const PAGE: usize = 16;
/// Rows of logits and decode tokens at a time.
const ROWS: usize = 128;
/// Memory left to the driver: graphs, modules, small lists.
const RESERVE: usize = 256 << 20;

/// Formats of attention and experts.
#[derive(Clone, Copy)]
pub struct Kinds {
    pub name: &'static str,
    pub attention: WeightKind,
    pub experts: WeightKind,
}

impl Kinds {
    pub fn named(name: &str) -> Kinds {
        match name {
            "int4" => Kinds {
                name: "int4 g128",
                attention: WeightKind::Int4,
                experts: WeightKind::Int4,
            },
            "ct" => Kinds {
                name: "int4 g32 experts, bf16 attention",
                attention: WeightKind::Bf16,
                experts: WeightKind::Int4G32,
            },
            "fp8" => Kinds {
                name: "fp8 block",
                attention: WeightKind::Fp8,
                experts: WeightKind::Fp8,
            },
            "bf16" => Kinds {
                name: "bf16",
                attention: WeightKind::Bf16,
                experts: WeightKind::Bf16,
            },
            other => panic!("unknown format {other}"),
        }
    }
}

/// Bytes of `n` weights in a checkpoint.
pub fn stored(kind: WeightKind, n: usize) -> f64 {
    let n = n as f64;
    match kind {
        WeightKind::Int4 => n / 2.0 + n / 128.0 * 2.5,
        WeightKind::Int4G32 => n / 2.0 + n / 32.0 * 2.0,
        WeightKind::Fp8 => n + n / 16384.0 * 4.0,
        WeightKind::Bf16 => n * 2.0,
        WeightKind::F32 => n * 4.0,
    }
}

pub struct Setup {
    pub backend: CudaBackend,
    pub kinds: Kinds,
    pub layers: usize,
    pub kv: KvDtype,
    pub logits: Buffer,
    pub bandwidth: f64,
    pub pages: usize,
    weights: u64,
}

fn spec(layers: usize) -> ModelSpec {
    let attention = AttentionSpec {
        heads: HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        rotary_dim: 64,
        rope_theta: 5e6,
        qk_norm: QkNorm::WholeProjection,
    };
    let moe = MoeSpec {
        experts: EXPERTS,
        top_k: TOP_K,
        intermediate: INTER,
        scoring: Scoring::Sigmoid,
        selection_bias: true,
        renormalize: true,
    };
    ModelSpec {
        family: "minimax_m2".into(),
        hidden: HIDDEN,
        vocab: VOCAB,
        rms_eps: 1e-6,
        max_position: 204_800,
        layers: vec![LayerSpec { attention, moe }; layers],
        eos_token_ids: Vec::new(),
        bos_token_id: None,
        names: TensorNames::default(),
    }
}

impl Setup {
    pub fn new(arguments: &Arguments) -> Setup {
        let steps = arguments.steps + 16;
        let traced: Vec<_> = arguments.trace.iter().map(|context| (1, *context)).collect();
        let decode = arguments.decode.iter().chain(&arguments.profile).chain(&traced);
        let needed = |batch: usize, context: usize| batch * (context + steps).div_ceil(PAGE);
        let longest = |context: usize| (context + steps).div_ceil(PAGE);
        let prompts = arguments
            .prefill
            .iter()
            .chain(&arguments.profile_prefill)
            .copied()
            .max()
            .unwrap_or(0);
        let prompt_pages = prompts.div_ceil(PAGE);
        let pages = decode
            .clone()
            .map(|&(b, c)| needed(b, c))
            .max()
            .unwrap_or(1)
            .max(prompt_pages);
        let table = decode
            .map(|&(_, c)| longest(c))
            .max()
            .unwrap_or(1)
            .max(prompt_pages);
        let limits = Limits {
            max_tokens: prompts.max(ROWS),
            max_logit_rows: ROWS,
            max_runs: ROWS,
            max_pages_per_run: table,
            max_expert_rows: prompts.max(ROWS) * TOP_K,
            page_tokens: PAGE,
        };
        let mut backend = CudaBackend::new(limits, 0).unwrap();
        if arguments.deterministic {
            assert!(backend.set_deterministic(true).unwrap());
        }
        if arguments.fp8_activations {
            assert!(backend.set_fp8_activations(true).unwrap());
        }
        let bandwidth = backend.read_bandwidth(8 << 30, 8).unwrap();
        let before = backend.memory().unwrap().0;
        let (kinds, b) = (arguments.kinds, &mut backend);
        let mut seed = 1;
        let mut next = || {
            seed += 1;
            seed
        };
        let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
        let handles: Vec<_> = (0..arguments.layers)
            .map(|_| {
                let mut matrix = |rows, inputs, kind| b.dummy_linear(rows, inputs, kind, next()).unwrap();
                let (wq, wk) = (
                    matrix(q, HIDDEN, kinds.attention),
                    matrix(kv, HIDDEN, kinds.attention),
                );
                let (wv, wo) = (
                    matrix(kv, HIDDEN, kinds.attention),
                    matrix(HIDDEN, q, kinds.attention),
                );
                let gate = matrix(EXPERTS, HIDDEN, WeightKind::F32);
                let mut vector = |len, base, noise| b.dummy_vector(len, base, noise, next()).unwrap();
                let (norm, moe_norm) = (vector(HIDDEN, 1.0, 0.1), vector(HIDDEN, 1.0, 0.1));
                let (q_norm, k_norm) = (vector(q, 1.0, 0.1), vector(kv, 1.0, 0.1));
                let bias = match arguments.zipf {
                    0.0 => vector(EXPERTS, 0.0, 0.01),
                    power => b.upload_vector(&skew(power, next())).unwrap(),
                };
                let experts = b
                    .dummy_experts(EXPERTS, HIDDEN, INTER, kinds.experts, next())
                    .unwrap();
                let attention = AttentionWeights {
                    norm,
                    q: wq,
                    k: wk,
                    v: wv,
                    o: wo,
                    q_norm: Some(q_norm),
                    k_norm: Some(k_norm),
                };
                (attention, moe_norm, gate, bias, experts)
            })
            .collect();
        let embedding = b.dummy_linear(VOCAB, HIDDEN, WeightKind::Bf16, next()).unwrap();
        let head = b.dummy_linear(VOCAB, HIDDEN, WeightKind::Bf16, next()).unwrap();
        let final_norm = b.dummy_vector(HIDDEN, 1.0, 0.1, next()).unwrap();
        b.synchronize().unwrap();
        let weights = before - b.memory().unwrap().0;
        let spec = spec(arguments.layers);
        let value = if arguments.kv == KvDtype::Bf16 { 2 } else { 1 };
        let page_bytes = arguments.layers * 2 * PAGE * KV_HEADS * HEAD_DIM * value;
        let before = b.memory().unwrap().0;
        b.reserve(&spec).unwrap();
        let free = b.memory().unwrap().0;
        println!("workspace         {:.2} GB", (before - free) as f64 / 1e9);
        // What is left beside the logits, the folded gates and the driver's own needs.
        let folded = arguments.layers * EXPERTS * q * 4;
        let room = (free as usize).saturating_sub(ROWS * VOCAB * 4 + folded + RESERVE) / page_bytes;
        if room < pages {
            println!("pages             {pages} wanted, {room} fit: sequences share pages");
        }
        let pages = pages.min(room);
        let layers = handles
            .into_iter()
            .map(|(attention, moe_norm, gate, bias, experts)| {
                let kv = b.alloc_kv(pages, PAGE, KV_HEADS, HEAD_DIM, arguments.kv).unwrap();
                b.dummy_kv(kv, next()).unwrap();
                ForwardLayer {
                    attention,
                    kv,
                    moe_norm,
                    gate,
                    selection_bias: Some(bias),
                    experts,
                }
            })
            .collect();
        let logits = b.alloc(ROWS * VOCAB * 4, "logits").unwrap();
        let model = ForwardModel {
            spec,
            embedding,
            final_norm,
            head,
            layers,
        };
        assert!(b.set_forward(model).unwrap());
        b.set_one(arguments.one != "off", false).unwrap();
        b.synchronize().unwrap();
        Setup {
            kinds,
            layers: arguments.layers,
            kv: arguments.kv,
            logits,
            bandwidth,
            pages,
            weights,
            backend,
        }
    }

    pub fn describe(&self) -> String {
        format!(
            "{}, {}, {} layers",
            self.backend.describe(),
            self.kinds.name,
            self.layers
        )
    }

    pub fn weight_bytes(&self) -> u64 {
        self.weights
    }

    pub fn free(&self) -> (u64, u64) {
        self.backend.memory().unwrap()
    }

    /// Bytes that one decode step must read, with `experts` distinct ones a layer.
    pub fn bytes(&self, batch: usize, context: usize, experts: f64) -> f64 {
        let attention = HIDDEN * (2 * HEADS + 2 * KV_HEADS) * HEAD_DIM;
        let expert = stored(self.kinds.experts, 3 * HIDDEN * INTER);
        let gate = (4 * EXPERTS * HIDDEN) as f64;
        let value = if self.kv == KvDtype::Bf16 { 2 } else { 1 };
        let kv = (batch * context * 2 * KV_HEADS * HEAD_DIM * value) as f64;
        let layer = stored(self.kinds.attention, attention) + gate + experts * expert + kv;
        self.layers as f64 * layer + stored(WeightKind::Bf16, VOCAB * HIDDEN)
    }
}

/// Selection biases that make the expert of rank r about r^-power as likely, over shuffled experts.
fn skew(power: f32, seed: u64) -> Vec<f32> {
    let mut order: Vec<usize> = (0..EXPERTS).collect();
    order.sort_by_key(|i| (*i as u64 + 1).wrapping_mul(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15)) >> 20);
    let mut bias = vec![0.0; EXPERTS];
    for (rank, expert) in order.into_iter().enumerate() {
        bias[expert] = -0.12 * power * ((rank + 1) as f32).ln();
    }
    bias
}
