//! What a response repeats of its request.

use serde::{Serialize, Serializer};
use serde_json::value::RawValue;

use super::request::{FormatIn, ReasoningIn, Request, ToolChoiceIn, ToolIn};

#[derive(Serialize)]
pub(super) struct Echo {
    instructions: Option<String>,
    max_output_tokens: Option<i64>,
    metadata: Option<Box<RawValue>>,
    parallel_tool_calls: bool,
    previous_response_id: Option<String>,
    reasoning: Reasoning,
    store: bool,
    temperature: Option<f64>,
    text: Text,
    tool_choice: Choice,
    tools: Vec<ToolIn>,
    top_p: Option<f64>,
    user: Option<String>,
}

#[derive(Serialize)]
struct Reasoning {
    effort: Option<String>,
    summary: Option<String>,
}

#[derive(Serialize)]
struct Text {
    format: Format,
}

#[derive(Serialize)]
#[serde(untagged)]
enum Format {
    Given(FormatIn),
    Text {
        #[serde(rename = "type")]
        kind: &'static str,
    },
}

struct Choice(Option<ToolChoiceIn>);

impl Serialize for Choice {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match &self.0 {
            None => serializer.serialize_str("auto"),
            Some(ToolChoiceIn::Word(word)) => serializer.serialize_str(word),
            Some(ToolChoiceIn::Named(named)) => named.serialize(serializer),
        }
    }
}

impl Echo {
    pub(super) fn of(request: Request) -> Self {
        let ReasoningIn { effort, summary } = request.reasoning.unwrap_or_default();
        let format = request.text.and_then(|text| text.format);
        Self {
            instructions: request.instructions,
            max_output_tokens: request.max_output_tokens,
            metadata: request.metadata,
            parallel_tool_calls: request.parallel_tool_calls.unwrap_or(true),
            previous_response_id: request.previous_response_id,
            reasoning: Reasoning { effort, summary },
            store: request.store.unwrap_or(true),
            temperature: request.temperature,
            text: Text {
                format: format.map_or(Format::Text { kind: "text" }, Format::Given),
            },
            tool_choice: Choice(request.tool_choice),
            tools: request.tools.unwrap_or_default(),
            top_p: request.top_p,
            user: request.user,
        }
    }
}
