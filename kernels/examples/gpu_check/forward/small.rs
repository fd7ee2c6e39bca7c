//! A small random model on a backend: its steps op by op or whole.

use conclave_kernels::backend::*;
use conclave_plan::model::*;

use crate::host::*;

pub struct Shape {
    pub hidden: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub experts: usize,
    pub top_k: usize,
    pub inter: usize,
    pub vocab: usize,
    pub layers: usize,
}

/// A model on a backend, run op by op or by `forward`.
pub struct Small {
    pub backend: Box<dyn Backend>,
    model: ForwardModel,
    buffers: [Buffer; 8],
    pub vocab: usize,
}

pub const TOKENS: usize = 1400;

fn spec(shape: &Shape) -> ModelSpec {
    let attention = AttentionSpec {
        heads: shape.heads,
        kv_heads: shape.kv_heads,
        head_dim: shape.head_dim,
        rotary_dim: shape.head_dim / 2,
        rope_theta: 5e6,
        qk_norm: QkNorm::WholeProjection,
    };
    let moe = MoeSpec {
        experts: shape.experts,
        top_k: shape.top_k,
        intermediate: shape.inter,
        scoring: Scoring::Sigmoid,
        selection_bias: true,
        renormalize: true,
    };
    ModelSpec {
        family: "minimax_m2".into(),
        hidden: shape.hidden,
        vocab: shape.vocab,
        rms_eps: 1e-6,
        max_position: 100_000,
        layers: vec![LayerSpec { attention, moe }; shape.layers],
        eos_token_ids: Vec::new(),
        bos_token_id: None,
        names: TensorNames::default(),
    }
}

impl Small {
    pub fn new(backend: Box<dyn Backend>, shape: &Shape, kind: Kind, kv: KvDtype) -> Small {
        let dense = if matches!(kind, Kind::Int4(32, _)) {
            Kind::Bf16
        } else {
            kind
        };
        Small::of(backend, shape, (dense, kind), kv)
    }

    /// Attention's weights of the one kind, experts of the other.
    pub fn of(
        mut backend: Box<dyn Backend>,
        shape: &Shape,
        (dense, experts): (Kind, Kind),
        kv: KvDtype,
    ) -> Small {
        let random = &mut Random(shape.hidden as u64);
        let spec = spec(shape);
        let attention = &spec.layers[0].attention;
        let b = backend.as_mut();
        let layers = (0..shape.layers)
            .map(|_| {
                let mut matrix =
                    |rows, inputs| b.upload_linear(&linear(random, rows, inputs, dense)).unwrap();
                let (q, k) = (
                    matrix(attention.q_width(), shape.hidden),
                    matrix(attention.kv_width(), shape.hidden),
                );
                let (v, o) = (
                    matrix(attention.kv_width(), shape.hidden),
                    matrix(shape.hidden, attention.q_width()),
                );
                let gate = b
                    .upload_linear(&linear(random, shape.experts, shape.hidden, Kind::F32))
                    .unwrap();
                let mut vector = |n| {
                    let values: Vec<f32> = random.values(n, 0.3).iter().map(|x| 1.0 + x).collect();
                    b.upload_vector(&values).unwrap()
                };
                let norm = vector(shape.hidden);
                let q_norm = Some(vector(attention.q_width()));
                let k_norm = Some(vector(attention.kv_width()));
                let moe_norm = vector(shape.hidden);
                let bias = b.upload_vector(&random.values(shape.experts, 0.1)).unwrap();
                let experts: Vec<HostExpert> = (0..shape.experts)
                    .map(|_| expert(random, shape.hidden, shape.inter, experts))
                    .collect();
                ForwardLayer {
                    attention: AttentionWeights {
                        norm,
                        q,
                        k,
                        v,
                        o,
                        q_norm,
                        k_norm,
                    },
                    kv: b
                        .alloc_kv(128, PAGE_TOKENS, shape.kv_heads, shape.head_dim, kv)
                        .unwrap(),
                    moe_norm,
                    gate,
                    selection_bias: Some(bias),
                    experts: b.upload_experts(&experts).unwrap(),
                }
            })
            .collect();
        let embedding = b
            .upload_linear(&linear(random, shape.vocab, shape.hidden, Kind::Bf16))
            .unwrap();
        let head = b
            .upload_linear(&linear(random, shape.vocab, shape.hidden, Kind::Bf16))
            .unwrap();
        let final_norm = b.upload_vector(&random.values(shape.hidden, 1.0)).unwrap();
        let mut alloc = |columns: usize| b.alloc(TOKENS * columns * 4, "check").unwrap();
        let (width, q) = (shape.hidden, attention.q_width());
        let buffers = [
            width,
            width,
            q,
            q,
            shape.top_k,
            shape.top_k,
            width * shape.top_k,
            shape.vocab,
        ]
        .map(&mut alloc);
        Small {
            vocab: shape.vocab,
            model: ForwardModel {
                spec,
                embedding,
                final_norm,
                head,
                layers,
            },
            backend,
            buffers,
        }
    }

    /// Logits of the batch's rows, op by op.
    pub fn ops(&mut self, batch: &Batch) -> Vec<f32> {
        let [hidden, normed, q, attended, ids, weights, y, logits] = &self.buffers;
        let (b, model) = (self.backend.as_mut(), &self.model);
        let (eps, k) = (model.spec.rms_eps, model.spec.layers[0].moe.top_k);
        b.begin(batch).unwrap();
        b.embed(model.embedding, hidden).unwrap();
        for (layer, spec) in model.layers.iter().zip(&model.spec.layers) {
            b.qkv(&spec.attention, eps, &layer.attention, hidden, layer.kv, q)
                .unwrap();
            b.attention(&spec.attention, layer.kv, q, attended).unwrap();
            b.linear_add(layer.attention.o, attended, hidden).unwrap();
            b.route(
                &spec.moe,
                eps,
                layer.moe_norm,
                layer.gate,
                layer.selection_bias,
                hidden,
                normed,
                ids,
                weights,
                None,
            )
            .unwrap();
            let chosen = download(b, ids, batch.ids.len() * k);
            let rows: Vec<ExpertRow> = chosen
                .iter()
                .enumerate()
                .map(|(i, id)| ExpertRow {
                    row: (i / k) as u32,
                    expert: id.to_bits(),
                })
                .collect();
            b.experts(layer.experts, normed, &rows, y).unwrap();
            b.combine(k, y, weights, hidden).unwrap();
        }
        b.head(eps, model.final_norm, model.head, hidden, logits).unwrap();
        download(b, logits, batch.logit_rows.len() * self.vocab)
    }

    /// The same by `forward`.
    pub fn forward(&mut self, batch: &Batch) -> Vec<f32> {
        let logits = &self.buffers[7];
        let b = self.backend.as_mut();
        let words = batch.logit_rows.len() * self.vocab;
        b.write(logits, 0, &vec![0xff; words * 4]).unwrap();
        b.begin(batch).unwrap();
        assert!(b.forward(logits).unwrap(), "forward is not there");
        download(b, logits, words)
    }

    /// Logits of other rows of the step that `forward` ran last.
    pub fn more_rows(&mut self, batch: &Batch, rows: std::ops::Range<u32>) -> Vec<f32> {
        let part = Batch {
            logit_rows: rows.collect(),
            ..batch.clone()
        };
        let (b, logits) = (self.backend.as_mut(), &self.buffers[7]);
        b.begin(&part).unwrap();
        assert!(b.forward_rows(logits).unwrap(), "no states were left");
        download(b, logits, part.logit_rows.len() * self.vocab)
    }

    pub fn set_forward(&mut self) {
        assert!(self.backend.set_forward(self.model.clone()).unwrap());
    }

    /// Sets the mode and hands over the model.
    pub fn set_deterministic(&mut self, on: bool) {
        assert!(!on || self.backend.set_deterministic(true).unwrap());
        self.set_forward();
    }

    pub fn queue(&mut self, batch: &Batch, rows: &[SampleRow<'_>]) {
        self.backend.begin(batch).unwrap();
        assert!(self.backend.forward(&self.buffers[7]).unwrap());
        assert!(
            self.backend
                .queue_sample(&self.buffers[7], self.vocab, rows)
                .unwrap()
        );
    }
}

pub fn shapes() -> [Shape; 2] {
    [
        Shape {
            hidden: 384,
            heads: 6,
            kv_heads: 2,
            head_dim: 64,
            experts: 12,
            top_k: 3,
            inter: 128,
            vocab: 500,
            layers: 2,
        },
        Shape {
            hidden: 512,
            heads: 12,
            kv_heads: 2,
            head_dim: 128,
            experts: 32,
            top_k: 8,
            inter: 256,
            vocab: 640,
            layers: 2,
        },
    ]
}

pub fn backends() -> (Box<dyn Backend>, Box<dyn Backend>) {
    crate::pair(&limits(TOKENS, 40, 70))
}
