//! Where the template's source comes from.

use std::path::{Path, PathBuf};

use crate::{
    error::{Result, TextError},
    tokenizer::TokenizerConfig,
};

/// Template sources by name.
pub type Sources = Vec<(String, String)>;

/// The file that holds the chat template and its sources: chat_template.jinja first, then chat_template.json, then
/// tokenizer_config.json, as transformers looks for them.
pub fn load_source(directory: &Path, config: &TokenizerConfig) -> Result<Option<(PathBuf, Sources)>> {
    let named = |source: String| vec![("default".to_owned(), source)];
    let file = directory.join("chat_template.jinja");
    if let Some(source) = read(&file)? {
        return Ok(Some((file, named(source))));
    }
    let file = directory.join("chat_template.json");
    if let Some(text) = read(&file)? {
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|error| TextError::checkpoint(&file, error))?;
        let source = value["chat_template"]
            .as_str()
            .ok_or_else(|| TextError::checkpoint(&file, "chat_template: must be a string"))?;
        return Ok(Some((file.clone(), named(source.to_owned()))));
    }
    if config.chat_templates.is_empty() {
        return Ok(None);
    }
    Ok(Some((
        directory.join("tokenizer_config.json"),
        config.chat_templates.clone(),
    )))
}

fn read(file: &Path) -> Result<Option<String>> {
    match std::fs::read_to_string(file) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TextError::checkpoint(file, error)),
    }
}

/// transformers' `{% generation %}` blocks only mark assistant text for training: they become blocks that are
/// always rendered.
pub fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start..start + length];
        out.push_str(&rest[..start]);
        match tag.trim_matches(['{', '%', '-', '+']).trim() {
            "generation" => out.push_str(&tag.replace("generation", "if true")),
            "endgeneration" => out.push_str(&tag.replace("endgeneration", "endif")),
            _ => out.push_str(tag),
        }
        rest = &rest[start + length..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_plain_blocks() {
        assert_eq!(
            without_generation_tags("a{% generation %}b{%- endgeneration -%}c{% if x %}{% endif %}{%"),
            "a{% if true %}b{%- endif -%}c{% if x %}{% endif %}{%"
        );
    }

    #[test]
    fn jinja_file_goes_before_tokenizer_config() {
        let directory = tempfile::tempdir().unwrap();
        let config = TokenizerConfig {
            chat_templates: vec![("default".to_owned(), "config".to_owned())],
            ..TokenizerConfig::default()
        };
        let source = |directory: &Path| load_source(directory, &config).unwrap().unwrap().1;
        assert_eq!(source(directory.path())[0].1, "config");
        std::fs::write(
            directory.path().join("chat_template.json"),
            r#"{"chat_template":"json"}"#,
        )
        .unwrap();
        assert_eq!(source(directory.path())[0].1, "json");
        std::fs::write(directory.path().join("chat_template.jinja"), "jinja").unwrap();
        assert_eq!(source(directory.path())[0].1, "jinja");
    }
}
