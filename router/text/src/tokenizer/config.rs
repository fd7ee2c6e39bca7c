//! tokenizer_config.json: named special tokens, more added tokens, and often the chat template.

use std::path::Path;

use serde_json::Value;
use tokenizers::AddedToken;

use crate::error::{Result, TextError};

/// The part of tokenizer_config.json that is used; everything is optional.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TokenizerConfig {
    /// `bos_token`, `eos_token`, `unk_token`, `pad_token`, …: (name, text). Templates read them as variables.
    pub special_tokens: Vec<(String, String)>,
    /// `chat_template`: (name, source). A single template has the name "default".
    pub chat_templates: Vec<(String, String)>,
    pub(crate) added: Vec<(u32, Added)>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Added {
    content: String,
    special: bool,
    lstrip: bool,
    rstrip: bool,
    single_word: bool,
    normalized: bool,
}

impl TokenizerConfig {
    /// Reads the file; a directory without one gives the default.
    pub fn load(directory: &Path) -> Result<Self> {
        let file = directory.join("tokenizer_config.json");
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(TextError::checkpoint(&file, error)),
        };
        let config: Value =
            serde_json::from_str(&text).map_err(|error| TextError::checkpoint(&file, error))?;
        let fields = config
            .as_object()
            .ok_or_else(|| TextError::checkpoint(&file, "is not a JSON object"))?;
        let special_tokens = fields
            .iter()
            .filter(|(name, _)| name.ends_with("_token"))
            .filter_map(|(name, value)| Some((name.clone(), token_text(value)?.to_owned())))
            .collect();
        Ok(Self {
            special_tokens,
            chat_templates: templates(&config["chat_template"]),
            added: added(&config["added_tokens_decoder"])
                .map_err(|reason| TextError::checkpoint(&file, reason))?,
        })
    }

    /// The text of a named special token, such as "eos_token".
    pub fn special_token(&self, name: &str) -> Option<&str> {
        let mut tokens = self.special_tokens.iter();
        tokens.find(|(key, _)| key == name).map(|(_, text)| text.as_str())
    }

    /// Adds tokens that only this file names, as transformers does; each must get the id that the file gives it.
    pub(super) fn add_missing_tokens(&self, inner: &mut tokenizers::Tokenizer, file: &Path) -> Result<()> {
        for (id, added) in &self.added {
            if inner.token_to_id(&added.content).is_none() {
                let token = AddedToken::from(added.content.clone(), added.special)
                    .lstrip(added.lstrip)
                    .rstrip(added.rstrip)
                    .single_word(added.single_word)
                    .normalized(added.normalized);
                let result = if added.special {
                    inner.add_special_tokens([token])
                } else {
                    inner.add_tokens([token])
                };
                result.map_err(|error| TextError::checkpoint(file, error))?;
            }
            let got = inner.token_to_id(&added.content);
            if got != Some(*id) {
                return Err(TextError::checkpoint(
                    file,
                    format!(
                        "added_tokens_decoder gives {:?} the id {id}, tokenizer.json gives it {got:?}",
                        added.content
                    ),
                ));
            }
        }
        Ok(())
    }
}

/// A token is a string or an object with `content`.
fn token_text(value: &Value) -> Option<&str> {
    value.as_str().or_else(|| value["content"].as_str())
}

fn templates(value: &Value) -> Vec<(String, String)> {
    match value {
        Value::String(source) => vec![("default".to_owned(), source.clone())],
        Value::Array(list) => list
            .iter()
            .filter_map(|entry| {
                let (name, source) = (entry["name"].as_str()?, entry["template"].as_str()?);
                Some((name.to_owned(), source.to_owned()))
            })
            .collect(),
        _ => Vec::new(),
    }
}

fn added(value: &Value) -> std::result::Result<Vec<(u32, Added)>, String> {
    let mut list = Vec::new();
    for (id, token) in value.as_object().into_iter().flatten() {
        let number = id
            .parse()
            .map_err(|_| format!("added_tokens_decoder: {id:?} is not a token id"))?;
        let content = token["content"]
            .as_str()
            .ok_or_else(|| format!("added_tokens_decoder.{id}: no content"))?;
        let flag = |name: &str, default: bool| token[name].as_bool().unwrap_or(default);
        let special = flag("special", false);
        list.push((
            number,
            Added {
                content: content.to_owned(),
                special,
                lstrip: flag("lstrip", false),
                rstrip: flag("rstrip", false),
                single_word: flag("single_word", false),
                normalized: flag("normalized", !special),
            },
        ));
    }
    list.sort_by_key(|(id, _)| *id);
    Ok(list)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &str) -> Result<TokenizerConfig> {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("tokenizer_config.json"), text).unwrap();
        TokenizerConfig::load(directory.path())
    }

    #[test]
    fn tokens_are_strings_or_objects() {
        let config = load(
            r#"{"bos_token": null, "eos_token": {"content": "</s>"}, "pad_token": "<p>", "chat_template": "x"}"#,
        )
        .unwrap();
        assert_eq!(config.special_token("eos_token"), Some("</s>"));
        assert_eq!(config.special_token("pad_token"), Some("<p>"));
        assert_eq!(config.special_token("bos_token"), None);
        assert_eq!(config.chat_templates, [("default".to_owned(), "x".to_owned())]);
    }

    #[test]
    fn named_templates() {
        let config = load(
            r#"{"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]}"#,
        )
        .unwrap();
        assert_eq!(config.chat_templates.len(), 2);
    }

    #[test]
    fn errors_name_file_and_field() {
        let error = load(r#"{"added_tokens_decoder": {"x": {"content": "a"}}}"#).unwrap_err();
        assert!(
            error
                .to_string()
                .contains("tokenizer_config.json: added_tokens_decoder")
        );
        assert!(load("[]").is_err());
        assert!(load("{").is_err());
        assert_eq!(
            TokenizerConfig::load(Path::new("/nonexistent")).unwrap(),
            TokenizerConfig::default()
        );
    }
}
