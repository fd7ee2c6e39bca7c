//! The checkpoint as the router knows it: its text files only. Weights are the workers' business.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use conclave_plan::model::ModelSpec;
use conclave_plan::storage::StorageFormat;
use serde_json::Value;

use crate::config::RouterConfig;
use crate::error::{Result, RouterError};

/// A generation_config.json has a few hundred bytes.
const MAX_GENERATION_CONFIG_BYTES: u64 = 1 << 20;
/// Longest served name.
const MAX_NAME_BYTES: usize = 256;

/// What is served.
#[derive(Clone, Debug)]
pub struct Model {
    /// Never empty; the first is the canonical one.
    pub names: Vec<String>,
    pub spec: ModelSpec,
    pub max_model_len: u32,
    pub vocab: u32,
    pub layers: u32,
    /// Experts of each layer.
    pub experts: u32,
    /// Bytes of one expert over all layers, as the config tells.
    pub expert_bytes: u64,
    /// Tokens that end a sequence unless `ignore_eos`.
    pub eos: Vec<u32>,
    pub defaults: Defaults,
}

/// Sampling parameters of requests that leave them unset.
#[derive(Clone, Debug, PartialEq)]
pub struct Defaults {
    pub temperature: f32,
    pub top_p: f32,
    pub top_k: i32,
    pub min_p: f32,
    pub repetition_penalty: f32,
    pub max_new_tokens: Option<u32>,
}

impl Default for Defaults {
    /// The neutral values.
    fn default() -> Defaults {
        Defaults {
            temperature: 1.0,
            top_p: 1.0,
            top_k: 0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            max_new_tokens: None,
        }
    }
}

impl Model {
    /// Reads config.json and generation_config.json.
    pub fn load(config: &RouterConfig) -> Result<Model> {
        let read = conclave_plan::config::read(&config.model, config.hf_overrides.as_ref())?;
        let spec = read.spec;
        let longest = to_u32(spec.max_position);
        let max_model_len = config.max_model_len.unwrap_or(longest);
        if max_model_len > longest {
            return Err(RouterError::config(
                "max_model_len",
                max_model_len,
                format!("more than the checkpoint's max_position_embeddings ({longest})"),
                "give less, or raise it with --hf-overrides",
            ));
        }
        let experts = spec
            .layers
            .iter()
            .map(|layer| layer.moe.experts)
            .max()
            .unwrap_or(0);
        let format = StorageFormat::of(&spec, read.quant.as_ref());
        let expert_bytes = spec
            .layers
            .iter()
            .map(|layer| format.expert_bytes(spec.hidden, layer))
            .sum();
        let mut eos = spec.eos_token_ids.clone();
        let mut defaults = Defaults::default();
        if let Some(generation) = generation_config(&config.model)? {
            for id in generation.ids("eos_token_id")? {
                if !eos.contains(&id) {
                    eos.push(id);
                }
            }
            if config.use_generation_config {
                defaults = generation.defaults()?;
            }
        }
        let vocab = to_u32(spec.vocab);
        eos.retain(|&id| id < vocab);
        Ok(Model {
            names: names(config)?,
            max_model_len,
            vocab,
            layers: to_u32(spec.layers.len()),
            experts: to_u32(experts),
            expert_bytes,
            eos,
            defaults,
            spec,
        })
    }

    pub fn name(&self) -> &str {
        &self.names[0]
    }

    pub fn serves(&self, name: &str) -> bool {
        name.is_empty() || self.names.iter().any(|served| served == name)
    }
}

fn names(config: &RouterConfig) -> Result<Vec<String>> {
    let mut names = config.served_model_name.clone();
    if names.is_empty() {
        let path = std::path::absolute(&config.model).unwrap_or_else(|_| config.model.clone());
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned());
        names.push(name.unwrap_or_else(|| "model".into()));
    }
    for name in &names {
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            return Err(RouterError::config(
                "served_model_name",
                name,
                format!("{} bytes long", name.len()),
                "give a name of 1 to 256 bytes",
            ));
        }
    }
    Ok(names)
}

/// A generation_config.json and where it lies.
struct Generation<'a> {
    directory: &'a Path,
    value: Value,
}

fn generation_config(model: &Path) -> Result<Option<Generation<'_>>> {
    let path = model.join("generation_config.json");
    let fail = |problem: String| RouterError::File {
        path: path.clone(),
        problem,
        advice: "mend the file, or remove it to use neutral sampling defaults",
    };
    let file = match File::open(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(fail(error.to_string())),
    };
    let mut text = Vec::new();
    file.take(MAX_GENERATION_CONFIG_BYTES + 1)
        .read_to_end(&mut text)
        .map_err(|error| fail(error.to_string()))?;
    if text.len() as u64 > MAX_GENERATION_CONFIG_BYTES {
        return Err(fail(format!("longer than {MAX_GENERATION_CONFIG_BYTES} bytes")));
    }
    let value: Value = serde_json::from_slice(&text).map_err(|error| fail(format!("not JSON: {error}")))?;
    if !value.is_object() {
        return Err(fail("not a JSON object".into()));
    }
    Ok(Some(Generation {
        directory: model,
        value,
    }))
}

impl Generation<'_> {
    fn defaults(&self) -> Result<Defaults> {
        let neutral = Defaults::default();
        let number = |name, low, high, unset: f32| self.number(name, low, high, unset.into());
        Ok(Defaults {
            temperature: number("temperature", 0.0, 100.0, neutral.temperature)? as f32,
            top_p: number("top_p", 0.0, 1.0, neutral.top_p)? as f32,
            top_k: self.number("top_k", -1.0, f64::from(i32::MAX), 0.0)? as i32,
            min_p: number("min_p", 0.0, 1.0, neutral.min_p)? as f32,
            repetition_penalty: number("repetition_penalty", 0.01, 100.0, neutral.repetition_penalty)? as f32,
            max_new_tokens: match self.number("max_new_tokens", 1.0, f64::from(u32::MAX), 0.0)? {
                0.0 => None,
                limit => Some(limit as u32),
            },
        })
    }

    fn number(&self, name: &str, low: f64, high: f64, unset: f64) -> Result<f64> {
        match self.value.get(name) {
            None | Some(Value::Null) => Ok(unset),
            Some(value) => match value.as_f64() {
                Some(number) if number >= low && number <= high => Ok(number),
                _ => Err(self.error(name, value, &format!("not a number between {low} and {high}"))),
            },
        }
    }

    fn ids(&self, name: &str) -> Result<Vec<u32>> {
        let one = |value: &Value| {
            let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
            id.ok_or_else(|| self.error(name, value, "not a token id"))
        };
        match self.value.get(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => list.iter().map(one).collect(),
            Some(value) => Ok(vec![one(value)?]),
        }
    }

    fn error(&self, name: &str, value: &Value, problem: &str) -> RouterError {
        RouterError::File {
            path: self.directory.join("generation_config.json"),
            problem: format!("{name} = {value}: {problem}"),
            advice: "mend the file, or start with --generation-config vllm to ignore it",
        }
    }
}

/// Plan's limits are far below 2^32.
fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
