//! What was said, and the tools that are offered.

use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::answer::Answer;

#[derive(Clone, Debug)]
pub enum Message {
    User(String),
    Assistant(Answer),
    Tool { call_id: String, result: String },
}

#[derive(Clone, Debug, Default)]
pub struct Conversation {
    system: Option<String>,
    tools: Tools,
    messages: Vec<Message>,
}

impl Conversation {
    pub fn new(system: Option<String>, tools: Option<Tools>) -> Conversation {
        Conversation {
            system,
            tools: tools.unwrap_or_default(),
            messages: Vec::new(),
        }
    }

    pub fn system(&self) -> Option<&str> {
        self.system.as_deref()
    }

    pub fn set_system(&mut self, system: Option<String>) {
        self.system = system;
    }

    pub fn tools(&self) -> &Tools {
        &self.tools
    }

    pub fn set_tools(&mut self, tools: Tools) {
        self.tools = tools;
    }

    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    pub fn len(&self) -> usize {
        self.messages.len()
    }

    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// Forgets what came after so many messages.
    pub fn truncate(&mut self, len: usize) {
        self.messages.truncate(len);
    }

    pub fn clear(&mut self) {
        self.messages.clear();
    }
}

/// Function tools, as in a request's `tools`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools(Vec<Value>);

impl Tools {
    /// Reads a JSON list of tools.
    pub fn read(file: &Path) -> Result<Tools> {
        let text = std::fs::read_to_string(file).with_context(|| format!("tools {}", file.display()))?;
        Tools::parse(&text).with_context(|| format!("tools {}", file.display()))
    }

    fn parse(text: &str) -> Result<Tools> {
        let Value::Array(tools) = serde_json::from_str(text)? else {
            bail!("give a JSON list of tools, as in a request's `tools`");
        };
        for (at, tool) in tools.iter().enumerate() {
            if tool["function"]["name"].as_str().is_none_or(str::is_empty) {
                bail!("[{at}].function.name is missing");
            }
        }
        Ok(Tools(tools))
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn values(&self) -> &[Value] {
        &self.0
    }

    /// One line for each: its name, parameters and description.
    pub fn describe(&self) -> String {
        if self.0.is_empty() {
            return "no tools".to_owned();
        }
        let line = |tool: &Value| {
            let function = &tool["function"];
            let parameters = function["parameters"]["properties"].as_object();
            let names: Vec<&str> = parameters
                .into_iter()
                .flatten()
                .map(|(name, _)| name.as_str())
                .collect();
            format!(
                "{}({}): {}",
                function["name"].as_str().unwrap_or_default(),
                names.join(", "),
                function["description"].as_str().unwrap_or("no description")
            )
        };
        self.0.iter().map(line).collect::<Vec<_>>().join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::Tools;

    #[test]
    fn tools_are_checked_and_described() {
        let tools = r#"[{"type": "function", "function": {"name": "f", "description": "Does f.",
            "parameters": {"properties": {"a": {}, "b": {}}}}}, {"function": {"name": "g"}}]"#;
        let tools = Tools::parse(tools).expect("tools");
        assert_eq!(tools.describe(), "f(a, b): Does f.\ng(): no description");
        for (bad, problem) in [("{}", "a JSON list"), ("[{}]", "[0].function.name"), ("[", "EOF")] {
            let error = format!("{:#}", Tools::parse(bad).expect_err("refused"));
            assert!(error.contains(problem), "{error}");
        }
    }
}
