//! What the grammar library says of a constraint that it cannot compile, in the request's words.
//!
//! Its own errors point at lines of the grammar that was made of the constraint. Those lines are the client's only where
//! the constraint is a grammar; otherwise they are left out, and what they point at is named.

use super::constraint::{Constraint, ToolRules};
use crate::error::TextError;

/// What it says before its word about a schema within a grammar.
const SCHEMA: &str = "failed to compile JSON schema: ";

/// How a place begins: `at 5(8): …`.
struct Place<'a> {
    line: usize,
    reason: &'a str,
}

impl Place<'_> {
    fn of(error: &str) -> Option<Place<'_>> {
        let (place, reason) = error.strip_prefix("at ")?.split_once("): ")?;
        let (line, column) = place.split_once('(')?;
        column.parse::<usize>().ok()?;
        Some(Place {
            line: line.parse().ok()?,
            reason,
        })
    }
}

/// The library's `error` about `constraint`.
pub(super) fn of(constraint: &Constraint, error: &str) -> TextError {
    // How the library says that not even the first byte can be written.
    if error.starts_with("NoExtension") {
        return empty(constraint);
    }
    let Some(Place { line, reason }) = Place::of(error) else {
        return TextError::request(constraint.field(), first_lines(error));
    };
    let tool = match constraint {
        Constraint::Grammar(_) => return TextError::request(constraint.field(), first_lines(error)),
        Constraint::Tools(rules) | Constraint::ToolsOr(rules, _) if reason.starts_with(SCHEMA) => {
            tool_of(rules, line)
        }
        _ => None,
    };
    let field = tool.map_or_else(
        || constraint.field().to_owned(),
        |name| format!("tools: {name:?}.parameters"),
    );
    TextError::request(field, without_lines(reason))
}

/// No text has the form of `constraint`.
pub(super) fn empty(constraint: &Constraint) -> TextError {
    TextError::request(constraint.field(), "matches no text at all")
}

/// The tool that a line of the grammar is about.
fn tool_of(rules: &ToolRules, line: usize) -> Option<&str> {
    let line = rules.lark.lines().nth(line.checked_sub(1)?)?;
    let digits = line.strip_prefix('t')?;
    let end = digits.find(|c: char| !c.is_ascii_digit()).unwrap_or(digits.len());
    Some(rules.names.get(digits[..end].parse::<usize>().ok()?)?)
}

/// Without the lines of the grammar (`   5 | …`) and the mark below them.
fn without_lines(reason: &str) -> String {
    let is_grammar = |line: &str| {
        let rest = line.trim_start();
        let number = rest.trim_start_matches(|c: char| c.is_ascii_digit());
        number.len() < rest.len() && number.starts_with(" |")
    };
    let own: Vec<&str> = reason.lines().take_while(|line| !is_grammar(line)).collect();
    let reason = first_lines(&own.join("\n"));
    match reason.strip_prefix(SCHEMA) {
        Some(reason) => reason.to_owned(),
        None => reason,
    }
}

/// A library's error, without backtraces and parser states.
pub(super) fn first_lines(error: &str) -> String {
    const MAX_LINES: usize = 6;
    const MAX_CHARS: usize = 400;
    let error = error.split("<backtrace>").next().unwrap_or_default();
    let error = error.replace("<non-verbose/>", "");
    let lines: Vec<&str> = error.trim().lines().take(MAX_LINES).collect();
    lines.join("\n").chars().take(MAX_CHARS).collect()
}
