//! The driver of formats in which reasoning and calls are blocks within text, set off by markers.
//!
//! ```text
//! Reasoning --close--> Content --opener--> Calls --closed--> Content
//!     \---------------opener-----------------^
//! ```
//! A call's opener ends the reasoning even if its close is missing. A close in content is dropped, an open one in
//! content begins reasoning. Line breaks that templates put around blocks are taken off, so that rendering the
//! pieces again gives the tokens that were generated.

use super::{
    CallRules, End, OutputParser, Pieces,
    calls::Calls,
    scan::{Event, Marker, Scanner},
};

/// How a format marks reasoning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Think {
    pub open: Marker,
    pub close: Marker,
    /// The template puts one line break inside each marker and two after the block.
    pub line_breaks: bool,
}

/// How a format marks and writes calls. One value per choice; it sees only what is inside blocks.
pub trait ToolSyntax: Send {
    /// Markers in content or reasoning that begin a block of calls.
    fn openers(&self) -> &[Marker];

    /// A block begins with `openers()[index]`.
    fn open(&mut self, index: usize, calls: &mut Calls, out: &mut Pieces);

    /// Markers that mean something in the present state.
    fn markers(&self) -> &[Marker];

    /// Text between markers.
    fn text(&mut self, text: &str, calls: &mut Calls, out: &mut Pieces) -> Step;

    /// `markers()[index]`, as the token or text it came as.
    fn marker(&mut self, index: usize, item: Item, calls: &mut Calls, out: &mut Pieces) -> Step;

    /// The output ended within the block.
    fn finish(&mut self, end: End, calls: &mut Calls, out: &mut Pieces) -> Step;

    /// Whether a block may begin without an opener, with the first character of the content.
    fn opens_with(&self, _first: char) -> bool {
        false
    }
}

/// Where a block stands after some input.
#[derive(Debug)]
pub enum Step {
    Inside,
    Closed,
    /// The block was none; its text is content, and later text opens none without an opener.
    NoCalls(String),
    /// The last items meant something else than they were taken for: process them again, from the present state.
    Again(Vec<Item>),
}

/// A token or a piece of text, as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Item {
    pub id: Option<u32>,
    pub text: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Reasoning,
    Content,
    Calls,
}

pub struct Tagged {
    think: Option<Think>,
    syntax: Option<Box<dyn ToolSyntax>>,
    calls: Calls,
    state: State,
    /// Markers of reasoning and content: think's two, then the syntax's openers.
    outer: Vec<Marker>,
    scanner: Scanner,
    /// Line breaks still to be taken off the beginning of the present text.
    skip: u8,
    /// A line break at the present text's end, which goes if a block follows.
    held_break: bool,
    /// Blanks at the content's beginning, while it may still begin with a block that has no opener.
    lead: Option<String>,
}

impl Tagged {
    pub fn new(
        think: Option<Think>,
        syntax: Option<Box<dyn ToolSyntax>>,
        rules: CallRules,
        starts_in_reasoning: bool,
    ) -> Self {
        let mut outer = Vec::new();
        if let Some(think) = &think {
            outer.extend([think.open.clone(), think.close.clone()]);
        }
        if let Some(syntax) = &syntax {
            outer.extend_from_slice(syntax.openers());
        }
        let lead = syntax
            .as_ref()
            .filter(|syntax| syntax.openers().is_empty())
            .map(|_| String::new());
        Self {
            state: if starts_in_reasoning && think.is_some() {
                State::Reasoning
            } else {
                State::Content
            },
            think,
            syntax,
            calls: Calls::new(rules),
            outer,
            scanner: Scanner::default(),
            skip: 0,
            held_break: false,
            lead,
        }
    }

    fn line_breaks(&self) -> bool {
        self.think.as_ref().is_some_and(|think| think.line_breaks)
    }

    fn markers(&self) -> &[Marker] {
        match (self.state, &self.syntax) {
            (State::Calls, Some(syntax)) => syntax.markers(),
            _ => &self.outer,
        }
    }

    /// Processes what the scanner holds.
    fn drain(&mut self, out: &mut Pieces) {
        // The scanner is taken out because handling an event changes the markers it is asked with.
        let mut scanner = std::mem::take(&mut self.scanner);
        while let Some(event) = scanner.next(self.markers()) {
            match event {
                Event::Text(text) => self.text(text, out),
                Event::Marker(index) => {
                    let text = self.markers()[index].text.to_owned();
                    self.marker(index, Item { id: None, text }, out);
                }
            }
            // Items processed again may leave the beginning of a marker, before what is still to come.
            if let Some(rest) = self.scanner.rest() {
                scanner.put_back(&rest);
            }
        }
        self.scanner = scanner;
    }

    fn flush(&mut self, out: &mut Pieces) {
        while let Some(rest) = self.scanner.rest() {
            self.text(&rest, out);
        }
    }

    fn text(&mut self, text: &str, out: &mut Pieces) {
        match (self.state, &mut self.syntax) {
            (State::Calls, Some(syntax)) => {
                let step = syntax.text(text, &mut self.calls, out);
                self.step(step, out);
            }
            (State::Content, Some(syntax)) if self.lead.is_some() => {
                let mut whole = self.lead.take().unwrap_or_default();
                whole.push_str(text);
                match whole.trim_start().chars().next() {
                    None => self.lead = Some(whole),
                    Some(first) if syntax.opens_with(first) => {
                        self.state = State::Calls;
                        let step = syntax.text(&whole, &mut self.calls, out);
                        self.step(step, out);
                    }
                    Some(_) => self.outer_text(&whole, out),
                }
            }
            _ => self.outer_text(text, out),
        }
    }

    /// Reasoning or content, less the template's line breaks.
    fn outer_text(&mut self, mut text: &str, out: &mut Pieces) {
        while self.skip > 0 && !text.is_empty() {
            match text.strip_prefix('\n') {
                Some(rest) => (text, self.skip) = (rest, self.skip - 1),
                None => self.skip = 0,
            }
        }
        if text.is_empty() {
            return;
        }
        self.give_break(out);
        if self.line_breaks()
            && let Some(rest) = text.strip_suffix('\n')
        {
            self.held_break = true;
            text = rest;
        }
        let to = match self.state {
            State::Reasoning => &mut out.reasoning,
            _ => &mut out.text,
        };
        to.push_str(text);
    }

    fn give_lead(&mut self, out: &mut Pieces) {
        if let Some(lead) = self.lead.take() {
            self.outer_text(&lead, out);
        }
    }

    fn marker(&mut self, index: usize, item: Item, out: &mut Pieces) {
        if let (State::Calls, Some(syntax)) = (self.state, &mut self.syntax) {
            let step = syntax.marker(index, item, &mut self.calls, out);
            return self.step(step, out);
        }
        let think_markers = if self.think.is_some() { 2 } else { 0 };
        let breaks = u8::from(self.line_breaks());
        match (index, self.state) {
            (0, State::Content) if think_markers > 0 => {
                // Blanks before the reasoning are no content.
                self.lead = self.lead.take().map(|_| String::new());
                self.give_break(out);
                (self.state, self.skip) = (State::Reasoning, breaks);
            }
            (0, _) if think_markers > 0 => self.skip = breaks,
            (1, State::Reasoning) if think_markers > 0 => {
                self.held_break = false;
                (self.state, self.skip) = (State::Content, 2 * breaks);
            }
            (1, _) if think_markers > 0 => {}
            _ => {
                (self.held_break, self.skip) = (false, 0);
                self.state = State::Calls;
                if let Some(syntax) = &mut self.syntax {
                    syntax.open(index - think_markers, &mut self.calls, out);
                }
            }
        }
    }

    fn step(&mut self, step: Step, out: &mut Pieces) {
        match step {
            Step::Inside => {}
            Step::Closed => self.state = State::Content,
            Step::NoCalls(text) => {
                self.state = State::Content;
                self.push(None, &text, out);
            }
            Step::Again(items) => {
                for Item { id, text } in items {
                    self.push(id, &text, out);
                }
            }
        }
    }

    fn give_break(&mut self, out: &mut Pieces) {
        if std::mem::take(&mut self.held_break) {
            match self.state {
                State::Reasoning => out.reasoning.push('\n'),
                _ => out.text.push('\n'),
            }
        }
    }
}

impl OutputParser for Tagged {
    fn push(&mut self, id: Option<u32>, text: &str, out: &mut Pieces) {
        let by_id = |marker: &Marker| marker.id.is_some() && marker.id == id;
        match self.markers().iter().position(by_id) {
            Some(_) => {
                self.flush(out);
                // Flushed text is no marker, but it may still end a block (as NoCalls does).
                let text = text.to_owned();
                match self.markers().iter().position(by_id) {
                    Some(index) => self.marker(index, Item { id, text }, out),
                    None => self.text(&text, out),
                }
            }
            None => {
                self.scanner.feed(text);
                self.drain(out);
            }
        }
    }

    fn finish(&mut self, end: End, out: &mut Pieces) {
        if end == End::Cut && self.state == State::Calls {
            // It may have become a marker: a call's arguments are a prefix of what they would have been.
            self.scanner = Scanner::default();
        }
        self.flush(out);
        // A block's last items may turn out to be content or further blocks: each round has fewer of them.
        while let (State::Calls, Some(syntax)) = (self.state, &mut self.syntax) {
            match syntax.finish(end, &mut self.calls, out) {
                Step::Inside | Step::Closed => break,
                step => self.step(step, out),
            }
            self.flush(out);
        }
        self.give_lead(out);
        self.give_break(out);
    }

    fn in_reasoning(&self) -> bool {
        self.state == State::Reasoning
    }
}
