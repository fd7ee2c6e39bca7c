//! A MiniMax-M2 forward pass straight on a backend: one sequence, no worker, no router. Used to compare the ops
//! with the reference checkpoints.

#![expect(clippy::unwrap_used, reason = "a test fails where it stands")]
#![allow(dead_code, reason = "each test file uses its own part")]

use std::path::Path;
use std::sync::Arc;

use conclave_kernels::backend::*;
use conclave_kernels::weight::{HostInt4, HostLinear, HostWeight};
use conclave_plan::model::MoeSpec;
use safetensors::{Dtype, SafeTensors};

pub const PAGE_TOKENS: usize = 16;
const MAX_TOKENS: usize = 256;

pub struct Model {
    backend: Box<dyn Backend>,
    model: ForwardModel,
    hidden: Buffer,
    normed: Buffer,
    q: Buffer,
    attended: Buffer,
    ids: Buffer,
    weights: Buffer,
    router_logits: Buffer,
    rows: Buffer,
    logits: Buffer,
}

/// Logits of every token, and the router's logits of each layer.
pub struct Output {
    pub logits: Vec<f32>,
    pub router: Vec<Vec<f32>>,
}

pub fn limits() -> Limits {
    Limits {
        max_tokens: MAX_TOKENS,
        max_logit_rows: MAX_TOKENS,
        max_runs: 4,
        max_pages_per_run: MAX_TOKENS / PAGE_TOKENS,
        max_expert_rows: MAX_TOKENS * 8,
        page_tokens: PAGE_TOKENS,
    }
}

pub fn tensor_f32(file: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let tensor = file.tensor(name).unwrap();
    let data = tensor.data();
    match tensor.dtype() {
        Dtype::F32 => data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect(),
        Dtype::BF16 => data
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| half::bf16::from_le_bytes(*b).to_f32())
            .collect(),
        Dtype::F16 => data
            .as_chunks::<2>()
            .0
            .iter()
            .map(|b| half::f16::from_le_bytes(*b).to_f32())
            .collect(),
        other => panic!("{name}: {other:?}"),
    }
}

pub fn linear(file: &SafeTensors<'_>, name: &str) -> HostLinear {
    let bytes = |name: &str| Arc::new(file.tensor(name).unwrap().data().to_vec());
    if let Ok(packed) = file.tensor(&format!("{name}.weight_packed")) {
        let scales = tensor_f32(file, &format!("{name}.weight_scale"));
        let (out, columns) = (packed.shape()[0], packed.shape()[1] * 8);
        let group = columns * out / scales.len();
        let packed = bytes(&format!("{name}.weight_packed"));
        let int4 = HostInt4 {
            packed,
            scales,
            zeros: None,
            group,
        };
        return HostLinear {
            out_features: out,
            in_features: columns,
            data: HostWeight::Int4(int4),
        };
    }
    let weight = file.tensor(&format!("{name}.weight")).unwrap();
    let data = bytes(&format!("{name}.weight"));
    let data = match weight.dtype() {
        Dtype::F32 => HostWeight::F32(data),
        Dtype::F16 => HostWeight::F16(data),
        Dtype::BF16 => HostWeight::Bf16(data),
        Dtype::F8_E4M3 => {
            let scales = tensor_f32(file, &format!("{name}.weight_scale_inv"));
            HostWeight::Fp8Block { data, scales }
        }
        other => panic!("{name}: {other:?}"),
    };
    HostLinear {
        out_features: weight.shape()[0],
        in_features: weight.shape()[1],
        data,
    }
}

/// A checkpoint on a backend, with those experts (layer, expert) that are wanted here.
pub fn upload(
    dir: &Path,
    b: &mut dyn Backend,
    kv: KvDtype,
    pages: usize,
    here: impl Fn(usize, usize) -> bool,
) -> ForwardModel {
    let spec = conclave_plan::config::read(dir, None).unwrap().spec;
    let data = std::fs::read(dir.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&data).unwrap();
    let mut layers = Vec::new();
    for (l, layer) in spec.layers.iter().enumerate() {
        let name = |rest: &str| format!("model.layers.{l}.{rest}");
        let mut matrix = |rest: &str| b.upload_linear(&linear(&file, &name(rest))).unwrap();
        let (q, k) = (matrix("self_attn.q_proj"), matrix("self_attn.k_proj"));
        let (v, o) = (matrix("self_attn.v_proj"), matrix("self_attn.o_proj"));
        let gate = matrix("block_sparse_moe.gate");
        let mut vector = |rest: &str| b.upload_vector(&tensor_f32(&file, &name(rest))).unwrap();
        let attention = AttentionWeights {
            norm: vector("input_layernorm.weight"),
            q,
            k,
            v,
            o,
            q_norm: Some(vector("self_attn.q_norm.weight")),
            k_norm: Some(vector("self_attn.k_norm.weight")),
        };
        let moe_norm = vector("post_attention_layernorm.weight");
        let bias = vector("block_sparse_moe.e_score_correction_bias");
        let part =
            |e: usize, part: &str| linear(&file, &name(&format!("block_sparse_moe.experts.{e}.{part}")));
        let experts: Vec<HostExpert> = (0..layer.moe.experts)
            .filter(|e| here(l, *e))
            .map(|e| HostExpert {
                gate: part(e, "w1"),
                up: part(e, "w3"),
                down: part(e, "w2"),
            })
            .collect();
        let (heads, dims) = (layer.attention.kv_heads, layer.attention.head_dim);
        layers.push(ForwardLayer {
            attention,
            kv: b.alloc_kv(pages, PAGE_TOKENS, heads, dims, kv).unwrap(),
            moe_norm,
            gate,
            selection_bias: Some(bias),
            experts: b.upload_experts(&experts).unwrap(),
        });
    }
    ForwardModel {
        embedding: b.upload_linear(&linear(&file, "model.embed_tokens")).unwrap(),
        final_norm: b.upload_vector(&tensor_f32(&file, "model.norm.weight")).unwrap(),
        head: b.upload_linear(&linear(&file, "lm_head")).unwrap(),
        spec,
        layers,
    }
}

impl Model {
    pub fn load(dir: &Path, mut backend: Box<dyn Backend>, kv: KvDtype) -> Model {
        let b = &mut backend;
        let pages = MAX_TOKENS / PAGE_TOKENS + 3;
        let model = upload(dir, b.as_mut(), kv, pages, |_, _| true);
        let (attention, moe) = (&model.spec.layers[0].attention, &model.spec.layers[0].moe);
        let (width, vocab) = (model.spec.hidden, model.spec.vocab);
        let mut alloc = |columns: usize| b.alloc(MAX_TOKENS * columns * 4, "test").unwrap();
        Model {
            hidden: alloc(width),
            normed: alloc(width),
            q: alloc(attention.q_width()),
            attended: alloc(attention.q_width()),
            ids: alloc(moe.top_k),
            weights: alloc(moe.top_k),
            router_logits: alloc(moe.experts),
            rows: alloc(width * moe.top_k),
            logits: alloc(vocab),
            model,
            backend,
        }
    }

    pub fn top_k(&self) -> usize {
        self.moe().top_k
    }

    fn moe(&self) -> &MoeSpec {
        &self.model.spec.layers[0].moe
    }

    /// One run of `ids` from `position` on; the pages are a fixed, shuffled table.
    pub fn batch(&self, ids: &[u32], position: usize) -> Batch {
        let tokens = ids.len();
        let pages = MAX_TOKENS / PAGE_TOKENS;
        let run = BatchRun {
            first: 0,
            len: tokens as u32,
            pages: (0..pages).map(|i| ((i * 7 + 3) % (pages + 3)) as u32).collect(),
            position: position as u32,
        };
        Batch {
            ids: ids.to_vec(),
            positions: (position as u32..).take(tokens).collect(),
            runs: vec![run],
            logit_rows: (0..tokens as u32).collect(),
        }
    }

    /// All ops of a step. `chosen` has room for the experts' ids, `rows` for the rows; `after_route` is shown the
    /// router's logits of each layer.
    pub fn run(
        &mut self,
        batch: &Batch,
        chosen: &mut [u8],
        rows: &mut Vec<ExpertRow>,
        mut after_route: impl FnMut(&mut dyn Backend, &Buffer),
    ) {
        let (b, model) = (&mut *self.backend, &self.model);
        let (spec, moe) = (&model.spec.layers[0].attention, &model.spec.layers[0].moe);
        let (eps, k) = (model.spec.rms_eps, moe.top_k);
        let (hidden, normed, q) = (&self.hidden, &self.normed, &self.q);
        let (ids, weights, logits) = (&self.ids, &self.weights, &self.router_logits);
        b.begin(batch).unwrap();
        b.embed(model.embedding, hidden).unwrap();
        for layer in &model.layers {
            b.qkv(spec, eps, &layer.attention, hidden, layer.kv, q).unwrap();
            b.attention(spec, layer.kv, q, &self.attended).unwrap();
            b.linear_add(layer.attention.o, &self.attended, hidden).unwrap();
            let (norm, gate, bias) = (layer.moe_norm, layer.gate, layer.selection_bias);
            b.route(
                moe,
                eps,
                norm,
                gate,
                bias,
                hidden,
                normed,
                ids,
                weights,
                Some(logits),
            )
            .unwrap();
            after_route(b, logits);
            b.read(ids, 0, chosen).unwrap();
            rows.clear();
            rows.extend((0u32..).zip(chosen.as_chunks::<4>().0).map(|(i, id)| ExpertRow {
                row: i / k as u32,
                expert: u32::from_le_bytes(*id),
            }));
            b.experts(layer.experts, normed, rows, &self.rows).unwrap();
            b.combine(k, &self.rows, weights, hidden).unwrap();
        }
        b.head(eps, model.final_norm, model.head, hidden, &self.logits)
            .unwrap();
    }

    /// Runs `ids` from `position` on.
    pub fn step(&mut self, ids: &[u32], position: usize) -> Output {
        let (tokens, experts) = (ids.len(), self.moe().experts);
        let mut router = Vec::new();
        let mut chosen = vec![0; tokens * self.moe().top_k * 4];
        let batch = self.batch(ids, position);
        self.run(&batch, &mut chosen, &mut Vec::new(), |backend, logits| {
            router.push(download(backend, logits, tokens * experts));
        });
        let logits = download(&mut *self.backend, &self.logits, tokens * self.model.spec.vocab);
        Output { logits, router }
    }

    /// The greedy token of row `row` of the last step.
    pub fn greedy(&mut self, row: usize) -> u32 {
        let params = SampleParams::default();
        let row_to_sample = SampleRow {
            params: &params,
            position: 0,
            tokens: &[],
            output_start: 0,
            history: None,
            mask: None,
            forbidden: &[],
        };
        let sampled = self
            .backend
            .sample(&self.logits, self.model.spec.vocab, row, &[row_to_sample])
            .unwrap();
        sampled[0].token
    }
}

fn download(backend: &mut dyn Backend, buffer: &Buffer, words: usize) -> Vec<f32> {
    let mut bytes = vec![0; words * 4];
    backend.read(buffer, 0, &mut bytes).unwrap();
    bytes
        .as_chunks::<4>()
        .0
        .iter()
        .map(|b| f32::from_le_bytes(*b))
        .collect()
}
