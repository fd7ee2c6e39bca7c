//! The face of this crate: everything textual about one model.
//!
//! ```no_run
//! # use conclave_text::{Text, chat::Chat, output::OutputOptions, parse::End};
//! # fn main() -> conclave_text::Result<()> {
//! # let (chat, seed, tokens) = (Chat::default(), 0, vec![]);
//! let text = Text::load(std::path::Path::new("models/demo"))?;
//! let prompt = text.render_chat(&chat)?;
//! // … generate from `prompt.ids`; then, for each choice:
//! let mut output = text.output(OutputOptions::default(), Some(&prompt.output), seed)?;
//! let delta = output.push(&tokens);
//! let last = output.finish(End::Stop);
//! # Ok(()) }
//! ```

use std::{path::Path, sync::Arc};

use crate::{
    chat::{self, Chat, ToolChoice, ToolSpec},
    error::{Result, TextError},
    generation_config::GenerationConfig,
    grammar::{Constraint, GrammarCompiler, tool_constraint},
    output::{OutputOptions, OutputStream},
    parse::{CallRules, Format, OutputParser, ParserNames},
    prompt,
    template::ChatTemplate,
    tokenizer::Tokenizer,
};

/// A model's tokenizer, chat template and text conventions. Shared by all requests; never changes.
pub struct Text {
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    generation: GenerationConfig,
    format: Format,
}

/// A conversation ready to be generated from.
#[derive(Clone, Debug)]
pub struct RenderedChat {
    pub text: String,
    pub ids: Vec<u32>,
    /// How to read what comes after it.
    pub output: ChatOutput,
}

/// What the parser of a chat's output must know. The same for all choices.
#[derive(Clone, Debug)]
pub struct ChatOutput {
    /// The tools of the request.
    pub tools: Arc<[ToolSpec]>,
    pub tool_choice: ToolChoice,
    pub parallel_tool_calls: bool,
    pub starts_in_reasoning: bool,
}

impl Text {
    /// Loads what a checkpoint directory says about text: tokenizer.json, tokenizer_config.json,
    /// chat_template.jinja and generation_config.json; only the first must exist. The output parsers are those that
    /// the checkpoint's tokens and template show.
    pub fn load(directory: &Path) -> Result<Self> {
        Self::load_with(directory, &ParserNames::default())
    }

    /// The same with output parsers chosen by name.
    pub fn load_with(directory: &Path, parsers: &ParserNames) -> Result<Self> {
        Self::load_with_template(directory, parsers, None)
    }

    /// The same with a template file instead of the checkpoint's (`--chat-template`).
    pub fn load_with_template(
        directory: &Path,
        parsers: &ParserNames,
        template: Option<&Path>,
    ) -> Result<Self> {
        let tokenizer = Arc::new(Tokenizer::load(directory)?);
        let template = match template {
            Some(file) => Some(ChatTemplate::load_file(file, tokenizer.config())?),
            None => ChatTemplate::load(directory, tokenizer.config())?,
        };
        let added = |text: &str| {
            let mut tokens = tokenizer.added_tokens().iter();
            tokens.find(|token| token.content == text).map(|token| token.id)
        };
        Ok(Self {
            format: Format::choose(parsers, added, template.as_ref().map(ChatTemplate::source))?,
            template,
            generation: GenerationConfig::load(directory)?,
            tokenizer,
        })
    }

    pub fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    pub fn generation_config(&self) -> &GenerationConfig {
        &self.generation
    }

    /// The output format: which parsers were chosen, and its marker tokens.
    pub fn format(&self) -> &Format {
        &self.format
    }

    pub fn has_chat_template(&self) -> bool {
        self.template.is_some()
    }

    /// Tokens that end an output: generation_config.json's, or else the tokenizer's eos token.
    pub fn eos_token_ids(&self) -> Vec<u32> {
        if !self.generation.eos_token_ids.is_empty() {
            return self.generation.eos_token_ids.clone();
        }
        let eos = self.tokenizer.config().special_token("eos_token");
        eos.and_then(|eos| self.tokenizer.token_to_id(eos))
            .into_iter()
            .collect()
    }

    /// Encodes a prompt given as text.
    pub fn encode_prompt(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>> {
        self.tokenizer.encode(text, add_special_tokens)
    }

    /// Renders and encodes a conversation with the checkpoint's template.
    pub fn render_chat(&self, chat: &Chat) -> Result<RenderedChat> {
        self.render_chat_salted(chat, 0)
    }

    /// The same for one tenant: encoded pieces are remembered for the same `salt` only (a hash of `cache_salt`).
    pub fn render_chat_salted(&self, chat: &Chat, salt: u64) -> Result<RenderedChat> {
        let template = self.template.as_ref().ok_or_else(|| {
            TextError::request(
                "messages",
                "this model has no chat template: send a prompt instead",
            )
        })?;
        let tools = chat::read_tools(&chat.tools)?;
        chat::check_tool_choice(&chat.tool_choice, &tools)?;
        let (text, ids) = prompt::render_chat(template, &self.tokenizer, chat, &tools, salt)?;
        let starts_in_reasoning = self
            .format
            .starts_in_reasoning(&ids, &text, &self.eos_token_ids());
        Ok(RenderedChat {
            text,
            ids,
            output: ChatOutput {
                tools: tools.into(),
                tool_choice: chat.tool_choice.clone(),
                parallel_tool_calls: chat.parallel_tool_calls.unwrap_or(true),
                starts_in_reasoning,
            },
        })
    }

    /// A compiler of grammars for this vocabulary. Slow to make (the vocabulary becomes a trie): one per model.
    /// `vocab_size`: how many logits the model has.
    pub fn grammar_compiler(&self, vocab_size: u32) -> Result<GrammarCompiler> {
        GrammarCompiler::new(self.tokenizer.clone(), vocab_size, &self.eos_token_ids())
    }

    /// The token after which a constrained output begins, if this output begins with reasoning.
    pub fn reasoning_end(&self, chat: Option<&ChatOutput>) -> Option<u32> {
        chat.filter(|chat| chat.starts_in_reasoning)
            .and_then(|_| self.format.reasoning_end())
    }

    /// What an output is held to: by the form that was asked for, and by a chat's tools and tool_choice.
    pub fn constraint(
        &self,
        chat: Option<&ChatOutput>,
        answer: Option<Constraint>,
    ) -> Result<Option<Constraint>> {
        match chat {
            None => Ok(answer),
            Some(chat) => tool_constraint(&self.format, chat, answer),
        }
    }

    /// The output of one choice. With `chat` reasoning and calls are told from content; without, all is text.
    /// `call_id_seed` should differ between choices and be the same when a request is run anew.
    pub fn output(
        &self,
        options: OutputOptions,
        chat: Option<&ChatOutput>,
        call_id_seed: u64,
    ) -> Result<OutputStream> {
        let parser = chat.and_then(|chat| self.output_parser(chat, call_id_seed));
        OutputStream::new(self.tokenizer.clone(), options, parser)
    }

    /// The parser of a chat's output alone, for text that no tokens stand behind; `None` if the format needs none.
    pub fn output_parser(&self, chat: &ChatOutput, call_id_seed: u64) -> Option<Box<dyn OutputParser>> {
        self.format
            .parser(chat.call_rules(call_id_seed), chat.starts_in_reasoning)
    }
}

impl ChatOutput {
    /// Without tools nothing is read as a call; with tool_choice "none" calls are read, and dropped.
    fn call_rules(&self, id_seed: u64) -> Option<CallRules> {
        if self.tools.is_empty() {
            return None;
        }
        let tools = match &self.tool_choice {
            ToolChoice::Auto | ToolChoice::Required => self.tools.clone(),
            ToolChoice::None => Arc::new([]),
            ToolChoice::Named(name) => self
                .tools
                .iter()
                .filter(|tool| tool.name == *name)
                .cloned()
                .collect(),
        };
        Some(CallRules {
            tools,
            max_calls: if self.parallel_tool_calls { u32::MAX } else { 1 },
            id_seed,
        })
    }
}

#[cfg(test)]
mod tests;
