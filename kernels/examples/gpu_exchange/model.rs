//! The tiny checkpoints with their experts spread over the ranks, whole steps: logits must be those of one rank with all
//! experts, to the bit in deterministic mode.

use std::path::Path;
use std::time::Duration;

use conclave_kernels::backend::*;
use conclave_kernels::cuda::CudaBackend;
use conclave_kernels::cuda::exchange::ExchangeShape;
use conclave_kernels::cuda::exchange::ipc::Epoch;
use conclave_kernels::cuda::exchange::peer::PeerHandle;
use conclave_plan::model::MoeSpec;
use conclave_plan::placement::Placement;
use safetensors::SafeTensors;

use crate::cases::{Holding, compare, placement};
use crate::common::{PAGE_TOKENS, tensor_f32, upload};
use crate::made;
use crate::rank::{Rank, draw, handle, hex, id};
use crate::ties::{Gates, Ties};

const MAX_TOKENS: usize = 2304;
const DECODED: usize = 24;
/// The checkpoint with as many experts as eight ranks want.
const MADE: &str = "16 experts/bf16";

struct Model {
    backend: CudaBackend,
    logits: Buffer,
    vocab: usize,
    hidden: usize,
    moe: MoeSpec,
    /// Of the choice of experts, by layer.
    biases: Vec<Vec<f32>>,
}

impl Model {
    /// With the experts of `rank` of a placement, or with all.
    fn load(dir: &Path, ordinal: i32, deterministic: bool, share: Option<(&Placement, usize)>) -> Model {
        let limits = Limits {
            max_tokens: MAX_TOKENS,
            max_logit_rows: MAX_TOKENS,
            max_runs: 4,
            max_pages_per_run: 2 * MAX_TOKENS / PAGE_TOKENS,
            max_expert_rows: MAX_TOKENS * 8,
            page_tokens: PAGE_TOKENS,
        };
        let mut b = CudaBackend::new(limits, ordinal).unwrap();
        b.set_deterministic(deterministic).unwrap();
        let here = |layer: usize, expert: usize| {
            share.is_none_or(|(placement, rank)| {
                placement.layer(layer).owners[expert].contains(&(rank as u32))
            })
        };
        let pages = 2 * MAX_TOKENS / PAGE_TOKENS;
        let model = upload(dir, &mut b, KvDtype::Bf16, pages, here);
        let (vocab, hidden) = (model.spec.vocab, model.spec.hidden);
        let moe = model.spec.layers[0].moe.clone();
        let logits = b.alloc(MAX_TOKENS * vocab * 4, "logits").unwrap();
        let data = std::fs::read(dir.join("model.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&data).unwrap();
        let bias = |layer| {
            let name = format!("model.layers.{layer}.block_sparse_moe.e_score_correction_bias");
            tensor_f32(&file, &name)
        };
        let biases = (0..model.layers.len()).map(bias).collect();
        assert!(b.set_forward(model).unwrap());
        Model {
            backend: b,
            logits,
            vocab,
            hidden,
            moe,
            biases,
        }
    }

    /// Logits of all `ids`, which continue the sequence at `position`.
    fn step(&mut self, ids: &[u32], position: usize, largest: usize) -> Vec<f32> {
        let mut batch = Batch {
            ids: ids.to_vec(),
            positions: (position as u32..).take(ids.len()).collect(),
            runs: Vec::new(),
            logit_rows: (0..ids.len() as u32).collect(),
        };
        if !ids.is_empty() {
            batch.runs.push(BatchRun {
                first: 0,
                len: ids.len() as u32,
                pages: (0..(2 * MAX_TOKENS / PAGE_TOKENS) as u32).rev().collect(),
                position: position as u32,
            });
        }
        self.backend.begin_group(largest).unwrap();
        self.backend.begin(&batch).unwrap();
        assert!(self.backend.forward(&self.logits).unwrap());
        let mut bytes = vec![0; ids.len() * self.vocab * 4];
        if !bytes.is_empty() {
            self.backend.read(&self.logits, 0, &mut bytes).unwrap();
        }
        let words = bytes.as_chunks::<4>().0.iter();
        words.map(|word| f32::from_le_bytes(*word)).collect()
    }

    /// Prompt and greedy tokens; `fed`: the tokens that are fed instead of its own.
    fn run(&mut self, prompt: &[u32], largest: usize, fed: Option<&[u32]>) -> (Vec<f32>, Vec<u32>) {
        let mut all = self.step(prompt, 0, largest);
        let mut tokens = Vec::new();
        for i in 0..DECODED {
            let own = best(&all[all.len().saturating_sub(self.vocab)..]);
            tokens.push(own);
            let next = fed.map_or(own, |fed| fed[i]);
            let ids = if prompt.is_empty() { &[][..] } else { &[next][..] };
            all.extend(self.step(ids, prompt.len() + i, 1));
        }
        (all, tokens)
    }

    /// What the gates say, by layer, of a prompt and of the tokens that are fed.
    fn gates(&mut self, prompt: &[u32], largest: usize, fed: &[u32]) -> Vec<Vec<f32>> {
        self.backend.watch_gates(true);
        self.run(prompt, largest, Some(fed));
        let gates = self.backend.watched_gates();
        self.backend.watch_gates(false);
        gates
    }
}

fn best(logits: &[f32]) -> u32 {
    let index = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    index.unwrap_or(0) as u32
}

/// Rows that are not near their like.
fn strayed(found: &[f32], expected: &[f32], width: usize) -> Vec<usize> {
    let rows = found.chunks_exact(width).zip(expected.chunks_exact(width));
    let far = rows
        .enumerate()
        .filter(|(_, (found, expected))| compare(found, expected).0 > 2e-2);
    far.map(|(row, _)| row).collect()
}

/// What turned choices of experts say of the rows that strayed on this rank. The ranks' steps are run once more, so all call it.
fn ties(whole: &mut Model, part: &mut Model, prompt: &[u32], length: usize, fed: &[u32]) -> Option<Ties> {
    let found = part.gates(prompt, length, fed);
    if prompt.is_empty() {
        return None;
    }
    let expected = whole.gates(prompt, length, fed);
    let layers = expected.iter().zip(&found).zip(&whole.biases);
    let layers: Vec<Gates<'_>> = layers
        .map(|((expected, found), bias)| Gates {
            expected,
            found,
            bias,
        })
        .collect();
    Some(Ties::find(&whole.moe, &layers))
}

pub fn model(rank: &mut Rank) -> usize {
    let mut failed = 0;
    let ordinal = (rank.rank % rank.options.gpus) as i32;
    if rank.rank == 0 {
        let tiny = Path::new(&rank.options.data).join("tiny-hd64/bf16");
        made::make(&made::folder(&rank.options), &tiny);
    }
    rank.meet();
    for folder in [
        MADE,
        "tiny-hd64/bf16",
        "tiny-hd64/fp8",
        "tiny-hd64/ct-int4",
        "tiny-hd128/bf16",
    ] {
        if !folder.contains(&rank.options.only) {
            continue;
        }
        // The others have six experts.
        if rank.ranks > 6 && folder != MADE {
            continue;
        }
        let dir = match folder {
            MADE => made::folder(&rank.options),
            _ => Path::new(&rank.options.data).join(folder),
        };
        let bytes = std::fs::read(dir.join("reference.safetensors")).unwrap();
        let file = SafeTensors::deserialize(&bytes).unwrap();
        let data = file.tensor("input_ids").unwrap().data().to_vec();
        let ids: Vec<u32> = data
            .as_chunks::<8>()
            .0
            .iter()
            .map(|b| i64::from_le_bytes(*b) as u32)
            .collect();
        for (deterministic, holding, length) in [
            (true, Holding::Even, 40),
            (true, Holding::Replicas, 200),
            (false, Holding::Even, 40),
            (false, Holding::Even, 200),
            // Long enough for two pieces that are under way at once.
            (false, Holding::Uneven, 2100),
        ] {
            // Ranks have prompts of their own, every fourth has none.
            let mut prompt: Vec<u32> = ids
                .iter()
                .cycle()
                .skip(rank.rank)
                .step_by(1 + rank.rank)
                .copied()
                .take(length - 3 * rank.rank)
                .collect();
            if rank.rank % 4 == 3 {
                prompt.clear();
            }
            let mut whole = Model::load(&dir, ordinal, deterministic, None);
            let experts = whole.moe.experts;
            let placement = placement(holding, experts, rank.ranks);
            let holds = |rank: u32| !placement.experts_of(0, rank).is_empty();
            if !(0..rank.ranks as u32).all(holds) {
                rank.say(&format!(
                    "skipped  {folder}, {holding:?}: {experts} experts for {} ranks",
                    rank.ranks
                ));
                continue;
            }
            let (expected, tokens) = match prompt.is_empty() {
                true => (Vec::new(), vec![0; DECODED]),
                false => whole.run(&prompt, length, None),
            };
            let mut part = Model::load(&dir, ordinal, deterministic, Some((&placement, rank.rank)));
            let shape =
                ExchangeShape::new(rank.ranks, part.hidden, part.moe.top_k, MAX_TOKENS, deterministic);
            let own = match rank.options.nccl {
                true => part
                    .backend
                    .open_nccl(std::slice::from_ref(&shape))
                    .map(|()| if rank.rank == 0 { draw() } else { "-".into() }),
                false => part.backend.offer_ipc(&shape).map(|own| hex(&own.to_bytes())),
            };
            let texts = rank.gather(&own.unwrap());
            let epoch = Epoch {
                number: 1,
                rank: rank.rank,
                shape,
                placement: &placement,
                layers: part.biases.len(),
                timeout: Duration::from_secs(5),
            };
            if rank.options.nccl {
                part.backend
                    .connect_nccl(&epoch, id(&texts[0]), &|| false)
                    .unwrap();
            } else {
                let peers: Vec<PeerHandle> = texts.iter().map(|text| handle(text)).collect();
                part.backend.connect_ipc(&epoch, &peers).unwrap();
            }
            rank.meet();
            let (found, again) = part.run(&prompt, length, Some(&tokens));
            let fault = part
                .backend
                .exchange_control()
                .and_then(|control| control.fault());
            let (error, different, first) = compare(&found, &expected);
            let equal = again.iter().zip(&tokens).filter(|(a, b)| a == b).count();
            let name = format!(
                "{folder}, {holding:?}, prompt of {length}, {}",
                if deterministic { "deterministic" } else { "fast" }
            );
            let stray = strayed(&found, &expected, part.vocab);
            // A result that is rounded elsewhere may change a close choice of experts: every row that strays must have one.
            let look = !deterministic && rank.any(!stray.is_empty());
            let ties = look
                .then(|| ties(&mut whole, &mut part, &prompt, length, &tokens))
                .flatten();
            let explained = ties.as_ref().map_or(Ok(()), |ties| ties.explain(&stray));
            let right = fault.is_none()
                && match deterministic {
                    true => different == 0 && (equal == DECODED || prompt.is_empty()),
                    false => explained.is_ok() && found.len() == expected.len(),
                };
            let (stray, rows) = (stray.len(), expected.len() / part.vocab);
            let line = format!(
                "rank {}: error {error:.1e}, {stray} of {rows} rows stray, {different} of {} logits differ, {equal} of {DECODED} tokens equal, {fault:?}",
                rank.rank,
                expected.len()
            );
            if let Some(ties) = &ties {
                println!(
                    "         {name}: rank {}: {stray} of {rows} rows stray; {}",
                    rank.rank,
                    ties.describe()
                );
            }
            if !right {
                let at = first.min(found.len().saturating_sub(4));
                println!(
                    "FAILED   {name}: {line}; {explained:?}; large from row {} value {}: {:?} for {:?}",
                    at / part.vocab,
                    at % part.vocab,
                    &found[at..found.len().min(at + 4)],
                    &expected[at..expected.len().min(at + 4)]
                );
            }
            let all = rank.gather(if right { "" } else { "wrong" });
            failed += usize::from(all.iter().any(|line| !line.is_empty()));
            let (worst, _) = rank.worst(error);
            rank.say(&format!(
                "{}  {name}: worst error {worst:.1e}; {line}",
                if all.iter().all(String::is_empty) {
                    "ok     "
                } else {
                    "FAILED "
                }
            ));
            // Mapped memory must not go before its mappings.
            rank.meet();
        }
    }
    if rank.rank > 0 {
        return 0;
    }
    std::fs::remove_dir_all(made::folder(&rank.options)).unwrap();
    failed
}
