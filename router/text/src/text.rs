//! The face of this crate: everything textual about one model.

use std::{path::Path, sync::Arc};

use crate::{
    chat::{self, Chat, ToolSpec},
    error::{Result, TextError},
    generation_config::GenerationConfig,
    prompt::{self, RenderedChat},
    template::ChatTemplate,
    tokenizer::Tokenizer,
};

/// A model's tokenizer, chat template and text conventions. Shared by all requests; never changes.
pub struct Text {
    tokenizer: Arc<Tokenizer>,
    template: Option<ChatTemplate>,
    generation: GenerationConfig,
}

impl Text {
    /// Loads what a checkpoint directory says about text: tokenizer.json, tokenizer_config.json,
    /// chat_template.jinja and generation_config.json; only the first must exist.
    pub fn load(directory: &Path) -> Result<Self> {
        let tokenizer = Arc::new(Tokenizer::load(directory)?);
        Ok(Self {
            template: ChatTemplate::load(directory, tokenizer.config())?,
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

    /// Reads and checks a request's tools.
    pub fn read_tools(&self, chat: &Chat) -> Result<Vec<ToolSpec>> {
        chat::read_tools(&chat.tools)
    }

    /// Renders and encodes a conversation with the checkpoint's template.
    pub fn render_chat(&self, chat: &Chat) -> Result<RenderedChat> {
        let template = self.template.as_ref().ok_or_else(|| {
            TextError::request(
                "messages",
                "this model has no chat template: send a prompt instead",
            )
        })?;
        let tools = self.read_tools(chat)?;
        prompt::render_chat(template, &self.tokenizer, chat, &tools)
    }
}

#[cfg(test)]
mod tests;
