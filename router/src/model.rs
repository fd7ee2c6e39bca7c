//! The checkpoint as the router knows it: its text files only. Weights are the workers' business.

use std::sync::{Arc, OnceLock};

use conclave_plan::model::ModelSpec;
use conclave_plan::storage::StorageFormat;
use conclave_text::generation_config::GenerationConfig;
use conclave_text::grammar::{Constraint, Grammar, GrammarCompiler};
use conclave_text::parse::ParserNames;
use conclave_text::{Text, TextError};

use crate::config::RouterConfig;
use crate::error::{Result, RouterError};

/// Longest served name.
const MAX_NAME_BYTES: usize = 256;

/// What is served.
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
    /// Sampling parameters of requests that leave them unset; `None` is neutral.
    pub defaults: GenerationConfig,
    /// `None` with `--skip-tokenizer-init`.
    pub text: Option<TextModel>,
}

/// The text side of a model.
pub struct TextModel {
    pub text: Arc<Text>,
    /// Text of more bytes has more tokens than the model's length, whatever it is; `None`: cannot be told.
    pub longest_prompt_bytes: Option<usize>,
    /// Made when it is first asked for, since the vocabulary has to become a tree; or why it cannot be made.
    grammars: OnceLock<conclave_text::Result<GrammarCompiler>>,
    vocab: u32,
}

impl Model {
    /// Reads config.json, generation_config.json and, unless told not to, tokenizer and chat template.
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
        let vocab = to_u32(spec.vocab);
        let generation = GenerationConfig::load(&config.model)?;
        let mut eos = spec.eos_token_ids.clone();
        eos.extend(&generation.eos_token_ids);
        let text = if config.skip_tokenizer_init {
            None
        } else {
            Some(TextModel::load(config, max_model_len, vocab)?)
        };
        if let Some(text) = &text {
            eos.extend(text.text.eos_token_ids());
        }
        eos.sort_unstable();
        eos.dedup();
        eos.retain(|&id| id < vocab);
        Ok(Model {
            names: names(config)?,
            max_model_len,
            vocab,
            layers: to_u32(spec.layers.len()),
            experts: to_u32(experts),
            expert_bytes,
            eos,
            defaults: if config.use_generation_config {
                generation
            } else {
                GenerationConfig::default()
            },
            text,
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

impl TextModel {
    fn load(config: &RouterConfig, max_model_len: u32, vocab: u32) -> Result<TextModel> {
        let parsers = ParserNames {
            reasoning: config.reasoning_parser.clone(),
            tool_calls: config.tool_call_parser.clone(),
        };
        let template = config.chat_template.as_deref();
        let text = Text::load_with_template(&config.model, &parsers, template)?;
        let tokenizer = text.tokenizer();
        if tokenizer.vocab_len() > vocab as usize {
            return Err(RouterError::config(
                "vocab_size",
                vocab,
                format!(
                    "tokenizer.json has {} tokens: some would have no row",
                    tokenizer.vocab_len()
                ),
                "take config.json and tokenizer.json from one checkpoint",
            ));
        }
        let ids = 0..to_u32(tokenizer.vocab_len());
        let longest_token = ids.map(|id| tokenizer.token_bytes(id).len()).max().unwrap_or(0);
        // Only where tokens are the text's own bytes is a token never more text than its bytes.
        let bounded = tokenizer.is_byte_level() && longest_token > 0;
        Ok(TextModel {
            longest_prompt_bytes: bounded.then(|| longest_token.saturating_mul(max_model_len as usize)),
            text: Arc::new(text),
            grammars: OnceLock::new(),
            vocab,
        })
    }

    /// The compiler of grammars. The first call takes as long as the vocabulary is large.
    pub fn grammars(&self) -> conclave_text::Result<&GrammarCompiler> {
        let made = self
            .grammars
            .get_or_init(|| self.text.grammar_compiler(self.vocab));
        made.as_ref().map_err(TextError::clone)
    }

    /// Compiles what an output is held to, from `reasoning_end` on if it begins with reasoning.
    pub fn compile(
        &self,
        constraint: &Constraint,
        reasoning_end: Option<u32>,
    ) -> conclave_text::Result<Grammar> {
        self.grammars()?.compile(constraint, reasoning_end)
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

/// Plan's limits are far below 2^32.
fn to_u32(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}
