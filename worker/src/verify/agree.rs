//! A device's run beside the CPU's with the same choices of experts.
//!
//! A choice that rounding turns changes everything behind it, so a device cannot be held to a reference that chose
//! otherwise. What it is held to: the CPU, given the device's choices, computes the same within the rounding of BF16, and
//! every choice that the CPU would not have made itself was a tie there within the rounding of the gate's keys.

use conclave_kernels::backend::KvDtype;

use super::choices::Choices;
use super::compare::{Miss, misses, relative, rms_error};
use super::run::Run;

/// How far a device is from the CPU that chose the same experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Agreement {
    /// Over all tokens, the continuation's too; 2-norms.
    pub logits_relative_error: f64,
    /// Of the layer where it is largest.
    pub router_relative_error: f64,
    /// Choices in all: one a token and layer.
    pub choices: usize,
    /// Those that the CPU would have made otherwise.
    pub turned: Vec<Turned>,
    /// Greedy tokens that are not the CPU's.
    pub misses: Vec<Miss>,
    pub tolerance: f64,
}

/// A choice that the CPU would have made otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Turned {
    pub layer: usize,
    pub position: usize,
    /// On the CPU, how far the best expert that was left out is above the worst that was taken, by score and bias.
    pub gap: f64,
    /// Root mean square difference of the layer's keys between both.
    pub rms: f64,
    pub is_tie: bool,
}

/// A gap of so many root mean square differences of keys is a tie.
const TIE_ERRORS: f64 = 4.0;

/// The bound on relative errors: on a GPU activations are BF16,
const TOLERANCE: f64 = 1e-2;
/// and a key or value of FP8 next to a rounding's edge falls to either side, by 6% of itself.
const FP8_TOLERANCE: f64 = 3e-2;

impl Agreement {
    pub fn passes(&self) -> bool {
        self.logits_relative_error <= self.tolerance
            && self.router_relative_error <= self.tolerance
            && self.turned.iter().all(|turned| turned.is_tie)
            && self.misses.iter().all(|miss| miss.is_tie)
    }

    /// `cpu` was held to `choices`, which are those of `device`.
    pub fn of(device: &Run, cpu: &Run, choices: &Choices, kv: KvDtype) -> Agreement {
        let layers = || device.router_logits.iter().zip(&cpu.router_logits);
        let turned = (0..choices.gates.len()).flat_map(|layer| turned(layer, device, cpu, choices));
        Agreement {
            logits_relative_error: relative(&device.logits, &cpu.logits),
            router_relative_error: layers().map(|(a, b)| relative(a, b)).fold(0.0, f64::max),
            choices: choices
                .gates
                .iter()
                .zip(&choices.ids)
                .map(|(gate, ids)| ids.len() / gate.spec.top_k)
                .sum(),
            turned: turned.collect(),
            misses: misses(device, &cpu.greedy_ids, rms_error(&device.logits, &cpu.logits)),
            tolerance: match kv {
                KvDtype::F32 | KvDtype::Bf16 => TOLERANCE,
                KvDtype::Fp8E4m3 | KvDtype::Fp8E5m2 => FP8_TOLERANCE,
            },
        }
    }
}

fn turned(layer: usize, device: &Run, cpu: &Run, choices: &Choices) -> Vec<Turned> {
    let gate = &choices.gates[layer];
    let (experts, top_k) = (gate.spec.experts, gate.spec.top_k);
    let keys = |run: &Run| -> Vec<f32> {
        let tokens = run.router_logits[layer].chunks(experts);
        tokens.flat_map(|z| gate.keys(z)).collect()
    };
    let (found, expected) = (keys(device), keys(cpu));
    let rms = rms_error(&found, &expected);
    let tokens = expected.chunks(experts).zip(choices.ids[layer].chunks(top_k));
    let turned = tokens.enumerate().filter_map(|(position, (keys, taken))| {
        let own = gate.chosen(keys);
        let key = |id: &u32| f64::from(keys[*id as usize]);
        let left_out = own.iter().filter(|id| !taken.contains(id)).map(key);
        let best = left_out.reduce(f64::max)?;
        let instead = taken.iter().filter(|id| !own.contains(id)).map(key);
        let gap = best - instead.reduce(f64::min)?;
        Some(Turned {
            layer,
            position,
            gap,
            rms,
            is_tie: gap <= TIE_ERRORS * rms,
        })
    });
    turned.collect()
}
