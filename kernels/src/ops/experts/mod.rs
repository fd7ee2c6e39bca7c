//! Experts: `out[r] = w2(silu(w1 x) * w3 x)` with `x = input[rows[r].row]` and expert `rows[r].expert`.
//!
//! Each of the three products is a linear (see `ops::linear`); silu is `u / (1 + e^-u)`. A row's result depends on
//! its own input and expert only.

use crate::backend::{ExpertRow, KernelError, Result};
use crate::cpu::weights::CpuLinear;
use crate::ops::linear::{Packed, Sink, linear};
use crate::simd::{Isa, Kernel, LANES, Simd, math, run};

/// One expert's checked weights.
pub(crate) struct CpuExpert {
    pub(crate) gate: CpuLinear,
    pub(crate) up: CpuLinear,
    pub(crate) down: CpuLinear,
}

impl CpuExpert {
    /// Fails unless the three fit each other and the first expert of the layer (`hidden`, `intermediate`).
    pub(crate) fn check(&self, hidden: usize, intermediate: usize) -> Result<()> {
        self.gate
            .expect("upload_experts", "gate (w1)", intermediate, hidden)?;
        self.up
            .expect("upload_experts", "up (w3)", intermediate, hidden)?;
        self.down
            .expect("upload_experts", "down (w2)", hidden, intermediate)
    }
}

/// Fails if a row names an expert or an input row that is not there.
pub(crate) fn check_rows(rows: &[ExpertRow], experts: usize, inputs: usize) -> Result<()> {
    let bad = rows
        .iter()
        .find(|row| row.expert as usize >= experts || row.row as usize >= inputs);
    match bad {
        None => Ok(()),
        Some(row) => Err(KernelError::Shape {
            op: "experts",
            what: "row",
            found: format!("input {} for expert {}", row.row, row.expert),
            expected: format!("an input below {inputs} and an expert below {experts}"),
        }),
    }
}

/// `u` and `v` are scratch of `intermediate` values.
#[expect(clippy::too_many_arguments, reason = "plain inputs, outputs and scratch")]
pub(crate) fn experts(
    isa: Isa,
    experts: &[CpuExpert],
    input: &[f32],
    rows: &[ExpertRow],
    out: &mut [f32],
    packed: &mut Packed,
    u: &mut [f32],
    v: &mut [f32],
) {
    for (row, out) in rows.iter().zip(out.chunks_exact_mut(experts[0].gate.in_features)) {
        let expert = &experts[row.expert as usize];
        let x = &input[row.row as usize * out.len()..][..out.len()];
        linear(isa, &expert.gate, packed, x, u, Sink::Store);
        linear(isa, &expert.up, packed, x, v, Sink::Store);
        run(isa, SiluTimes { u, v });
        linear(isa, &expert.down, packed, u, out, Sink::Store);
    }
}

/// `u = silu(u) * v`.
struct SiluTimes<'a> {
    u: &'a mut [f32],
    v: &'a [f32],
}

impl Kernel for SiluTimes<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Simd>(self, s: S) {
        let (us, u_rest) = self.u.as_chunks_mut::<LANES>();
        let (vs, v_rest) = self.v.as_chunks::<LANES>();
        for (u, v) in us.iter_mut().zip(vs) {
            s.store(s.mul(math::silu(s, s.load(u)), s.load(v)), u);
        }
        let (mut u, mut v) = ([0.0; LANES], [0.0; LANES]);
        u[..u_rest.len()].copy_from_slice(u_rest);
        v[..v_rest.len()].copy_from_slice(v_rest);
        s.store(s.mul(math::silu(s, s.load(&u)), s.load(&v)), &mut u);
        u_rest.copy_from_slice(&u[..u_rest.len()]);
    }
}
