//! One worker: nothing is moved. Experts read the tokens' own rows and write where `combine` wants them.

use conclave_kernels::backend::{Backend, Buffer, ExpertRow, KernelError};

use super::routing::Routes;
use super::{Input, Result, Tokens, Transport, Work};

/// A [`Transport`] for a group of one.
#[derive(Debug)]
pub struct LocalTransport {
    routes: Routes,
    rows: Vec<ExpertRow>,
    ids: Vec<u8>,
    pending: bool,
}

impl LocalTransport {
    pub fn new(routes: Routes) -> LocalTransport {
        LocalTransport {
            routes,
            rows: Vec::new(),
            ids: Vec::new(),
            pending: false,
        }
    }
}

impl Transport for LocalTransport {
    fn describe(&self) -> String {
        "local".into()
    }

    fn begin_step(&mut self, _: u64) -> Result<()> {
        Ok(())
    }

    fn dispatch(&mut self, backend: &mut dyn Backend, tokens: Tokens<'_>) -> Result<()> {
        let layer = self.routes.layer(tokens.layer);
        self.ids.resize(tokens.count * tokens.top_k * 4, 0);
        backend.read(tokens.experts, 0, &mut self.ids)?;
        self.rows.clear();
        for (index, &expert) in self.ids.as_chunks().0.iter().enumerate() {
            let expert = u32::from_le_bytes(expert);
            let local = layer.local(expert).ok_or_else(|| KernelError::Shape {
                op: "dispatch",
                what: "expert",
                found: expert.to_string(),
                expected: format!("one of the layer's {}", layer.experts()),
            })?;
            self.rows.push(ExpertRow {
                row: (index / tokens.top_k) as u32,
                expert: local,
            });
        }
        self.pending = !self.rows.is_empty();
        Ok(())
    }

    fn next<'a>(&'a mut self, _: &mut dyn Backend, _: &Buffer) -> Result<Option<Work<'a>>> {
        let pending = std::mem::take(&mut self.pending);
        Ok(pending.then_some(Work {
            rows: &self.rows,
            input: Input::Own,
        }))
    }

    fn give(&mut self, _: &mut dyn Backend, _: &Buffer) -> Result<()> {
        Ok(())
    }

    fn combine(&mut self, _: &mut dyn Backend, _: &Buffer) -> Result<()> {
        Ok(())
    }
}
