//! Which characters of a request's strings to shadow.
//!
//! One character of every added token's text that stands in a string; and where a string's end is a token's
//! beginning, or its beginning a token's end, one character of that too: the template may put the rest beside it.
//! Roles are left alone: they are identifiers, and templates build control text from them.

use std::collections::{HashMap, HashSet};

use super::Input;
use crate::{
    json::{Json, Object},
    template::shadow,
    tokenizer::AddedTokens,
};

/// All marks of a request, in the order of its strings.
pub struct Marks {
    marks: Vec<Mark>,
    tokens: Vec<String>,
}

struct Mark {
    /// Number of the string in the order of `walk`.
    string: usize,
    /// Byte of the character to shadow.
    at: usize,
    /// What the mark belongs to: marks of one group share place and token.
    group: usize,
    /// The token whose text stands there whole; `None` for a part of one at a string's edge.
    token: Option<usize>,
}

impl Marks {
    pub fn find(input: &mut Input, added: &AddedTokens) -> Self {
        let tokens: Vec<String> = added.tokens().iter().map(|t| t.content.clone()).collect();
        let mut marks = Vec::new();
        let mut groups = HashMap::new();
        let mut string = 0;
        walk(input, &mut |place, text| {
            let mut found: Vec<(usize, Option<usize>)> = added
                .occurrences(text)
                .filter_map(|(token, start)| {
                    let (offset, _) = shadowable(&tokens[token])?;
                    Some((start + offset, Some(token)))
                })
                .collect();
            found.extend(added.edges(text).filter_map(|(part, start)| {
                let (offset, _) = shadowable(part)?;
                Some((start + offset, None))
            }));
            found.sort_unstable();
            found.dedup();
            for (at, token) in found {
                let next = groups.len();
                let group = *groups.entry((place.to_owned(), token)).or_insert(next);
                marks.push(Mark {
                    string,
                    at,
                    group,
                    token,
                });
            }
            string += 1;
        });
        Self { marks, tokens }
    }

    pub fn len(&self) -> usize {
        self.marks.len()
    }

    /// The token's text a mark stands in, if it stands there whole.
    pub fn token(&self, mark: usize) -> Option<&str> {
        self.marks[mark].token.map(|token| self.tokens[token].as_str())
    }

    /// The marks by group.
    pub fn groups(&self) -> Vec<Vec<usize>> {
        let count = self.marks.iter().map(|mark| mark.group + 1).max().unwrap_or(0);
        let mut groups = vec![Vec::new(); count];
        for (index, mark) in self.marks.iter().enumerate() {
            groups[mark.group].push(index);
        }
        groups
    }

    /// The input with every string that holds one of these marks replaced by `text`, and the same with one of
    /// `token_bytes` characters of it shadowed, those in its middle.
    pub fn replace(&self, input: &Input, marks: &[usize], text: &str, token_bytes: usize) -> (Input, Input) {
        let strings: HashSet<usize> = marks.iter().map(|&mark| self.marks[mark].string).collect();
        let start = (text.len() - token_bytes) / 2;
        let offset = shadowable(&text[start..]).map_or(0, |(offset, _)| offset);
        let with = |text: &str| {
            let mut replaced = input.clone();
            let mut string = 0;
            walk(&mut replaced, &mut |_, old| {
                if strings.contains(&string) {
                    *old = text.to_owned();
                }
                string += 1;
            });
            replaced
        };
        (with(text), with(&shadow_at(text, &[start + offset])))
    }

    /// The input with these marks' characters shadowed.
    pub fn apply(&self, input: &Input, marks: &[usize]) -> Input {
        let mut by_string: HashMap<usize, Vec<usize>> = HashMap::new();
        for &mark in marks {
            let Mark { string, at, .. } = self.marks[mark];
            by_string.entry(string).or_default().push(at);
        }
        let mut shadowed = input.clone();
        let mut string = 0;
        walk(&mut shadowed, &mut |_, text| {
            if let Some(places) = by_string.get(&string) {
                *text = shadow_at(text, places);
            }
            string += 1;
        });
        shadowed
    }
}

/// The text with the characters at these bytes (ascending) shadowed.
fn shadow_at(text: &str, places: &[usize]) -> String {
    let mut places = places.iter().copied().peekable();
    let shadowed = text.char_indices().map(|(at, c)| {
        let mut hit = false;
        while places.next_if(|&place| place <= at).is_some() {
            hit = true;
        }
        if hit { shadow::of(c).unwrap_or(c) } else { c }
    });
    shadowed.collect()
}

/// The first character of a text that has a shadow, and its byte.
fn shadowable(text: &str) -> Option<(usize, char)> {
    text.char_indices().find(|(_, c)| shadow::of(*c).is_some())
}

/// Visits every string of the request that is user text, keys of nested objects too, in a fixed order. The first
/// argument says where it stands: role and key of the message, or "tools".
fn walk(input: &mut Input, visit: &mut impl FnMut(&str, &mut String)) {
    for message in &mut input.messages {
        let Json::Object(message) = message else { continue };
        let role = message
            .get("role")
            .and_then(Json::as_str)
            .unwrap_or_default()
            .to_owned();
        for (key, value) in message.iter_mut().filter(|(key, _)| *key != "role") {
            walk_value(value, &format!("{role}.{key}"), visit);
        }
    }
    if let Some(tools) = &mut input.tools {
        walk_value(tools, "tools", visit);
    }
    for (name, value) in &mut input.kwargs {
        walk_value(value, name, visit);
    }
}

fn walk_value(value: &mut Json, place: &str, visit: &mut impl FnMut(&str, &mut String)) {
    match value {
        Json::String(text) => visit(place, text),
        Json::Array(items) => items.iter_mut().for_each(|item| walk_value(item, place, visit)),
        Json::Object(object) => {
            let old = std::mem::take(object);
            let pairs = old.into_iter().map(|(mut key, mut value)| {
                visit(place, &mut key);
                walk_value(&mut value, place, visit);
                (key, value)
            });
            *object = pairs.collect::<Object>();
        }
        Json::Null | Json::Bool(_) | Json::Number(_) => {}
    }
}
