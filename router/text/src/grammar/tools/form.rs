//! A Lark grammar for the text of one parameter, as terminals of the grammar of calls.
//!
//! A value in tags ends at its closing tag, wherever that comes first. Rules cannot say that: one whose last part takes
//! any text would swallow the tag. A terminal can, so every rule of a client's grammar becomes a terminal, under a name
//! of its own; what terminals cannot be (rules that refer to themselves, grammars within grammars) is an error here.

use std::collections::{HashMap, HashSet};

use super::super::bounds::{check_lark, end_of_literal};

/// The definitions, and the name of the terminal that is the whole text.
pub(super) fn terminals(lark: &str, prefix: &str) -> Result<(String, String), String> {
    check_lark(lark)?;
    let mut reader = Reader {
        rest: lark,
        prefix,
        out: String::new(),
        defining: String::new(),
        uses: HashMap::new(),
    };
    reader.read()?;
    let start = reader.renamed("start");
    if !reader.uses.contains_key(&start) {
        return Err("has no rule named start".to_owned());
    }
    match in_a_circle(&reader.uses, &start) {
        Some(name) => Err(format!(
            "{}: refers to itself, to which no call is held",
            name[prefix.len() + 2..].to_lowercase()
        )),
        None => Ok((reader.out, start)),
    }
}

struct Reader<'a> {
    rest: &'a str,
    prefix: &'a str,
    out: String,
    /// The rule or terminal whose body is read, and what each refers to.
    defining: String,
    uses: HashMap<String, Vec<String>>,
}

impl Reader<'_> {
    fn read(&mut self) -> Result<(), String> {
        while let Some(c) = self.rest.chars().next() {
            match c {
                '#' => self.skip_line(),
                '/' if self.rest.starts_with("//") => self.skip_line(),
                '"' | '/' => self.literal(c)?,
                '%' => self.import()?,
                '-' if self.rest.starts_with("->") => self.skip_alias(),
                '@' | '<' | '=' | '$' => return Err(format!("{c:?}: no call is held to what it stands for")),
                // Modifiers of a rule's name say how a tree is built. After a value `?` is an operator.
                '!' => self.rest = &self.rest[1..],
                '?' if self.rest[1..].starts_with(|c: char| c.is_ascii_lowercase())
                    && self.at_line_start() =>
                {
                    self.rest = &self.rest[1..];
                }
                c if c.is_ascii_alphabetic() || c == '_' => self.name()?,
                c => {
                    self.out.push(c);
                    self.rest = &self.rest[c.len_utf8()..];
                }
            }
        }
        Ok(())
    }

    fn skip_line(&mut self) {
        self.rest = &self.rest[self.rest.find('\n').unwrap_or(self.rest.len())..];
    }

    fn at_line_start(&self) -> bool {
        let line = self.out.rsplit('\n').next().unwrap_or_default();
        line.trim().is_empty()
    }

    fn take(&mut self, bytes: usize) {
        self.out.push_str(&self.rest[..bytes]);
        self.rest = &self.rest[bytes..];
    }

    /// A string or a regex, with its flags.
    fn literal(&mut self, quote: char) -> Result<(), String> {
        let end = end_of_literal(&self.rest[1..], quote).ok_or("a string or regex is not closed")?;
        self.take(end + 2);
        let flags = self.rest.bytes().take_while(u8::is_ascii_lowercase).count();
        self.take(flags);
        Ok(())
    }

    fn skip_alias(&mut self) {
        let rest = self.rest[2..].trim_start();
        self.rest = &rest[name_bytes(rest)..];
    }

    /// `%import common.LF`, with another name or without.
    fn import(&mut self) -> Result<(), String> {
        let (line, rest) = self.rest.split_once('\n').unwrap_or((self.rest, ""));
        let wrong = || {
            format!(
                "{:.40}: no call is held to it, only to %import common.NAME",
                line.trim()
            )
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        let (path, alias) = match words[..] {
            ["%import", path] => (path, None),
            ["%import", path, "->", alias] => (path, Some(alias)),
            _ => return Err(wrong()),
        };
        let name = path.strip_prefix("common.").ok_or_else(wrong)?;
        let local = self.renamed(alias.unwrap_or(name));
        if name_bytes(name) != name.len() || alias.is_some_and(|alias| name_bytes(alias) != alias.len()) {
            return Err(wrong());
        }
        self.out.push_str(&format!("%import {path} -> {local}\n"));
        self.rest = rest;
        Ok(())
    }

    fn name(&mut self) -> Result<(), String> {
        let (name, rest) = self.rest.split_at(name_bytes(self.rest));
        let renamed = self.renamed(name);
        let after = rest.trim_start_matches([' ', '\t']);
        if rest.starts_with(['{', '[']) && self.at_line_start() || after.starts_with("::") {
            return Err(format!(
                "{name}: no call is held to rules with parameters or attributes"
            ));
        }
        // A priority, `name.2:`, says nothing where there is one terminal.
        let numbered = after.strip_prefix('.').map(|rest| {
            rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '-')
                .trim_start_matches([' ', '\t'])
        });
        match numbered.unwrap_or(after) {
            body if body.starts_with(':') => {
                if self.uses.insert(renamed.clone(), Vec::new()).is_some() {
                    return Err(format!("{name}: is defined twice"));
                }
                self.out.push_str(&renamed);
                self.defining = renamed;
                self.rest = body;
            }
            _ => {
                self.out.push_str(&renamed);
                if let Some(uses) = self.uses.get_mut(&self.defining) {
                    uses.push(renamed);
                }
                self.rest = rest;
            }
        }
        Ok(())
    }

    /// As a terminal's name. A rule and a terminal may differ in case alone.
    fn renamed(&self, name: &str) -> String {
        let is_rule = name.contains(|c: char| c.is_ascii_lowercase());
        let kind = if is_rule { "R_" } else { "T_" };
        format!("{}{kind}{}", self.prefix, name.to_uppercase())
    }
}

fn name_bytes(text: &str) -> usize {
    let is_part = |b: &u8| b.is_ascii_alphanumeric() || *b == b'_';
    text.bytes().take_while(is_part).count()
}

/// A name that is reached from itself.
fn in_a_circle<'a>(uses: &'a HashMap<String, Vec<String>>, start: &'a str) -> Option<&'a str> {
    let (mut on_the_way, mut done) = (HashSet::from([start]), HashSet::new());
    // The way from the start, each with what is still to be looked at.
    let mut way: Vec<(&str, usize)> = vec![(start, 0)];
    while let Some((name, at)) = way.last_mut() {
        let name = *name;
        let next = uses.get(name).and_then(|uses| uses.get(*at));
        *at += 1;
        match next.map(String::as_str) {
            None => {
                on_the_way.remove(name);
                done.insert(name);
                way.pop();
            }
            Some(next) if on_the_way.contains(next) => return Some(next),
            Some(next) if !done.contains(next) => {
                on_the_way.insert(next);
                way.push((next, 0));
            }
            Some(_) => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_become_terminals() {
        let lark = "// a\n?start: line+ -> whole\n!line.2: \"+\"i /x\\/[a-z]/s LF? | TEXT~2..3 # b\nTEXT: \"start\"\n%import common.LF\n";
        let (out, start) = terminals(lark, "A").unwrap();
        assert_eq!(start, "AR_START");
        assert_eq!(
            out.trim(),
            "AR_START: AR_LINE+ \nAR_LINE: \"+\"i /x\\/[a-z]/s AT_LF? | AT_TEXT~2..3 \nAT_TEXT: \"start\"\n%import common.LF -> AT_LF"
        );
    }

    #[test]
    fn what_terminals_cannot_be_is_an_error() {
        for (lark, error) in [
            ("x: \"a\"", "has no rule named start"),
            (
                "start: x\nx: \"(\" start \")\" | \"a\"",
                "start: refers to itself",
            ),
            ("start: a b\na: b\nb: c\nc: \"x\" b?", "b: refers to itself"),
            ("start: \"a\"\nstart: \"b\"", "start: is defined twice"),
            ("start: x\nx[lazy]: /a/", "x: no call is held to rules with"),
            ("start: @other", "'@': no call"),
            ("start: <[5]>", "'<': no call"),
            ("start: %json {}", "%json {}: no call"),
            ("start: \"a\"\n%ignore / /", "%ignore / /: no call"),
            ("start: \"a", "is not closed"),
        ] {
            let found = terminals(lark, "A").unwrap_err();
            assert!(found.contains(error), "{lark}: {found}");
        }
        let two = "start: a a\na: b b\nb: \"x\"";
        assert!(terminals(two, "A").is_ok(), "what is used twice is no circle");
    }
}
