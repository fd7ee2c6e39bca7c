//! From a conversation to prompt text and token ids, such that nothing a user wrote becomes a control token.
//!
//! A rendered prompt is one string; which of its characters came from the user is lost. So it is rendered twice:
//! once plainly, and once with one character shadowed (see `template::shadow`) in every piece of user text that is
//! an added token's text, or that could be completed to one by what stands next to it. Where the two renderings
//! differ, the character came from the user, and no added token may cover it. The prompt is always the plain
//! rendering, to the byte.
//!
//! A template that looks into the text (`'</think>' in content`) renders something else when exactly that text is
//! shadowed. The texts it looks at are found by rendering with parts of the marks, and stay unmarked: they are the
//! template's business. If that cannot be settled within a few renderings, the request is refused.

mod marks;

use crate::{
    chat::{self, Chat, ToolSpec},
    error::{Result, TextError},
    json::Json,
    template::{ChatTemplate, Variables, shadow},
    tokenizer::Tokenizer,
};
use marks::Marks;

/// Renderings of one request in search of the texts a template looks at.
pub const MAX_RENDERINGS: usize = 64;

/// Variables that requests may not set through template_kwargs.
const RESERVED: [&str; 5] = [
    "messages",
    "tools",
    "documents",
    "add_generation_prompt",
    "chat_template",
];

/// Renders and encodes a conversation whose tools have been read: prompt text and token ids.
pub(crate) fn render_chat(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    chat: &Chat,
    tools: &[ToolSpec],
    salt: u64,
) -> Result<(String, Vec<u32>)> {
    let mut input = Input::new(template, chat, tools)?;
    let mut text = template.render(&input.variables(), false)?;
    let marks = Marks::find(&mut input, tokenizer.added());
    let mut barred = match marks.len() {
        0 => Vec::new(),
        _ => settle(template, &input, &marks, &text)?,
    };
    if chat.continue_final_message {
        text.truncate(end_of_final_message(&text, &input)?);
        barred.retain(|&at| at < text.len());
    }
    let ids = tokenizer.encode_remembering(&text, &barred, salt)?;
    Ok((text, ids))
}

/// Everything a request gives to the template.
#[derive(Clone)]
struct Input {
    messages: Vec<Json>,
    tools: Option<Json>,
    kwargs: Vec<(String, Json)>,
    add_generation_prompt: bool,
}

impl Input {
    fn new(template: &ChatTemplate, chat: &Chat, tools: &[ToolSpec]) -> Result<Self> {
        if chat.continue_final_message && chat.add_generation_prompt == Some(true) {
            return Err(TextError::request(
                "continue_final_message",
                "cannot be used together with add_generation_prompt",
            ));
        }
        let kwargs = match chat.template_kwargs_json.as_str() {
            "" => Vec::new(),
            text => chat::read_object("template_kwargs", text)?.into_iter().collect(),
        };
        if let Some((name, _)) = kwargs.iter().find(|(name, _)| RESERVED.contains(&name.as_str())) {
            return Err(TextError::request(
                format!("template_kwargs.{name}"),
                "is set by the server",
            ));
        }
        let mut messages = chat::template_messages(chat, template.reads_parts())?;
        template.roles().adapt(&mut messages, template.source())?;
        Ok(Self {
            messages,
            tools: (!tools.is_empty()).then(|| chat::template_tools(tools)),
            kwargs,
            add_generation_prompt: chat.add_generation_prompt.unwrap_or(!chat.continue_final_message),
        })
    }

    fn variables(&self) -> Variables<'_> {
        Variables {
            messages: &self.messages,
            tools: self.tools.as_ref(),
            add_generation_prompt: self.add_generation_prompt,
            kwargs: &self.kwargs,
        }
    }
}

/// Finds the largest set of marks that the template does not notice; gives the barred bytes of `plain`.
fn settle(template: &ChatTemplate, input: &Input, marks: &Marks, plain: &str) -> Result<Vec<usize>> {
    let mut search = Search {
        template,
        input,
        marks,
        plain,
        renderings: 0,
    };
    let mut groups = Vec::new();
    for group in marks.groups() {
        if !search.looks_at(&group)? {
            groups.push(group);
        }
    }
    let mut accepted = Vec::new();
    search.narrow(groups, &mut accepted)?;
    // Marks that go unnoticed one by one may still be noticed together.
    match search.try_marks(&accepted)? {
        Some(barred) => Ok(barred),
        None => Err(unsettled()),
    }
}

fn unsettled() -> TextError {
    TextError::request(
        "messages",
        "contain control tokens' texts in places that the chat template interprets; \
         it cannot be told which of them are plain text",
    )
}

struct Search<'a> {
    template: &'a ChatTemplate,
    input: &'a Input,
    marks: &'a Marks,
    plain: &'a str,
    renderings: usize,
}

impl Search<'_> {
    /// Whether the template treats this token in this place as markup. Comparing the renderings of the text
    /// itself cannot tell: a reasoning block cut out of the content and printed anew looks like one passed
    /// through. So a text that no template prints by chance is rendered, with the token and with it shadowed.
    fn looks_at(&mut self, group: &[usize]) -> Result<bool> {
        let Some(token) = self.spelled_out(group) else {
            return Ok(false);
        };
        let probe = |token: &str| format!("q7{token}z9");
        let (plain, marked) = self.marks.replace(self.input, group, &probe(token), token.len());
        self.spend(2)?;
        let plain = self.template.render(&plain.variables(), false);
        let marked = self.template.render(&marked.variables(), true);
        Ok(match (plain, marked) {
            (Ok(plain), Ok(marked)) => differences(&plain, &marked).is_none(),
            _ => true,
        })
    }

    /// The token of a group if the template's source spells it out; only then can the template look at it.
    fn spelled_out(&self, group: &[usize]) -> Option<&str> {
        let token = self.marks.token(*group.first()?)?;
        self.template.source().contains(token).then_some(token)
    }

    fn spend(&mut self, renderings: usize) -> Result<()> {
        self.renderings += renderings;
        if self.renderings > MAX_RENDERINGS {
            return Err(unsettled());
        }
        Ok(())
    }

    /// Renders with these marks; the barred bytes if the rest came out the same.
    fn try_marks(&mut self, marks: &[usize]) -> Result<Option<Vec<usize>>> {
        self.spend(1)?;
        let shadowed = self.marks.apply(self.input, marks);
        // A template may raise an error when it misses a text: then it has noticed the marks.
        let rendered = self.template.render(&shadowed.variables(), true);
        Ok(rendered
            .ok()
            .and_then(|rendered| differences(self.plain, &rendered)))
    }

    /// Halves the groups until those that the template notices stand alone. A group whose text the template's
    /// source spells out is given up whole, others mark by mark.
    fn narrow(&mut self, groups: Vec<Vec<usize>>, accepted: &mut Vec<usize>) -> Result<()> {
        if groups.is_empty() {
            return Ok(());
        }
        let together = groups.concat();
        if self.try_marks(&together)?.is_some() {
            accepted.extend(together);
            return Ok(());
        }
        if let [group] = groups.as_slice() {
            if group.len() == 1 || self.spelled_out(group).is_some() {
                return Ok(());
            }
            let single = group.iter().map(|&mark| vec![mark]).collect();
            return self.halve(single, accepted);
        }
        self.halve(groups, accepted)
    }

    fn halve(&mut self, mut groups: Vec<Vec<usize>>, accepted: &mut Vec<usize>) -> Result<()> {
        let second = groups.split_off(groups.len() / 2);
        self.narrow(groups, accepted)?;
        self.narrow(second, accepted)
    }
}

/// Bytes of `plain` whose characters are shadowed in `rendered`; `None` if anything else differs.
fn differences(plain: &str, rendered: &str) -> Option<Vec<usize>> {
    let mut barred = Vec::new();
    let mut others = rendered.chars();
    for (at, c) in plain.char_indices() {
        let other = others.next()?;
        if other != c {
            (shadow::of(c) == Some(other)).then(|| barred.push(at))?;
        }
    }
    others.next().is_none().then_some(barred)
}

/// Where the last message's text ends in the prompt, so that generation goes on from there.
fn end_of_final_message(text: &str, input: &Input) -> Result<usize> {
    let last = input.messages.last().and_then(|message| message.get("content"));
    let parts = |content: &Json| {
        content
            .as_array()
            .and_then(|parts| parts.last()?.get("text").cloned())
    };
    let content = last.and_then(|content| parts(content).or(Some(content.clone())));
    let content = content.as_ref().and_then(Json::as_str).unwrap_or_default();
    let trimmed = content.trim();
    let failed = |reason| Err(TextError::request("continue_final_message", reason));
    if trimmed.is_empty() {
        return failed("the last message has no text to continue");
    }
    // Template and user agree on a message's blanks or the template trims them.
    match (text.rfind(content), text.rfind(trimmed)) {
        (Some(at), Some(inner)) if at + content.len() >= inner + trimmed.len() => Ok(at + content.len()),
        (_, Some(at)) => Ok(at + trimmed.len()),
        _ => failed("the chat template does not print the last message's text as it is"),
    }
}

#[cfg(test)]
mod tests;
