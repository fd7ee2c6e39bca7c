//! What the user sees.
//!
//! Answers go to standard output. In a terminal thinking and calls do, too, dimmed; in a pipe they and all notes go to
//! standard error, so that the answers can be used by another program.

use std::io::{self, Write};

use super::answer::Piece;

const DIM: &str = "\x1b[2m";
const RED: &str = "\x1b[31m";
const PLAIN: &str = "\x1b[0m";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Nothing,
    Thinking,
    Text,
    Call(usize),
}

pub struct Screen {
    interactive: bool,
    part: Part,
    /// What was written last ended a line.
    at_line_start: bool,
}

impl Screen {
    pub fn new(interactive: bool) -> Screen {
        Screen {
            interactive,
            part: Part::Nothing,
            at_line_start: true,
        }
    }

    /// A word of the program.
    pub fn note(&self, text: &str) {
        if self.interactive {
            println!("{DIM}{text}{PLAIN}");
        } else {
            eprintln!("{text}");
        }
    }

    /// What went wrong.
    pub fn problem(&self, text: &str) {
        if self.interactive {
            println!("{RED}{text}{PLAIN}");
        } else {
            eprintln!("{text}");
        }
    }

    pub fn piece(&mut self, piece: &Piece, shows_thinking: bool) {
        match piece {
            Piece::Thinking(text) if shows_thinking => {
                let text = self.opened(Part::Thinking, text);
                self.aside(&text);
            }
            Piece::Text(text) => {
                let text = self.opened(Part::Text, text);
                self.say(&text);
            }
            Piece::Call(call) => {
                self.begin(Part::Call(call.index));
                let arrow = if call.name.is_empty() { "" } else { "→ " };
                let space = if call.name.is_empty() { "" } else { " " };
                self.aside(&format!("{arrow}{}{space}{}", call.name, call.arguments));
            }
            Piece::Thinking(_) | Piece::Ended(_) | Piece::Usage(_) => {}
        }
    }

    /// A line break, if one is due.
    pub fn end_of_answer(&mut self) {
        self.begin(Part::Nothing);
    }

    /// Begins a part; a part does not begin with the line breaks that separate it from the one before.
    fn opened(&mut self, part: Part, text: &str) -> String {
        if self.part == part {
            return text.to_owned();
        }
        let text = text.trim_start_matches('\n');
        if !text.is_empty() {
            self.begin(part);
        }
        text.to_owned()
    }

    fn begin(&mut self, part: Part) {
        if self.part == part {
            return;
        }
        if !self.at_line_start {
            match self.part {
                Part::Text => self.say("\n"),
                _ => self.aside("\n"),
            }
        }
        self.part = part;
    }

    /// The answer itself.
    fn say(&mut self, text: &str) {
        let mut out = io::stdout().lock();
        // Nobody reads: then the next line of input ends the program, or the signal for a closed pipe has.
        let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        self.wrote(text);
    }

    /// Thinking and calls.
    fn aside(&mut self, text: &str) {
        if self.interactive {
            let mut out = io::stdout().lock();
            let _ = write!(out, "{DIM}{text}{PLAIN}").and_then(|()| out.flush());
        } else {
            eprint!("{text}");
        }
        self.wrote(text);
    }

    fn wrote(&mut self, text: &str) {
        if !text.is_empty() {
            self.at_line_start = text.ends_with('\n');
        }
    }
}
