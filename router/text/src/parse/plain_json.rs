//! Calls as bare JSON: an answer that is one call object or a list of them, and nothing else (Llama 3's format).
//!
//! Nothing marks such a block, so an answer that begins like one is kept until its first function's name is known:
//! if nobody offers that function, the text was an answer in JSON, and is given back as content.

use super::{
    End, Pieces,
    call_object::{CallObject, CallStatus},
    calls::Calls,
    scan::Marker,
    tagged::{Item, Step, ToolSyntax},
};

#[derive(Default)]
pub struct PlainJson {
    call: Option<CallObject>,
    /// The text so far, until a call is certain.
    kept: String,
    certain: bool,
}

impl ToolSyntax for PlainJson {
    fn openers(&self) -> &[Marker] {
        &[]
    }

    fn opens_with(&self, first: char) -> bool {
        matches!(first, '{' | '[')
    }

    fn open(&mut self, _index: usize, _calls: &mut Calls, _out: &mut Pieces) {}

    fn markers(&self) -> &[Marker] {
        &[]
    }

    fn text(&mut self, text: &str, calls: &mut Calls, out: &mut Pieces) -> Step {
        if !self.certain {
            self.kept.push_str(text);
        }
        for c in text.chars() {
            match &mut self.call {
                Some(call) => {
                    let status = call.push(c, calls, out);
                    self.certain |= call.begun();
                    match status {
                        CallStatus::More => {}
                        CallStatus::Done => self.call = None,
                        // Text after the first call that is no call is dropped, as all between calls is.
                        CallStatus::Invalid if self.certain => self.call = None,
                        CallStatus::Invalid => return Step::NoCalls(std::mem::take(&mut self.kept)),
                    }
                }
                None if c == '{' => {
                    let mut call = CallObject::new(true);
                    call.push(c, calls, out);
                    self.call = Some(call);
                }
                None if self.certain || matches!(c, '[' | ' ' | '\n' | '\t' | '\r') => {}
                None => return Step::NoCalls(std::mem::take(&mut self.kept)),
            }
        }
        if self.certain {
            self.kept.clear();
        }
        Step::Inside
    }

    fn marker(&mut self, _index: usize, item: Item, calls: &mut Calls, out: &mut Pieces) -> Step {
        self.text(&item.text, calls, out)
    }

    fn finish(&mut self, end: End, calls: &mut Calls, out: &mut Pieces) -> Step {
        if !self.certain {
            return Step::NoCalls(std::mem::take(&mut self.kept));
        }
        if let Some(mut call) = self.call.take() {
            call.finish(end, calls, out);
        }
        Step::Closed
    }
}
