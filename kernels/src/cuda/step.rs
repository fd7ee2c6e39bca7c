//! What changes from step to step, on the device: token ids, positions, page tables, rows of logits.
//!
//! Page tables stay on the device; only entries that differ from the step before travel.

use super::rows::as_bytes;
use super::workspace::{Turns, Workspace};
use super::{Gpu, Launch, Memory, shape};
use crate::backend::{Batch, Limits, Result};

/// Tokens of one tile of keys; a page holds a multiple of it.
pub(crate) const TILE_TOKENS: usize = 16;
/// Most tokens for which the split-context attention and the few-token kernels are used.
pub(crate) const FEW_TOKENS: usize = 128;
/// Most splits of all contexts together beyond one a token (`plan.cu`).
const PLAN_ITEMS: usize = 1024;
/// `AttentionItem` of `attention/decode.cuh`.
const ITEM_BYTES: usize = 32;
/// Items that a block of the attention kernel looks up before it knows how many there are.
const LISTED_ITEMS: usize = 32;
/// Most splits of one token when their length is fixed.
const FIXED_SPLITS: usize = 32;
/// Room for either kind of plan.
const MAX_ITEMS: usize = FEW_TOKENS * FIXED_SPLITS;

/// Mirrors `PlanParams` of `attention/plan.cu`.
#[repr(C)]
struct PlanParams {
    positions: u64,
    token_run: u64,
    items: u64,
    item_count: u64,
    splits_of: u64,
    tokens: i32,
    head_blocks: i32,
    blocks: i32,
    fixed: i32,
}

pub(crate) struct Step {
    /// Ids, positions, runs of the tokens, rows of logits: four lists of `capacity` words, sent in one copy.
    lists: Memory,
    capacity: usize,
    words: Vec<u32>,
    tables: Memory,
    items: Memory,
    item_count: Memory,
    /// First split and number of splits of each of up to 128 tokens.
    splits_of: Memory,
    stride: usize,
    /// What `tables` holds.
    mirror: Vec<u32>,
    pub(crate) tokens: usize,
    pub(crate) logit_count: usize,
    pub(crate) runs: Vec<(u32, u32, u32)>,
    page_tokens: usize,
    highest_page: u32,
    limits: Limits,
    /// Positions of one split; 0: as the batch asks for.
    fixed_split: i32,
}

impl Step {
    pub(crate) fn new(gpu: &Gpu, limits: &Limits) -> Result<Step> {
        let words = |count: usize, what| gpu.alloc(count.max(1) * 4, what);
        let stride = limits.max_pages_per_run.max(1);
        let entries = limits.max_runs.checked_mul(stride).filter(|n| *n <= 1 << 30);
        let entries =
            entries.ok_or_else(|| shape("cuda backend", "pages of all runs", limits.max_runs, "fewer"))?;
        let longest = limits.max_tokens.max(limits.max_logit_rows).max(FEW_TOKENS);
        let listed = MAX_ITEMS.max(LISTED_ITEMS * attention_blocks(gpu, true) as usize);
        Ok(Step {
            lists: words(4 * longest, "lists of a step")?,
            capacity: FEW_TOKENS,
            words: Vec::with_capacity(4 * longest),
            tables: words(entries, "page tables")?,
            items: gpu.alloc(listed * ITEM_BYTES, "attention splits")?,
            item_count: words(1, "attention splits")?,
            splits_of: words(2 * FEW_TOKENS, "attention splits")?,
            stride,
            mirror: vec![0; entries],
            tokens: 0,
            logit_count: 0,
            runs: Vec::new(),
            page_tokens: limits.page_tokens,
            highest_page: 0,
            limits: limits.clone(),
            fixed_split: 0,
        })
    }

    /// Checks the batch against the limits and sends what changed.
    pub(crate) fn begin(&mut self, gpu: &Gpu, batch: &Batch) -> Result<()> {
        const OP: &str = "begin";
        let tokens = batch.ids.len();
        let limits = &self.limits;
        if tokens > limits.max_tokens {
            return Err(shape(
                OP,
                "tokens",
                tokens,
                format!("at most {}", limits.max_tokens),
            ));
        }
        if batch.positions.len() != tokens {
            return Err(shape(OP, "positions", batch.positions.len(), tokens));
        }
        if batch.runs.len() > limits.max_runs {
            return Err(shape(
                OP,
                "runs",
                batch.runs.len(),
                format!("at most {}", limits.max_runs),
            ));
        }
        if batch.logit_rows.len() > limits.max_logit_rows {
            return Err(shape(
                OP,
                "rows of logits",
                batch.logit_rows.len(),
                format!("at most {}", limits.max_logit_rows),
            ));
        }
        if let Some(row) = batch.logit_rows.iter().find(|row| **row as usize >= tokens) {
            return Err(shape(OP, "row of logits", row, format!("below {tokens}")));
        }
        let few = tokens.max(batch.logit_rows.len()) <= FEW_TOKENS;
        let capacity = if few {
            FEW_TOKENS
        } else {
            limits.max_tokens.max(limits.max_logit_rows)
        };
        let words = &mut self.words;
        words.clear();
        words.resize(4 * capacity, 0);
        words[..tokens].copy_from_slice(&batch.ids);
        words[capacity..][..tokens].copy_from_slice(&batch.positions);
        words[3 * capacity..][..batch.logit_rows.len()].copy_from_slice(&batch.logit_rows);
        let token_run = &mut words[2 * capacity..][..tokens];
        let mut next = 0;
        let mut highest_page = 0;
        for (index, run) in batch.runs.iter().enumerate() {
            let (first, len) = (run.first as usize, run.len as usize);
            if first != next || len == 0 || first + len > tokens {
                return Err(shape(
                    OP,
                    "run",
                    format!("{first}+{len}"),
                    format!("tokens from {next} of {tokens}"),
                ));
            }
            next = first + len;
            let end = run.position as usize + len;
            let needed = end.div_ceil(self.page_tokens);
            if needed > run.pages.len() || needed > self.stride {
                return Err(shape(
                    OP,
                    "pages of a run",
                    run.pages.len(),
                    format!("{needed}, at most {}", self.stride),
                ));
            }
            for (i, position) in batch.positions[first..next].iter().enumerate() {
                if *position as usize != run.position as usize + i {
                    return Err(shape(OP, "position", position, run.position as usize + i));
                }
            }
            token_run[first..next].fill(index as u32);
            highest_page = run.pages[..needed].iter().copied().fold(highest_page, u32::max);
        }
        if next != tokens {
            return Err(shape(OP, "tokens of the runs", next, tokens));
        }
        for (index, run) in batch.runs.iter().enumerate() {
            let needed = (run.position as usize + run.len as usize).div_ceil(self.page_tokens);
            self.send_table(gpu, index, &run.pages[..needed])?;
        }
        gpu.write(&self.lists, 0, as_bytes(&self.words))?;
        self.capacity = capacity;
        self.tokens = tokens;
        self.logit_count = batch.logit_rows.len();
        self.highest_page = highest_page;
        self.runs.clear();
        self.runs
            .extend(batch.runs.iter().map(|run| (run.first, run.len, run.position)));
        Ok(())
    }

    /// Sends the part of a table that differs from what the device has.
    fn send_table(&mut self, gpu: &Gpu, run: usize, pages: &[u32]) -> Result<()> {
        let at = run * self.stride;
        let known = &mut self.mirror[at..at + pages.len()];
        let Some(first) = known.iter().zip(pages).position(|(a, b)| a != b) else {
            return Ok(());
        };
        let last = known
            .iter()
            .zip(pages)
            .rposition(|(a, b)| a != b)
            .unwrap_or(first);
        known[first..=last].copy_from_slice(&pages[first..=last]);
        gpu.write(&self.tables, (at + first) * 4, as_bytes(&pages[first..=last]))
    }

    /// Fails if the batch names a page that a cache does not have.
    pub(crate) fn check_pages(&self, op: &'static str, pages: usize) -> Result<()> {
        match self.highest_page as usize {
            page if page >= pages && self.tokens > 0 => {
                Err(shape(op, "page", page, format!("below {pages}")))
            }
            _ => Ok(()),
        }
    }

    /// Plans the splits of the contexts of tokens `first`.. of the step; `small`: for a kernel of small blocks.
    pub(crate) fn queue_plan(
        &self,
        gpu: &Gpu,
        head_blocks: usize,
        (first, tokens): (usize, usize),
        small: bool,
    ) -> Result<()> {
        let params = PlanParams {
            positions: self.positions() + first as u64 * 4,
            token_run: self.token_run() + first as u64 * 4,
            items: self.items.address,
            item_count: self.item_count.address,
            splits_of: self.splits_of.address,
            tokens: tokens as i32,
            head_blocks: head_blocks as i32,
            blocks: attention_blocks(gpu, small) as i32,
            fixed: self.fixed_split,
        };
        gpu.launch(
            "attention_plan",
            Launch {
                grid: (1, 1),
                threads: 1024,
                shared: 0,
                overlap: true,
            },
            &params,
        )
    }

    /// Items that the plan can hold: for sizing the partial results.
    pub(crate) fn max_items(&self, gpu: &Gpu, head_blocks: usize) -> usize {
        if self.fixed_split > 0 {
            return FEW_TOKENS * FIXED_SPLITS;
        }
        let filling = 4 * attention_blocks(gpu, true) as usize / head_blocks.max(1);
        (FEW_TOKENS + PLAN_ITEMS.max(filling) + 1).min(MAX_ITEMS)
    }

    /// Splits of one length whatever the batch, so that the order of summation only depends on the position.
    pub(crate) fn fix_splits(&mut self, on: bool) {
        let longest = self.stride * self.page_tokens;
        self.fixed_split =
            i32::from(on) * longest.div_ceil(FIXED_SPLITS).next_multiple_of(64).max(256) as i32;
    }

    fn list(&self, index: usize) -> u64 {
        self.lists.address + (index * self.capacity * 4) as u64
    }

    pub(crate) fn ids(&self) -> u64 {
        self.list(0)
    }

    pub(crate) fn positions(&self) -> u64 {
        self.list(1)
    }

    pub(crate) fn token_run(&self) -> u64 {
        self.list(2)
    }

    pub(crate) fn logit_rows(&self) -> u64 {
        self.list(3)
    }

    pub(crate) fn tables(&self) -> (u64, i32) {
        (self.tables.address, self.stride as i32)
    }

    pub(crate) fn splits_of(&self) -> u64 {
        self.splits_of.address
    }

    pub(crate) fn items(&self) -> (u64, u64) {
        (self.items.address, self.item_count.address)
    }

    /// Turns per position of each rotated pair: theta^(-2 i / rotary) / 2 pi.
    pub(crate) fn turns(gpu: &Gpu, workspace: &mut Workspace, rotary: usize, theta: f64) -> Result<u64> {
        let known = |turns: &&Turns| turns.rotary == rotary && turns.theta == theta;
        if let Some(turns) = workspace.turns.iter().find(known) {
            return Ok(turns.memory.address);
        }
        let pairs = 0..rotary / 2;
        let turns = pairs.map(|i| libm::pow(theta, -2.0 * i as f64 / rotary as f64) / std::f64::consts::TAU);
        let turns: Vec<f64> = turns.collect();
        let memory = gpu.alloc(turns.len() * 8, "rotation")?;
        gpu.write(&memory, 0, as_bytes(&turns))?;
        let address = memory.address;
        workspace.turns.push(Turns {
            rotary,
            theta,
            memory,
        });
        Ok(address)
    }
}

/// Blocks of the split-context attention: one a multiprocessor, or two small ones.
pub(crate) fn attention_blocks(gpu: &Gpu, small: bool) -> u32 {
    gpu.blocks() * (1 + u32::from(small))
}
