//! Why a step over several ranks may give other logits than one rank's: a choice of experts that was so close that rounding
//! turned it. Compares what the gates of both said, and finds behind every row that strays such a choice, of the token itself or
//! of one that it attends to.
//!
//! A token has been *reached* at a layer if a choice of it, or of a token before it, turned at a layer below: from there on its
//! own gates may say anything. Where it has not been, the gates of both runs differ by rounding alone, which is measured there;
//! a choice that turns there is a *root*, and must have been a tie: the keys of the experts that were exchanged must be
//! no further apart than a few times the largest such difference.

use conclave_plan::model::{MoeSpec, Scoring};

use crate::cases::compare;

/// How many times the measured rounding the keys of a tie may be apart: two keys move, each by as much as the largest difference
/// that other tokens show.
const TIE: f32 = 2.0;
/// What rounding does to the gates of a layer at most, relative, in the mean of squares: some steps of BF16, one a layer and way.
const ROUNDING: f64 = 1e-2;

/// One layer's gates of all tokens, `[tokens, experts]`, in one run and the other.
pub struct Gates<'a> {
    pub expected: &'a [f32],
    pub found: &'a [f32],
    /// Of the choice; empty: none.
    pub bias: &'a [f32],
}

/// A choice that turned where nothing but rounding can have turned it.
#[derive(Debug)]
struct Root {
    token: usize,
    layer: usize,
    /// Chosen by the one and by the other run.
    experts: (usize, usize),
    /// How much the first's key exceeded the second's, and by how much rounding moves a key there.
    margin: f32,
    rounding: f32,
}

/// What was found out.
pub struct Ties {
    roots: Vec<Root>,
    /// Tokens whose rows may stray.
    reached: Vec<bool>,
    /// By layer: relative difference of the gates that were not reached.
    rounding: Vec<f64>,
    turned: usize,
}

fn keys(moe: &MoeSpec, logits: &[f32], bias: &[f32]) -> Vec<f32> {
    let most = logits.iter().copied().fold(f32::MIN, f32::max);
    let sum: f32 = logits.iter().map(|z| (z - most).exp()).sum();
    let scores = logits.iter().map(|z| match moe.scoring {
        Scoring::Sigmoid => 1.0 / (1.0 + (-z).exp()),
        Scoring::Softmax => (z - most).exp() / sum,
    });
    let biases = bias.iter().copied().chain(std::iter::repeat(0.0));
    scores.zip(biases).map(|(score, bias)| score + bias).collect()
}

/// The `k` best, the lower expert first among equals, in ascending order.
fn choice(keys: &[f32], k: usize) -> Vec<usize> {
    let mut experts: Vec<usize> = (0..keys.len()).collect();
    experts.sort_by(|a, b| keys[*b].total_cmp(&keys[*a]));
    experts.truncate(k);
    experts.sort_unstable();
    experts
}

/// The closest pair of experts of which one run chose the first and the other the second: (first, second, how much the first's
/// key in the one run exceeds the second's), of those that are furthest apart.
fn exchanged(keys: &[f32], one: &[usize], other: &[usize]) -> Option<(usize, usize, f32)> {
    let mut left: Vec<usize> = one.iter().filter(|e| !other.contains(e)).copied().collect();
    let mut right: Vec<usize> = other.iter().filter(|e| !one.contains(e)).copied().collect();
    for experts in [&mut left, &mut right] {
        experts.sort_by(|a, b| keys[*b].total_cmp(&keys[*a]));
    }
    let pairs = left
        .iter()
        .zip(&right)
        .map(|(a, b)| (*a, *b, keys[*a] - keys[*b]));
    pairs.max_by(|a, b| a.2.total_cmp(&b.2))
}

impl Ties {
    /// `layers`: in their order. All have the gates of the same tokens, one sequence's in its order.
    pub fn find(moe: &MoeSpec, layers: &[Gates<'_>]) -> Ties {
        let tokens = layers
            .first()
            .map_or(0, |gates| gates.expected.len() / moe.experts);
        let mut reached = vec![false; tokens];
        let mut ties = Ties {
            roots: Vec::new(),
            reached: Vec::new(),
            rounding: Vec::new(),
            turned: 0,
        };
        // By how much keys of tokens that were not reached moved, in the layers so far.
        let mut moved: Vec<(usize, f32)> = Vec::new();
        for (layer, gates) in layers.iter().enumerate() {
            let mut turned = Vec::new();
            let (mut here, mut there) = (Vec::new(), Vec::new());
            for (token, is_reached) in reached.iter().enumerate() {
                let at = token * moe.experts..(token + 1) * moe.experts;
                let (a, b) = (&gates.expected[at.clone()], &gates.found[at]);
                let (one, other) = (keys(moe, a, gates.bias), keys(moe, b, gates.bias));
                let chosen = (choice(&one, moe.top_k), choice(&other, moe.top_k));
                if !is_reached {
                    here.extend_from_slice(a);
                    there.extend_from_slice(b);
                    let most = one.iter().zip(&other).map(|(x, y)| (x - y).abs());
                    moved.push((token, most.fold(0.0, f32::max)));
                }
                if let Some((first, second, margin)) = exchanged(&one, &chosen.0, &chosen.1) {
                    turned.push(token);
                    if !is_reached {
                        ties.roots.push(Root {
                            token,
                            layer,
                            experts: (first, second),
                            margin,
                            rounding: 0.0,
                        });
                    }
                }
            }
            ties.rounding.push(compare(&there, &here).0);
            // What other tokens show, since its own difference turned the choice.
            for root in ties.roots.iter_mut().filter(|root| root.layer == layer) {
                let others = moved.iter().filter(|(token, _)| *token != root.token);
                root.rounding = others.map(|(_, most)| *most).fold(0.0, f32::max);
            }
            ties.turned += turned.len();
            if let Some(first) = turned.first() {
                reached[*first..].fill(true);
            }
        }
        ties.reached = reached;
        ties
    }

    /// Whether rounding explains the rows that stray; else what it does not explain.
    pub fn explain(&self, strayed: &[usize]) -> Result<(), String> {
        let far = (0..).zip(&self.rounding).find(|(_, error)| **error > ROUNDING);
        if let Some((layer, error)) = far {
            return Err(format!(
                "the gates of layer {layer} differ by {error:.1e} where no choice turned before"
            ));
        }
        if let Some(root) = self.roots.iter().find(|root| root.margin > TIE * root.rounding) {
            return Err(format!("a choice turned that was no tie: {root:?}"));
        }
        let unexplained = strayed
            .iter()
            .find(|row| !self.reached.get(**row).is_some_and(|r| *r));
        match unexplained {
            Some(row) => Err(format!(
                "row {row} strays, and no choice of it or before it turned"
            )),
            None => Ok(()),
        }
    }

    pub fn describe(&self) -> String {
        let ratio = |root: &Root| root.margin / root.rounding;
        let worst = self.roots.iter().max_by(|a, b| ratio(a).total_cmp(&ratio(b)));
        let closest = match (self.roots.first(), worst) {
            (Some(first), Some(worst)) => format!(
                ", the first at token {}, layer {}: expert {} before {} by {:.1e} where rounding moves a key by {:.1e}; the furthest apart \
                 {:.2} times that",
                first.token,
                first.layer,
                first.experts.0,
                first.experts.1,
                first.margin,
                first.rounding,
                ratio(worst)
            ),
            _ => String::new(),
        };
        format!(
            "gates differ by {:.1e} where no choice turned before; {} choices turned, {} by rounding alone{closest}",
            self.rounding.iter().copied().fold(0.0, f64::max),
            self.turned,
            self.roots.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn moe() -> MoeSpec {
        MoeSpec {
            experts: 3,
            top_k: 1,
            intermediate: 1,
            scoring: Scoring::Sigmoid,
            selection_bias: false,
            renormalize: true,
        }
    }

    fn find(one: &[&[f32]], other: &[&[f32]]) -> Ties {
        let gates: Vec<Gates<'_>> = one
            .iter()
            .zip(other)
            .map(|(expected, found)| Gates {
                expected,
                found,
                bias: &[],
            })
            .collect();
        Ties::find(&moe(), &gates)
    }

    #[test]
    fn a_tie_explains_the_rows_from_its_token_on_and_nothing_else_does() {
        let one: &[f32] = &[1.0, 0.0, -1.0, 0.5, 0.4999, -1.0, 1.0, 0.0, -1.0];
        let turned: &[f32] = &[1.0002, 0.0, -1.0, 0.5, 0.5001, -1.0, 1.0, 0.0, -1.0];
        // Behind it gates may say anything.
        let far: &[f32] = &[1.0, 0.0, -1.0, -3.0, 0.5, 2.0, 0.0, 1.0, 2.0];
        let ties = find(&[one, one], &[turned, far]);
        assert!(ties.explain(&[1, 2]).is_ok());
        assert!(ties.explain(&[0]).is_err());
        // Before it they may not.
        let early: &[f32] = &[2.0, 0.0, -1.0, 0.5, 0.5001, -1.0, 1.0, 0.0, -1.0];
        assert!(find(&[one, one], &[early, far]).explain(&[]).is_err());
        // Nor may a choice turn that was no tie, or gates differ by more than rounding.
        let apart: &[f32] = &[1.0, 0.0, -1.0, 0.6, 0.4, -1.0, 1.0, 0.0, -1.0];
        let swapped: &[f32] = &[1.0002, 0.0, -1.0, 0.5, 0.501, -1.0, 1.0, 0.0, -1.0];
        assert!(find(&[apart], &[swapped]).explain(&[]).is_err());
        let near: &[f32] = &[1.0, 0.0, -1.0, 0.505, 0.5, -1.0, 1.0, 0.0, -1.0];
        let crossed: &[f32] = &[1.0002, 0.0, -1.0, 0.5, 0.5002, -1.0, 1.0, 0.0, -1.0];
        let ties = find(&[near], &[crossed]);
        assert_eq!(ties.roots.len(), 1);
        assert!(ties.explain(&[]).is_err_and(|why| why.contains("no tie")));
    }
}
