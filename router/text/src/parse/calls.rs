//! Tool calls on their way out: which are passed on, their ids, and their arguments' JSON text.

use std::{collections::HashSet, sync::Arc};

use super::{End, Pieces, ToolCallDelta, schema::Types};
use crate::{chat::ToolSpec, json};

/// What calls may be made, from the request.
#[derive(Clone, Debug)]
pub struct CallRules {
    /// Calls to other functions are dropped.
    pub tools: Arc<[ToolSpec]>,
    /// Further calls are dropped; `u32::MAX` unless `parallel_tool_calls` is false.
    pub max_calls: u32,
    /// Call ids are drawn from this: the same for the same seed, so that a request run anew gives the same ids.
    pub id_seed: u64,
}

/// The calls of one choice.
pub struct Calls {
    rules: CallRules,
    made: u32,
    current: Option<Call>,
}

/// The call being written.
struct Call {
    tool: usize,
    /// Parameters written so far.
    names: HashSet<String>,
    value: Value,
    /// The arguments' opening brace is out.
    begun: bool,
}

/// The parameter being written.
enum Value {
    None,
    /// A string, given out as it comes.
    String,
    /// A string or null, until it is clear which.
    MaybeNull {
        name: String,
        held: String,
    },
    /// Any other type: given out when it is whole.
    Whole {
        name: String,
        types: Types,
        held: String,
    },
}

impl Calls {
    pub fn new(rules: CallRules) -> Self {
        Self {
            rules,
            made: 0,
            current: None,
        }
    }

    /// Whether a function of this name is offered.
    pub fn knows(&self, name: &str) -> bool {
        self.rules.tools.iter().any(|tool| tool.name == name)
    }

    /// Begins a call; one to a function that is not offered is dropped with all that belongs to it.
    pub fn begin(&mut self, name: &str, out: &mut Pieces) {
        let tool = self.rules.tools.iter().position(|tool| tool.name == name);
        let allowed = self.made < self.rules.max_calls;
        self.current = tool.filter(|_| allowed).map(|tool| Call {
            tool,
            names: HashSet::new(),
            value: Value::None,
            begun: false,
        });
        if self.current.is_some() {
            out.tool_calls.push(ToolCallDelta {
                index: self.made,
                id: Some(call_id(self.rules.id_seed, self.made)),
                name: Some(name.to_owned()),
                arguments: String::new(),
            });
            self.made += 1;
        }
    }

    /// Passes on a piece of the arguments' JSON text, for formats that write JSON.
    pub fn json(&mut self, text: &str, out: &mut Pieces) {
        if self.current.is_some() && !text.is_empty() {
            arguments(self.made, out).push_str(text);
        }
    }

    /// Ends a call whose arguments came through `json`.
    pub fn end_json(&mut self) {
        self.current = None;
    }

    /// Begins a parameter whose value comes as bare text. One that was written before is dropped.
    pub fn parameter(&mut self, name: &str, out: &mut Pieces) {
        let Some(call) = &mut self.current else { return };
        call.value = Value::None;
        if !call.names.insert(name.to_owned()) {
            return;
        }
        let types = Types::of_parameter(self.rules.tools[call.tool].parameters(), name);
        let (name, held) = (name.to_owned(), String::new());
        call.value = if types.is_string() {
            call.open(&name, arguments(self.made, out)).push('"');
            Value::String
        } else if types.is_nullable_string() {
            Value::MaybeNull { name, held }
        } else {
            Value::Whole { name, types, held }
        };
    }

    /// Takes a piece of the parameter's value.
    pub fn value(&mut self, text: &str, out: &mut Pieces) {
        let Some(call) = &mut self.current else { return };
        match &mut call.value {
            Value::None => {}
            Value::String => json::write_escaped(text, false, arguments(self.made, out)),
            Value::Whole { held, .. } => held.push_str(text),
            Value::MaybeNull { name, held } => {
                held.push_str(text);
                if !may_be_null(held) {
                    let (name, held) = (std::mem::take(name), std::mem::take(held));
                    call.value = Value::String;
                    let out = call.open(&name, arguments(self.made, out));
                    out.push('"');
                    json::write_escaped(&held, false, out);
                }
            }
        }
    }

    /// The parameter's value is whole.
    pub fn end_value(&mut self, out: &mut Pieces) {
        let Some(call) = &mut self.current else { return };
        match std::mem::replace(&mut call.value, Value::None) {
            Value::None => {}
            Value::String => arguments(self.made, out).push('"'),
            Value::MaybeNull { name, held } => {
                let json = Types::NULLABLE_STRING.coerce(&held);
                call.open(&name, arguments(self.made, out)).push_str(&json);
            }
            Value::Whole { name, types, held } => {
                let json = types.coerce(&held);
                call.open(&name, arguments(self.made, out)).push_str(&json);
            }
        }
    }

    /// The call is whole; a parameter still open ends here.
    pub fn end(&mut self, out: &mut Pieces) {
        self.end_value(out);
        if let Some(call) = self.current.take() {
            let text = arguments(self.made, out);
            text.push_str(if call.begun { "}" } else { "{}" });
        }
    }

    /// The output ended within the call. An output that stopped by itself leaves the part of a string that is out,
    /// and no part of any other value; one that was cut leaves the arguments open.
    pub fn finish(&mut self, end: End, out: &mut Pieces) {
        if end == End::Cut {
            return;
        }
        if let Some(call) = &mut self.current
            && !matches!(call.value, Value::String)
        {
            call.value = Value::None;
        }
        self.end(out);
    }
}

impl Call {
    /// Writes the beginning of a parameter, up to its value.
    fn open<'a>(&mut self, name: &str, out: &'a mut String) -> &'a mut String {
        out.push_str(if self.begun { ", " } else { "{" });
        self.begun = true;
        json::write_string(name, false, out);
        out.push_str(": ");
        out
    }
}

/// The text of the last call's arguments in this delta.
fn arguments(made: u32, out: &mut Pieces) -> &mut String {
    let index = made - 1;
    if out.tool_calls.last().is_none_or(|call| call.index != index) {
        out.tool_calls.push(ToolCallDelta {
            index,
            ..ToolCallDelta::default()
        });
    }
    let last = out.tool_calls.len() - 1;
    &mut out.tool_calls[last].arguments
}

/// Whether text may still become the word null among blanks.
fn may_be_null(text: &str) -> bool {
    let text = text.trim_start();
    match text.strip_prefix("null") {
        Some(rest) => rest.trim().is_empty(),
        None => "null".starts_with(text),
    }
}

/// "call_" and 24 hexadecimal digits of SplitMix64.
fn call_id(seed: u64, index: u32) -> String {
    let mix = |n: u64| {
        let z = seed.wrapping_add((u64::from(index) * 2 + n + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    };
    format!("call_{:016x}{:08x}", mix(0), mix(1) >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_differ_and_repeat() {
        assert_eq!(call_id(7, 0), call_id(7, 0));
        assert_ne!(call_id(7, 0), call_id(7, 1));
        assert_ne!(call_id(7, 0), call_id(8, 0));
        assert_eq!(call_id(u64::MAX, u32::MAX).len(), 29);
    }

    #[test]
    fn null_is_told_from_strings() {
        for text in ["", " ", "\nnu", "null", " null\n "] {
            assert!(may_be_null(text), "{text:?}");
        }
        for text in ["nulls", "none", "null x", "Null"] {
            assert!(!may_be_null(text), "{text:?}");
        }
    }
}
