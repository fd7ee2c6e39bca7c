//! How many workers `serve` starts, also in vLLM's and SGLang's words.
//!
//! There is one kind of parallelism here: attention is data-parallel and experts are sharded over all workers. A
//! tensor-parallel or data-parallel size becomes a number of workers, and a note says so.

use clap::Args;
use clap::builder::BoolishValueParser;

#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Workers")]
pub struct ParallelSettings {
    /// Local worker processes; without it, one per GPU, or 2 on a CPU.
    #[arg(long, value_name = "N", visible_aliases = ["ep-size", "ep", "moe-expert-parallel-size"], value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub workers: Option<u32>,
    /// vLLM's name for a number of workers (also -tp, --tp, --tp-size).
    #[arg(long, value_name = "N", visible_aliases = ["tp", "tp-size"], value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub tensor_parallel_size: Option<u32>,
    /// vLLM's name for a number of workers (also -dp, --dp, --dp-size).
    #[arg(long, value_name = "N", visible_aliases = ["dp", "dp-size"], value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub data_parallel_size: Option<u32>,
    /// Accepted for vLLM's sake: layers are not split, so only 1.
    #[arg(long, value_name = "N", hide = true, visible_aliases = ["pp", "pp-size"], value_parser = one_stage)]
    pub pipeline_parallel_size: Option<u32>,
    /// Accepted for vLLM's sake: experts are always sharded over the workers.
    #[arg(long, hide = true, aliases = ["enable-moe-ep", "enable-ep-moe"], num_args = 0..=1, require_equals = true, default_value = "true", default_missing_value = "true", value_parser = BoolishValueParser::new())]
    pub enable_expert_parallel: bool,
}

impl ParallelSettings {
    /// The number of workers asked for, and a note if it was asked for in other words.
    pub fn asked(&self) -> Result<(Option<u32>, Option<String>), String> {
        if !self.enable_expert_parallel {
            return Err("--enable-expert-parallel is false: experts are always sharded over the workers; leave it out".into());
        }
        let (tensor, data) = (self.tensor_parallel_size, self.data_parallel_size);
        if tensor.is_none() && data.is_none() {
            return Ok((self.workers, None));
        }
        let product = tensor.unwrap_or(1).saturating_mul(data.unwrap_or(1));
        match self.workers {
            Some(workers) if workers != product => Err(format!(
                "--workers {workers} and a parallel size of {product} disagree; give one of them"
            )),
            _ => Ok((
                Some(product),
                Some(format!(
                    "parallel size {product} means {product} workers here: attention is data-parallel, experts are sharded \
                     over all workers, no tensor is split"
                )),
            )),
        }
    }
}

fn one_stage(text: &str) -> Result<u32, String> {
    match text {
        "1" => Ok(1),
        _ => Err("layers are not split over workers; use --workers".into()),
    }
}

#[cfg(test)]
mod tests {
    use super::ParallelSettings;

    fn sizes(workers: Option<u32>, tensor: Option<u32>, data: Option<u32>) -> ParallelSettings {
        ParallelSettings {
            workers,
            tensor_parallel_size: tensor,
            data_parallel_size: data,
            pipeline_parallel_size: None,
            enable_expert_parallel: true,
        }
    }

    #[test]
    fn parallel_sizes_become_workers() {
        assert_eq!(sizes(Some(3), None, None).asked(), Ok((Some(3), None)));
        assert_eq!(sizes(None, None, None).asked(), Ok((None, None)));
        let (workers, note) = sizes(None, Some(2), Some(4)).asked().expect("a product");
        assert_eq!(workers, Some(8));
        assert!(note.expect("a note").contains("8 workers"));
        assert!(sizes(Some(3), Some(2), None).asked().is_err());
        assert!(sizes(Some(2), Some(2), None).asked().is_ok());
        let mut off = sizes(None, Some(2), None);
        off.enable_expert_parallel = false;
        assert!(off.asked().is_err());
    }
}
