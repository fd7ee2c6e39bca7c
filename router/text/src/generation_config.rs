//! generation_config.json: the sampling defaults and stop tokens that the checkpoint's authors recommend.
//!
//! As in vLLM, a request that leaves a parameter out gets the value from here, and the neutral one if it is not
//! here either. `do_sample: false` is not read (vLLM does not): temperature 0 is how a request asks for greedy.

use std::path::Path;

use serde_json::Value;

use crate::error::{Result, TextError};

/// What the file says; `None` where it says nothing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationConfig {
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    /// 0 is all tokens.
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    /// Upper bound of what a request may generate by default.
    pub max_new_tokens: Option<u32>,
    /// Every token that ends a sequence.
    pub eos_token_ids: Vec<u32>,
}

impl GenerationConfig {
    /// Reads the file; a directory without one gives the default.
    pub fn load(directory: &Path) -> Result<Self> {
        let file = directory.join("generation_config.json");
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(TextError::checkpoint(&file, error)),
        };
        Self::parse(&text).map_err(|reason| TextError::checkpoint(&file, reason))
    }

    fn parse(text: &str) -> std::result::Result<Self, String> {
        let config: Value = serde_json::from_str(text).map_err(|error| error.to_string())?;
        if !config.is_object() {
            return Err("is not a JSON object".to_owned());
        }
        let float = |name: &str, least: f64, most: f64| match &config[name] {
            Value::Null => Ok(None),
            value => match value.as_f64() {
                Some(number) if (least..=most).contains(&number) => Ok(Some(number as f32)),
                _ => Err(format!("{name}: {value} is not a number from {least} to {most}")),
            },
        };
        let count = |name: &str| match &config[name] {
            Value::Null => Ok(None),
            value => match value.as_i64().map(u32::try_from) {
                Some(Ok(number)) => Ok(Some(number)),
                // Some checkpoints write -1 for "all".
                Some(Err(_)) if value.as_i64() == Some(-1) => Ok(Some(0)),
                _ => Err(format!("{name}: {value} is not a token count")),
            },
        };
        const MOST: f64 = 1e6;
        Ok(Self {
            temperature: float("temperature", 0.0, MOST)?,
            top_p: float("top_p", 0.0, 1.0)?.filter(|&p| p > 0.0),
            top_k: count("top_k")?,
            min_p: float("min_p", 0.0, 1.0)?,
            repetition_penalty: float("repetition_penalty", 0.0, MOST)?.filter(|&p| p > 0.0),
            max_new_tokens: count("max_new_tokens")?.filter(|&n| n > 0),
            eos_token_ids: eos_ids(&config["eos_token_id"])?,
        })
    }
}

fn eos_ids(value: &Value) -> std::result::Result<Vec<u32>, String> {
    let id = |value: &Value| {
        let id = value.as_u64().and_then(|id| u32::try_from(id).ok());
        id.ok_or_else(|| format!("eos_token_id: {value} is not a token id"))
    };
    match value {
        Value::Null => Ok(Vec::new()),
        Value::Array(ids) => ids.iter().map(id).collect(),
        value => Ok(vec![id(value)?]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::demo;

    #[test]
    fn demo_model() {
        let config = GenerationConfig::load(&demo()).unwrap();
        assert_eq!(config.temperature, Some(0.3));
        assert_eq!(config.top_p, Some(0.95));
        assert_eq!(config.top_k, Some(40));
        assert_eq!(config.min_p, None);
        assert_eq!(config.eos_token_ids, [3071]);
    }

    #[test]
    fn lists_and_all_tokens() {
        let config = GenerationConfig::parse(r#"{"eos_token_id": [1, 2], "top_k": -1}"#).unwrap();
        assert_eq!((config.eos_token_ids, config.top_k), (vec![1, 2], Some(0)));
    }

    #[test]
    fn errors_name_field_and_value() {
        for (text, field) in [
            (r#"{"temperature": -1}"#, "temperature: -1"),
            (r#"{"top_p": 2}"#, "top_p: 2"),
            (r#"{"top_k": 1.5}"#, "top_k: 1.5"),
            (r#"{"eos_token_id": "x"}"#, "eos_token_id"),
            (r#"{"eos_token_id": [-1]}"#, "eos_token_id: -1"),
            ("[]", "not a JSON object"),
            ("{", "EOF"),
        ] {
            assert!(
                GenerationConfig::parse(text).unwrap_err().contains(field),
                "{text}"
            );
        }
    }
}
