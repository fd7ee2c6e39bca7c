//! A device's run beside the CPU's with the same choices of experts.
//!
//! A choice that rounding turns changes everything behind it, so a device cannot be held to a reference that chose
//! otherwise. What it is held to: the CPU, given the device's choices, computes the same but for rounding, and every
//! choice that the CPU would not have made itself was a tie there. How much rounding is, the CPU tells: it runs a
//! second time with everything that products read rounded to BF16.

use super::choices::Choices;
use super::compare::{Miss, misses, relative, rms_error};
use super::run::Run;

/// How far a device is from the CPU that chose the same experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Agreement {
    pub found: Distance,
    /// What rounding to BF16 alone does on the CPU.
    pub rounding: Distance,
    /// Choices in all: one a token and layer.
    pub choices: usize,
    /// Those that the CPU would have made otherwise.
    pub turned: Vec<Turned>,
    /// Greedy tokens that are not the CPU's.
    pub misses: Vec<Miss>,
}

/// Of a run from the CPU's; relative errors are of 2-norms.
#[derive(Clone, Debug, PartialEq)]
pub struct Distance {
    /// Over all tokens, the continuation's too.
    pub logits: f64,
    /// Of the layer where it is largest.
    pub router: f64,
    /// Root mean square error of the logits of the token where it is largest.
    pub worst_token: f64,
    /// By layer: the largest difference of a key, by which experts are chosen.
    pub keys: Vec<f64>,
}

/// A choice that the CPU would have made otherwise.
#[derive(Clone, Debug, PartialEq)]
pub struct Turned {
    pub layer: usize,
    pub position: usize,
    /// On the CPU, how far the best expert that was left out is above the worst that was taken, by score and bias.
    pub gap: f64,
    /// What is a tie in this layer.
    pub bound: f64,
}

impl Turned {
    pub fn is_tie(&self) -> bool {
        self.gap <= self.bound
    }
}

/// Relative errors are within this in any case,
const TOLERANCE: f64 = 1e-2;
/// or within so many times what rounding does; gaps of keys are within so many of its largest difference.
const OF_ROUNDING: f64 = 2.0;
/// A margin between two logits is a tie within so many errors of one, in the token where rounding does most.
const TIE_ERRORS: f64 = 4.0;

impl Agreement {
    pub fn logits_bound(&self) -> f64 {
        TOLERANCE.max(OF_ROUNDING * self.rounding.logits)
    }

    pub fn router_bound(&self) -> f64 {
        TOLERANCE.max(OF_ROUNDING * self.rounding.router)
    }

    pub fn passes(&self) -> bool {
        self.found.logits <= self.logits_bound()
            && self.found.router <= self.router_bound()
            && self.turned.iter().all(Turned::is_tie)
            && self.misses.iter().all(|miss| miss.is_tie)
    }

    /// `cpu` and `rounded` were held to `choices`, which are those of `device`.
    pub fn of(device: &Run, cpu: &Run, rounded: &Run, choices: &Choices) -> Agreement {
        let rounding = Distance::of(rounded, cpu, choices);
        let bounds = rounding.keys.iter().map(|most| OF_ROUNDING * most);
        let turned = bounds
            .enumerate()
            .flat_map(|(layer, bound)| turned(layer, bound, cpu, choices));
        let layers = choices.gates.iter().zip(&choices.ids);
        Agreement {
            found: Distance::of(device, cpu, choices),
            choices: layers.map(|(gate, ids)| ids.len() / gate.spec.top_k).sum(),
            turned: turned.collect(),
            misses: misses(device, &cpu.greedy_ids, TIE_ERRORS * rounding.worst_token),
            rounding,
        }
    }
}

impl Distance {
    fn of(found: &Run, cpu: &Run, choices: &Choices) -> Distance {
        let layers = || found.router_logits.iter().zip(&cpu.router_logits);
        let tokens = found.logits.chunks(found.vocab).zip(cpu.logits.chunks(cpu.vocab));
        let keys = choices.gates.iter().zip(layers()).map(|(gate, (a, b))| {
            let differences = a.chunks(gate.spec.experts).zip(b.chunks(gate.spec.experts));
            let largest = differences.flat_map(|(a, b)| {
                let pairs = gate.keys(a).into_iter().zip(gate.keys(b));
                pairs.map(|(a, b)| f64::from((a - b).abs())).collect::<Vec<_>>()
            });
            largest.fold(0.0, f64::max)
        });
        Distance {
            logits: relative(&found.logits, &cpu.logits),
            router: layers().map(|(a, b)| relative(a, b)).fold(0.0, f64::max),
            worst_token: tokens.map(|(a, b)| rms_error(a, b)).fold(0.0, f64::max),
            keys: keys.collect(),
        }
    }
}

fn turned(layer: usize, bound: f64, cpu: &Run, choices: &Choices) -> Vec<Turned> {
    let gate = &choices.gates[layer];
    let tokens = cpu.router_logits[layer].chunks(gate.spec.experts);
    let tokens = tokens.zip(choices.ids[layer].chunks(gate.spec.top_k));
    let turned = tokens.enumerate().filter_map(|(position, (z, taken))| {
        let keys = gate.keys(z);
        let own = gate.chosen(&keys);
        let key = |id: &u32| f64::from(keys[*id as usize]);
        let left_out = own.iter().filter(|id| !taken.contains(id)).map(key);
        let best = left_out.reduce(f64::max)?;
        let instead = taken.iter().filter(|id| !own.contains(id)).map(key);
        Some(Turned {
            layer,
            position,
            gap: best - instead.reduce(f64::min)?,
            bound,
        })
    });
    turned.collect()
}
