//! The experts of one layer, checked.

use crate::backend::{ExpertRow, HostExpert, KernelError, Result};
use crate::cpu::check::mismatch;
use crate::cpu::weights::CpuLinear;
use crate::ops::linear::Order;

pub(crate) struct CpuExpert {
    pub(crate) gate: CpuLinear,
    pub(crate) up: CpuLinear,
    pub(crate) down: CpuLinear,
}

/// All experts of a layer on this rank; may be none.
pub(crate) struct CpuExperts {
    pub(crate) experts: Box<[CpuExpert]>,
    pub(crate) hidden: usize,
    pub(crate) intermediate: usize,
    /// Of gate and up, and of down: the same for all experts.
    pub(crate) orders: (Order, Order),
}

impl CpuExperts {
    /// Takes over the weights. `Shape` unless all have the first one's shape; `Unsupported` unless all have formats
    /// that read their inputs in the same order.
    pub(crate) fn new(host: &[HostExpert]) -> Result<CpuExperts> {
        const OP: &str = "upload_experts";
        let mut experts = Vec::with_capacity(host.len());
        for expert in host {
            experts.push(CpuExpert {
                gate: CpuLinear::new(&expert.gate)?,
                up: CpuLinear::new(&expert.up)?,
                down: CpuLinear::new(&expert.down)?,
            });
        }
        let (hidden, intermediate, orders) = match experts.first() {
            Some(CpuExpert { gate, down, .. }) => (
                gate.in_features,
                gate.out_features,
                (Order::of(&gate.format), Order::of(&down.format)),
            ),
            None => (0, 0, (Order::Natural, Order::Natural)),
        };
        for (i, expert) in experts.iter().enumerate() {
            expert.gate.expect(OP, "gate (w1)", intermediate, hidden)?;
            expert.up.expect(OP, "up (w3)", intermediate, hidden)?;
            expert.down.expect(OP, "down (w2)", hidden, intermediate)?;
            let found = [&expert.gate, &expert.up, &expert.down].map(|weight| Order::of(&weight.format));
            if found != [orders.0, orders.0, orders.1] {
                return Err(KernelError::Unsupported(format!(
                    "expert {i} of a layer is stored in another format than expert 0: convert the layer to one format"
                )));
            }
        }
        Ok(CpuExperts {
            experts: experts.into(),
            hidden,
            intermediate,
            orders,
        })
    }

    /// Fails if a row names an expert that is not there.
    pub(crate) fn check_rows(&self, rows: &[ExpertRow]) -> Result<()> {
        match rows.iter().find(|row| row.expert as usize >= self.experts.len()) {
            None => Ok(()),
            Some(row) => {
                let expected = format!("below the {} of this rank", self.experts.len());
                Err(mismatch("experts", "local expert", row.expert, expected))
            }
        }
    }
}
