//! One choice's output, from token ids to what a client reads.
//!
//! Tokens pass four stages: decoding to whole characters, the search for stop strings (over the text as decoded,
//! reasoning and calls included), the format's parser, and typed pieces. Text that may begin a stop string waits
//! together with the tokens it came from, so that parsers always see token and text side by side.

use std::{collections::VecDeque, sync::Arc};

use crate::{
    detokenize::Detokenizer,
    error::Result,
    parse::{End, OutputParser, Pieces, ToolCallDelta},
    stop::{Outcome, StopMatcher},
    tokenizer::Tokenizer,
};

/// What a request wants of its output's text.
#[derive(Clone, Debug)]
pub struct OutputOptions {
    pub stop: Vec<String>,
    pub include_stop_str_in_output: bool,
    pub skip_special_tokens: bool,
    /// Tokens that end the output (eos unless ignored, stop_token_ids). Their text is not part of it, unless
    /// `include_stop_str_in_output`.
    pub stop_token_ids: Vec<u32>,
    /// Stop strings are not looked for in so many first tokens.
    pub min_tokens: u32,
}

impl Default for OutputOptions {
    fn default() -> Self {
        Self {
            stop: Vec::new(),
            include_stop_str_in_output: false,
            skip_special_tokens: true,
            stop_token_ids: Vec::new(),
            min_tokens: 0,
        }
    }
}

/// What some tokens came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OutputDelta {
    /// Content; for output that is not parsed, all text.
    pub text: String,
    pub reasoning: String,
    pub tool_calls: Vec<ToolCallDelta>,
    /// For each token pushed: where its text begins in the decoded text, in Unicode scalar values.
    pub text_offsets: Vec<u32>,
    /// The stop string that ended the output. Nothing comes after it.
    pub stopped_by: Option<String>,
}

/// The output of one choice.
pub struct OutputStream {
    options: OutputOptions,
    detokenizer: Detokenizer,
    stop: StopMatcher,
    parser: Option<Box<dyn OutputParser>>,
    /// Tokens whose text is held back, oldest first, and how much text of each is left.
    waiting: VecDeque<Waiting>,
    tokens: u32,
    reasoning_tokens: u32,
    tool_calls: u32,
    ended: bool,
}

struct Waiting {
    id: Option<u32>,
    text: String,
}

impl OutputStream {
    /// `parser`: from `Text::output_parser`, or `None` for plain text.
    pub fn new(
        tokenizer: Arc<Tokenizer>,
        options: OutputOptions,
        parser: Option<Box<dyn OutputParser>>,
    ) -> Result<Self> {
        Ok(Self {
            detokenizer: Detokenizer::new(tokenizer, options.skip_special_tokens),
            stop: StopMatcher::new(&options.stop, options.include_stop_str_in_output)?,
            options,
            parser,
            waiting: VecDeque::new(),
            tokens: 0,
            reasoning_tokens: 0,
            tool_calls: 0,
            ended: false,
        })
    }

    /// Takes the next tokens. After a stop string was found further tokens give nothing.
    pub fn push(&mut self, ids: &[u32]) -> OutputDelta {
        let mut delta = OutputDelta::default();
        let mut pieces = Pieces::default();
        for &id in ids {
            delta.text_offsets.push(to_u32(self.detokenizer.chars()));
            if !self.ended {
                self.token(id, &mut pieces, &mut delta.stopped_by);
            }
        }
        self.fill(pieces, delta)
    }

    /// The output has ended (for whatever reason); gives everything held back. Call once.
    pub fn finish(&mut self, end: End) -> OutputDelta {
        let mut delta = OutputDelta::default();
        let mut pieces = Pieces::default();
        if !self.ended {
            let mut text = String::new();
            self.detokenizer.finish(&mut text);
            if !text.is_empty() {
                self.text(None, text, &mut pieces, &mut delta.stopped_by);
            }
            if !self.ended {
                let held = self.stop.finish();
                self.release(held, &mut pieces);
            }
        }
        if let Some(parser) = &mut self.parser {
            // A stop string ends the output as a stop token does.
            let end = if self.ended { End::Stop } else { end };
            parser.finish(end, &mut pieces);
        }
        self.ended = true;
        self.fill(pieces, delta)
    }

    /// Tool calls given out so far: with any, an output that stopped by itself finished with "tool_calls".
    pub fn tool_calls(&self) -> u32 {
        self.tool_calls
    }

    /// Tokens that were reasoning, markers included.
    pub fn reasoning_tokens(&self) -> u32 {
        self.reasoning_tokens
    }

    fn fill(&mut self, pieces: Pieces, mut delta: OutputDelta) -> OutputDelta {
        let started = pieces
            .tool_calls
            .iter()
            .filter(|call| call.name.is_some())
            .count();
        self.tool_calls += to_u32(started);
        delta.text = pieces.text;
        delta.reasoning = pieces.reasoning;
        delta.tool_calls = pieces.tool_calls;
        delta
    }

    fn token(&mut self, id: u32, pieces: &mut Pieces, stopped_by: &mut Option<String>) {
        self.tokens = self.tokens.saturating_add(1);
        if self.parser.as_ref().is_some_and(|parser| parser.in_reasoning()) {
            self.reasoning_tokens += 1;
        }
        let ends = self.options.stop_token_ids.contains(&id);
        if ends && !self.options.include_stop_str_in_output {
            return;
        }
        let mut text = String::new();
        self.detokenizer.push(id, &mut text);
        self.text(Some(id), text, pieces, stopped_by);
    }

    fn text(&mut self, id: Option<u32>, text: String, pieces: &mut Pieces, stopped_by: &mut Option<String>) {
        let outcome = if self.tokens > self.options.min_tokens {
            self.stop.push(&text)
        } else {
            Outcome::Release(text.len())
        };
        self.waiting.push_back(Waiting { id, text });
        match outcome {
            Outcome::Release(bytes) => self.release(bytes, pieces),
            Outcome::Stopped { release, index } => {
                self.release(release, pieces);
                self.waiting.clear();
                self.ended = true;
                *stopped_by = Some(self.options.stop[index].clone());
            }
        }
    }

    /// Lets so many bytes of the waiting text go on to the parser. A token is only seen whole, unless the end
    /// cuts it: then its text goes on without the id.
    fn release(&mut self, mut bytes: usize, pieces: &mut Pieces) {
        while let Some(first) = self.waiting.front_mut() {
            if first.text.len() > bytes {
                if bytes > 0 {
                    let rest = first.text.split_off(bytes);
                    let head = std::mem::replace(&mut first.text, rest);
                    first.id = None;
                    self.parse(None, &head, pieces);
                }
                return;
            }
            let Some(Waiting { id, text }) = self.waiting.pop_front() else {
                return;
            };
            bytes -= text.len();
            self.parse(id, &text, pieces);
        }
    }

    fn parse(&mut self, id: Option<u32>, text: &str, pieces: &mut Pieces) {
        match &mut self.parser {
            None => pieces.text.push_str(text),
            Some(parser) => parser.push(id, text, pieces),
        }
    }
}

fn to_u32(count: usize) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}
