//! Choice of experts, the experts on rows that the host has listed, and the weighted sum, op by op.

use conclave_plan::model::{MoeSpec, Scoring};

use super::super::format::padded;
use super::super::rows::as_bytes;
use super::super::step::FEW_TOKENS;
use super::super::workspace::Slot;
use super::super::{CudaBackend, shape};
use crate::backend::{Buffer, ExpertRow, ExpertsId, LinearId, Result, VectorId};
use crate::ops::experts::cuda::{self as experts, ExpertParams, Rows};
use crate::ops::linear::cuda::{Input, LinearCall, linear};
use crate::ops::rmsnorm::cuda::{CombineRows, NormInput, NormRows, combine_rows};
use crate::ops::route::cuda::{self as route, GATE_PARTS, Group, Groups, RouteParams, RouteTokens};

/// Expert rows of one pass when the host has listed them.
const EXPERT_ROWS: usize = 1024;

impl CudaBackend {
    #[expect(clippy::too_many_arguments, reason = "one fused op, as `Backend` names it")]
    pub(in crate::cuda) fn op_route(
        &mut self,
        spec: &MoeSpec,
        eps: f32,
        norm: VectorId,
        gate: LinearId,
        bias: Option<VectorId>,
        hidden: &Buffer,
        normed: &Buffer,
        ids: &Buffer,
        weights: &Buffer,
        router_logits: Option<&Buffer>,
    ) -> Result<()> {
        const OP: &str = "route";
        let tokens = self.step.tokens;
        let inputs = self.linear(OP, gate)?.inputs;
        self.width = inputs;
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * inputs * 4)?;
        let normed = self.memory_of(OP, "normed", normed, tokens * inputs * 4)?;
        let ids = self.memory_of(OP, "ids", ids, tokens * spec.top_k * 4)?;
        let weights = self.memory_of(OP, "weights", weights, tokens * spec.top_k * 4)?;
        let router_logits = match router_logits {
            Some(buffer) => self.memory_of(OP, "router logits", buffer, tokens * spec.experts * 4)?,
            None => 0,
        };
        let norm = self.vector(OP, norm, inputs)?;
        let logits = self.workspace.get(
            &self.gpu,
            Slot::GateLogits,
            GATE_PARTS * FEW_TOKENS * spec.experts * 4,
        )?;
        for first in (0..tokens).step_by(FEW_TOKENS) {
            let count = FEW_TOKENS.min(tokens - first);
            let at = |width: usize| (first * width * 4) as u64;
            self.norm(
                hidden + at(inputs),
                0,
                norm,
                eps,
                inputs,
                count,
                normed + at(inputs),
            )?;
            let gates = [self.linear(OP, gate)?];
            let input = Input::Rows(normed + at(inputs));
            linear(
                &self.gpu,
                &LinearCall {
                    weights: &gates,
                    input,
                    tokens: count,
                    parts: GATE_PARTS,
                    y: logits,
                    residual: 0,
                    squares: 0,
                },
            )?;
            let params = RouteTokens {
                route: self.route_params(OP, spec, bias, logits, count)?,
                ids: ids + at(spec.top_k),
                weights: weights + at(spec.top_k),
                router_logits: if router_logits == 0 {
                    0
                } else {
                    router_logits + at(spec.experts)
                },
                ..RouteTokens::default()
            };
            route::route(&self.gpu, &params)?;
        }
        Ok(())
    }

    pub(in crate::cuda) fn op_experts(
        &mut self,
        experts: ExpertsId,
        input: &Buffer,
        rows: &[ExpertRow],
        out: &Buffer,
    ) -> Result<()> {
        const OP: &str = "experts";
        let block = self.expert_block(OP, experts)?;
        let (hidden, inter, count, format, param) = (
            block.hidden,
            block.inter,
            block.count,
            block.format,
            block.param(),
        );
        let highest = rows.iter().map(|row| row.row).max().unwrap_or(0) as usize;
        let input = self.memory_of(OP, "input", input, (highest + 1) * hidden * 4)?;
        let y = self.memory_of(OP, "out", out, rows.len() * hidden * 4)?;
        if let Some(row) = rows.iter().find(|row| row.expert as usize >= count) {
            return Err(shape(OP, "expert", row.expert, format!("below {count}")));
        }
        let acted = self
            .workspace
            .get(&self.gpu, Slot::Acted, EXPERT_ROWS * padded(inter) * 4)?;
        let places = self
            .workspace
            .get(&self.gpu, Slot::Groups, Groups::bytes(EXPERT_ROWS, count))?;
        let groups = Groups::at(places, EXPERT_ROWS, count);
        for first in (0..rows.len()).step_by(EXPERT_ROWS) {
            let part = &rows[first..rows.len().min(first + EXPERT_ROWS)];
            let mut order: Vec<usize> = (0..part.len()).collect();
            order.sort_by_key(|i| part[*i].expert);
            let mut listed: Vec<Group> = Vec::new();
            for (position, index) in order.iter().enumerate() {
                let expert = part[*index].expert as i32;
                match listed.last_mut() {
                    Some(group) if group.expert == expert && (group.rows as usize) < route::GROUP_ROWS => {
                        group.rows += 1
                    }
                    _ => listed.push(Group {
                        expert,
                        first: position as i32,
                        rows: 1,
                        token: 0,
                    }),
                }
            }
            let row_token: Vec<u32> = order.iter().map(|i| part[*i].row).collect();
            let row_slot: Vec<u32> = order.iter().map(|i| (first + i) as u32).collect();
            let memory = self
                .workspace
                .memory(Slot::Groups)
                .ok_or_else(|| shape(OP, "workspace", "absent", "present"))?;
            let offset = |address: u64| (address - places) as usize;
            self.gpu.write(memory, 0, as_bytes(&[listed.len() as i32]))?;
            self.gpu.write(memory, offset(groups.group), as_bytes(&listed))?;
            self.gpu
                .write(memory, offset(groups.row_token), as_bytes(&row_token))?;
            self.gpu
                .write(memory, offset(groups.row_slot), as_bytes(&row_slot))?;
            let params = ExpertParams {
                experts: param,
                groups,
                x: input,
                acted,
                y,
                ..ExpertParams::default()
            };
            let most = route::max_groups(EXPERT_ROWS, count);
            experts::gate_up_groups(&self.gpu, format, most, Rows::Any, &params)?;
            experts::down_groups(&self.gpu, format, most, &ExpertParams { x: acted, ..params })?;
        }
        Ok(())
    }

    pub(in crate::cuda) fn op_combine(
        &mut self,
        k: usize,
        y: &Buffer,
        weights: &Buffer,
        hidden: &Buffer,
    ) -> Result<()> {
        const OP: &str = "combine";
        let tokens = self.step.tokens;
        let width = self.width;
        if width == 0 {
            return Err(shape(OP, "width", 0, "that of a `route` before"));
        }
        let hidden = self.memory_of(OP, "hidden", hidden, tokens * width * 4)?;
        let y = self.memory_of(OP, "y", y, tokens * k * width * 4)?;
        let weights = self.memory_of(OP, "weights", weights, tokens * k * 4)?;
        let input = NormInput {
            x0: hidden,
            sum_out: hidden,
            k: width as i32,
            ..NormInput::default()
        };
        let params = CombineRows {
            norm: NormRows {
                input,
                ..NormRows::default()
            },
            y,
            weights,
            slots: k as i32,
            ..CombineRows::default()
        };
        combine_rows(&self.gpu, tokens, &params)
    }

    pub(in crate::cuda) fn route_params(
        &self,
        op: &'static str,
        spec: &MoeSpec,
        bias: Option<VectorId>,
        logits: u64,
        tokens: usize,
    ) -> Result<RouteParams> {
        if spec.experts > route::MAX_EXPERTS || spec.top_k > route::MAX_TOP_K || spec.top_k > spec.experts {
            return Err(shape(
                op,
                "experts",
                format!("{} of {}", spec.top_k, spec.experts),
                format!("at most {} of {}", route::MAX_TOP_K, route::MAX_EXPERTS),
            ));
        }
        Ok(RouteParams {
            logits,
            bias: bias.map_or(Ok(0), |id| self.vector(op, id, spec.experts))?,
            parts: GATE_PARTS as i32,
            tokens: tokens as i32,
            experts: spec.experts as i32,
            k: spec.top_k as i32,
            softmax: i32::from(spec.scoring == Scoring::Softmax),
            renormalize: i32::from(spec.renormalize),
        })
    }
}
