//! One answer of the model, as its pieces come.

use std::time::{Duration, Instant};

/// What a stream brings, whichever API carries it.
#[derive(Clone, Debug, PartialEq)]
pub enum Piece {
    Thinking(String),
    Text(String),
    Call(CallPiece),
    Ended(Ended),
    Usage(Usage),
}

/// Of the call with this index; id and name come once.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct CallPiece {
    pub index: usize,
    pub id: String,
    pub name: String,
    pub arguments: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    Stop,
    ToolCalls,
    Length,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    pub prompt: u64,
    pub cached: u64,
    pub generated: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Call {
    pub id: String,
    pub name: String,
    /// JSON text.
    pub arguments: String,
}

/// Everything so far.
#[derive(Clone, Debug)]
pub struct Answer {
    pub thinking: String,
    pub text: String,
    pub calls: Vec<Call>,
    pub ended: Ended,
    usage: Usage,
    started: Instant,
    first: Option<Duration>,
    last: Duration,
}

impl Answer {
    pub fn new() -> Answer {
        Answer {
            thinking: String::new(),
            text: String::new(),
            calls: Vec::new(),
            ended: Ended::Stop,
            usage: Usage::default(),
            started: Instant::now(),
            first: None,
            last: Duration::ZERO,
        }
    }

    pub fn add(&mut self, piece: Piece) {
        if !matches!(piece, Piece::Usage(_)) {
            self.last = self.started.elapsed();
            self.first.get_or_insert(self.last);
        }
        match piece {
            Piece::Thinking(text) => self.thinking += &text,
            Piece::Text(text) => self.text += &text,
            Piece::Ended(ended) => self.ended = ended,
            Piece::Usage(usage) => self.usage = usage,
            Piece::Call(piece) => {
                // Calls come in order; a server that leaves one out gets an empty one for it.
                if self.calls.len() == piece.index {
                    self.calls.push(Call::default());
                }
                if let Some(call) = self.calls.get_mut(piece.index) {
                    call.id += &piece.id;
                    call.name += &piece.name;
                    call.arguments += &piece.arguments;
                }
            }
        }
    }

    /// The calls that can be carried out: none of an answer that was cut.
    pub fn whole_calls(&self) -> Vec<Call> {
        match self.ended {
            Ended::Length => Vec::new(),
            Ended::Stop | Ended::ToolCalls => self.calls.clone(),
        }
    }

    /// Tokens and times, in one line.
    pub fn figures(&self) -> String {
        let Usage {
            prompt,
            cached,
            generated,
        } = self.usage;
        let first = self.first.unwrap_or_default();
        let seconds = self.last.saturating_sub(first).as_secs_f64();
        let rate = match generated.saturating_sub(1) {
            0 => String::new(),
            _ if seconds == 0.0 => String::new(),
            later => format!(", then {:.0} tok/s", later as f64 / seconds),
        };
        format!(
            "{prompt} prompt tokens ({cached} cached), {generated} generated; first after {:.0} ms{rate}",
            first.as_secs_f64() * 1e3
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_of_two_calls_add_up() {
        let mut answer = Answer::new();
        let piece = |index, id: &str, name: &str, arguments: &str| {
            Piece::Call(CallPiece {
                index,
                id: id.into(),
                name: name.into(),
                arguments: arguments.into(),
            })
        };
        for piece in [
            Piece::Thinking("a".into()),
            piece(0, "x", "f", ""),
            piece(0, "", "", "{\"s\": "),
            piece(0, "", "", "1}"),
            piece(1, "y", "g", "{}"),
            piece(7, "z", "lost", "{}"),
            Piece::Ended(Ended::ToolCalls),
        ] {
            answer.add(piece);
        }
        let calls = answer.whole_calls();
        assert_eq!(calls.len(), 2);
        assert_eq!(
            (calls[0].name.as_str(), calls[0].arguments.as_str()),
            ("f", "{\"s\": 1}")
        );
        answer.ended = Ended::Length;
        assert!(answer.whole_calls().is_empty());
    }
}
