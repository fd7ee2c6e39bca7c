//! Which parser a model's output needs: by name, or from its vocabulary and chat template.

use super::{
    CallRules, OutputParser,
    deepseek_v31::DeepseekV31,
    harmony::Harmony,
    hermes::Hermes,
    minimax_m2,
    plain_json::PlainJson,
    qwen3_coder,
    scan::Marker,
    tagged::{Tagged, Think, ToolSyntax},
    xml_calls::{Dialect, XmlCalls},
};
use crate::{
    error::{Result, TextError},
    grammar::Wrapping,
};

/// `--reasoning-parser` and `--tool-call-parser`; `None` chooses by the checkpoint, "none" switches off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ParserNames {
    pub reasoning: Option<String>,
    pub tool_calls: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tools {
    None,
    MinimaxM2,
    Hermes,
    Qwen3Coder,
    DeepseekV31,
    Harmony,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reasoning {
    None,
    /// `<think>` with line breaks around it (MiniMax-M2, Qwen3).
    Lines,
    /// `<think>` and nothing more (DeepSeek).
    Bare,
    Harmony,
}

/// Names of a parser: ours first, then what vLLM and SGLang call it.
const TOOL_NAMES: [(Tools, &[&str]); 7] = [
    (Tools::None, &["none"]),
    (Tools::MinimaxM2, &["minimax_m2", "minimax-m2"]),
    (Tools::Hermes, &["hermes", "qwen", "qwen25"]),
    (Tools::Qwen3Coder, &["qwen3_coder", "qwen3_xml"]),
    (Tools::DeepseekV31, &["deepseek_v31", "deepseekv31"]),
    (Tools::Harmony, &["harmony", "openai", "gpt-oss"]),
    (Tools::Json, &["json", "llama3_json", "llama3"]),
];
const REASONING_NAMES: [(Reasoning, &[&str]); 4] = [
    (Reasoning::None, &["none"]),
    (
        Reasoning::Lines,
        &[
            "minimax_m2",
            "minimax",
            "qwen3",
            "minimax-m2",
            // Thinking stays apart from the text here, which those two names mix.
            "minimax_m2_append_think",
            "minimax-append-think",
        ],
    ),
    (
        Reasoning::Bare,
        &[
            "deepseek_r1",
            "deepseek_v3",
            "deepseek-r1",
            "deepseek-v3",
            "deepseek_v31",
        ],
    ),
    (Reasoning::Harmony, &["harmony", "openai_gptoss", "gpt-oss"]),
];

const THINK: [&str; 2] = ["<think>", "</think>"];

/// The output format of a model.
#[derive(Clone, Debug)]
pub struct Format {
    tools: Tools,
    reasoning: Reasoning,
    /// Every marker that is one token here.
    ids: Vec<(&'static str, u32)>,
}

impl Format {
    /// Chooses the parsers. `id` gives a text's token if the vocabulary has one of exactly this text; `template` is
    /// the chat template's source.
    pub fn choose(
        names: &ParserNames,
        id: impl Fn(&str) -> Option<u32>,
        template: Option<&str>,
    ) -> Result<Self> {
        let detected = detect(&id, template.unwrap_or_default());
        let tools = by_name("tool_call_parser", names.tool_calls.as_deref(), &TOOL_NAMES)?;
        let reasoning = by_name("reasoning_parser", names.reasoning.as_deref(), &REASONING_NAMES)?;
        let format = Self {
            tools: tools.unwrap_or(detected.0),
            reasoning: reasoning.unwrap_or(detected.1),
            ids: Vec::new(),
        };
        let one_is_harmony = (format.tools == Tools::Harmony) != (format.reasoning == Reasoning::Harmony);
        if one_is_harmony && format.tools != Tools::None && format.reasoning != Reasoning::None {
            return Err(TextError::request(
                "tool_call_parser",
                "harmony reads reasoning and tool calls together: choose it for both or neither",
            ));
        }
        let markers = format.marker_texts();
        Ok(Self {
            ids: markers
                .into_iter()
                .filter_map(|text| Some((text, id(text)?)))
                .collect(),
            ..format
        })
    }

    /// The chosen parsers' names: reasoning, tool calls.
    pub fn names(&self) -> (&'static str, &'static str) {
        let tools = TOOL_NAMES.iter().find(|(kind, _)| *kind == self.tools);
        let reasoning = REASONING_NAMES.iter().find(|(kind, _)| *kind == self.reasoning);
        (
            reasoning.map_or("none", |(_, names)| names[0]),
            tools.map_or("none", |(_, names)| names[0]),
        )
    }

    /// A parser for one choice; `None` if the text needs none. Without `rules` calls are left in the text.
    pub fn parser(
        &self,
        rules: Option<CallRules>,
        starts_in_reasoning: bool,
    ) -> Option<Box<dyn OutputParser>> {
        let tools = if rules.is_some() { self.tools } else { Tools::None };
        let rules = rules.unwrap_or(CallRules {
            tools: [].into(),
            max_calls: 0,
            id_seed: 0,
        });
        if self.tools == Tools::Harmony || self.reasoning == Reasoning::Harmony {
            return Some(Box::new(Harmony::new(rules, |text| self.id(text))));
        }
        let id = |text: &str| self.id(text);
        let syntax: Option<Box<dyn ToolSyntax>> = match tools {
            Tools::None | Tools::Harmony => None,
            Tools::MinimaxM2 => Some(Box::new(XmlCalls::new(&minimax_m2::DIALECT, id))),
            Tools::Qwen3Coder => Some(Box::new(XmlCalls::new(&qwen3_coder::DIALECT, id))),
            Tools::Hermes => Some(Box::new(Hermes::new(id))),
            Tools::DeepseekV31 => Some(Box::new(DeepseekV31::new(id))),
            Tools::Json => Some(Box::new(PlainJson::default())),
        };
        let think = self.think();
        if think.is_none() && syntax.is_none() {
            return None;
        }
        Some(Box::new(Tagged::new(think, syntax, rules, starts_in_reasoning)))
    }

    /// Whether an output after this prompt begins within reasoning: the prompt's last turn has opened it and not
    /// closed it. `eos` ends turns.
    pub fn starts_in_reasoning(&self, prompt: &[u32], text: &str, eos: &[u32]) -> bool {
        if matches!(self.reasoning, Reasoning::None | Reasoning::Harmony) {
            return false;
        }
        if let (Some(open), Some(close)) = (self.id(THINK[0]), self.id(THINK[1])) {
            let turn = prompt.iter().rev().take_while(|id| !eos.contains(id));
            let last = turn.copied().find(|&id| id == open || id == close);
            return last == Some(open);
        }
        match (text.rfind(THINK[0]), text.rfind(THINK[1])) {
            (Some(open), close) => {
                close.is_none_or(|close| close < open) && text[open + THINK[0].len()..].trim().is_empty()
            }
            (None, _) => false,
        }
    }

    /// The token that ends the reasoning, if one does: constrained output begins after it.
    pub fn reasoning_end(&self) -> Option<u32> {
        self.think().and_then(|think| think.close.id)
    }

    /// The text that ends the reasoning.
    pub fn reasoning_end_text(&self) -> Option<&'static str> {
        self.think().map(|think| think.close.text)
    }

    /// The tokens that open a call: forbidden to sample, none can be made (`tool_choice` "none").
    pub fn call_openers(&self) -> Vec<u32> {
        let openers: &[&str] = match self.tools {
            Tools::MinimaxM2 => &["<minimax:tool_call>"],
            Tools::Hermes | Tools::Qwen3Coder => &["<tool_call>"],
            Tools::DeepseekV31 => &["<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>"],
            Tools::None | Tools::Harmony | Tools::Json => &[],
        };
        openers.iter().filter_map(|text| self.id(text)).collect()
    }

    /// How calls are written, for grammars that force them.
    pub(crate) fn wrapping(&self) -> Option<Wrapping> {
        let tags = |dialect: &Dialect, quoted| Wrapping::Tags {
            open: dialect.open,
            close: dialect.close,
            call: dialect.call,
            call_end: dialect.call_end,
            parameter: dialect.parameter,
            parameter_end: dialect.parameter_end,
            quoted,
            line_breaks: dialect.line_breaks,
        };
        Some(match self.tools {
            Tools::None => return None,
            Tools::MinimaxM2 => tags(&minimax_m2::DIALECT, true),
            Tools::Qwen3Coder => tags(&qwen3_coder::DIALECT, false),
            Tools::Hermes => Wrapping::Object {
                open: "<tool_call>",
                close: "</tool_call>",
                arguments: "arguments",
            },
            Tools::Json => Wrapping::Bare {
                arguments: "parameters",
            },
            Tools::DeepseekV31 => {
                let [open, close, call, call_end, separator] = super::deepseek_v31::TAGS;
                Wrapping::Separated {
                    open,
                    close,
                    call,
                    separator,
                    call_end,
                }
            }
            Tools::Harmony => Wrapping::Harmony,
        })
    }

    /// A marker's token, if it has one.
    pub(crate) fn marker(&self, text: &str) -> Option<u32> {
        self.id(text)
    }

    fn think(&self) -> Option<Think> {
        let line_breaks = match self.reasoning {
            Reasoning::None | Reasoning::Harmony => return None,
            Reasoning::Lines => true,
            Reasoning::Bare => false,
        };
        let [open, close] = THINK.map(|text| Marker {
            text,
            id: self.id(text),
        });
        Some(Think {
            open,
            close,
            line_breaks,
        })
    }

    fn id(&self, text: &str) -> Option<u32> {
        self.ids
            .iter()
            .find(|(marker, _)| *marker == text)
            .map(|(_, id)| *id)
    }

    fn marker_texts(&self) -> Vec<&'static str> {
        let mut texts = THINK.to_vec();
        texts.extend(match self.tools {
            Tools::None | Tools::Json => &[][..],
            Tools::MinimaxM2 => &["<minimax:tool_call>", "</minimax:tool_call>"],
            Tools::Hermes | Tools::Qwen3Coder => &["<tool_call>", "</tool_call>"],
            Tools::DeepseekV31 => &super::deepseek_v31::TAGS,
            Tools::Harmony => &super::harmony::TAGS,
        });
        if self.reasoning == Reasoning::Harmony {
            texts.extend(super::harmony::TAGS);
        }
        texts
    }
}

fn by_name<Kind: Copy>(field: &str, name: Option<&str>, names: &[(Kind, &[&str])]) -> Result<Option<Kind>> {
    let Some(name) = name.filter(|name| !name.is_empty() && *name != "auto") else {
        return Ok(None);
    };
    let found = names.iter().find(|(_, names)| names.contains(&name));
    let known = || {
        names
            .iter()
            .map(|(_, names)| names[0])
            .collect::<Vec<_>>()
            .join(", ")
    };
    found
        .map(|(kind, _)| Some(*kind))
        .ok_or_else(|| TextError::request(field, format!("{name:?} is unknown; known are auto, {}", known())))
}

/// What the vocabulary's tokens, or else the template, show.
fn detect(id: &impl Fn(&str) -> Option<u32>, template: &str) -> (Tools, Reasoning) {
    let shows = |text: &str| id(text).is_some() || template.contains(text);
    let thinks = shows(THINK[1]);
    let lines = if thinks { Reasoning::Lines } else { Reasoning::None };
    if shows("<|channel|>") && shows("<|message|>") {
        (Tools::Harmony, Reasoning::Harmony)
    } else if shows("<minimax:tool_call>") {
        (Tools::MinimaxM2, lines)
    } else if shows("<｜tool▁calls▁begin｜>") {
        (
            Tools::DeepseekV31,
            if thinks { Reasoning::Bare } else { Reasoning::None },
        )
    } else if template.contains("<function=") {
        (Tools::Qwen3Coder, lines)
    } else if template.contains("<tool_call>") {
        (Tools::Hermes, lines)
    } else if shows("<|python_tag|>") {
        (Tools::Json, lines)
    } else {
        (Tools::None, lines)
    }
}
