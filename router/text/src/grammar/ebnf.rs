//! EBNF grammars as llama.cpp and XGrammar read them (`root ::= …`), rewritten as Lark.
//!
//! The two differ in spelling only: rules are `name ::= a b | c`, the start is `root`, names may hold dashes, a
//! character class stands without slashes, comments begin with `#`.

/// Whether a grammar is EBNF and not Lark.
pub fn looks_like(text: &str) -> bool {
    text.contains("::=")
}

/// The same grammar in Lark; an error says which line is wrong.
pub fn to_lark(text: &str) -> Result<String, String> {
    let mut out = String::with_capacity(text.len() + 64);
    let mut has_root = false;
    let mut depth = 0usize;
    for (number, line) in text.lines().enumerate() {
        let wrong = |reason: &str| format!("line {}: {reason}", number + 1);
        let mut rest = line.trim_start();
        if let Some((name, body)) = rest.split_once("::=")
            && !name.contains(['"', '['])
        {
            let name = name.trim();
            if name.is_empty()
                || !name.chars().all(is_name)
                || !name.starts_with(|c: char| c.is_ascii_alphabetic())
            {
                return Err(wrong(&format!("{name:?} is not a rule's name")));
            }
            if depth != 0 {
                return Err(wrong("a rule begins within parentheses"));
            }
            has_root |= name == "root";
            out.push('\n');
            out.push_str(&rule_name(name));
            out.push_str(": ");
            rest = body;
        }
        let mut chars = rest.chars().peekable();
        while let Some(c) = chars.next() {
            match c {
                '#' => break,
                '"' => literal(&mut chars, &mut out).ok_or_else(|| wrong("a string is not closed"))?,
                '[' => class(&mut chars, &mut out).ok_or_else(|| wrong("a character class is not closed"))?,
                '.' => out.push_str("/(.|\\n)/"),
                c if c.is_ascii_alphabetic() => {
                    let mut name = String::from(c);
                    while let Some(c) = chars.next_if(|&c| is_name(c)) {
                        name.push(c);
                    }
                    out.push_str(&rule_name(&name));
                }
                '(' => {
                    depth += 1;
                    out.push(c);
                }
                ')' => {
                    depth = depth
                        .checked_sub(1)
                        .ok_or_else(|| wrong("a parenthesis is not opened"))?;
                    out.push(c);
                }
                '|' | '*' | '+' | '?' | '{' | '}' | ',' | ' ' | '\t' | '0'..='9' => out.push(c),
                c => return Err(wrong(&format!("unexpected {c:?}"))),
            }
        }
        out.push(' ');
    }
    if !has_root {
        return Err("has no rule named root".to_owned());
    }
    if depth != 0 {
        return Err("a parenthesis is not closed".to_owned());
    }
    Ok(out)
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

/// Lark's rules are lower case and begin at `start`.
fn rule_name(name: &str) -> String {
    match name {
        "root" => "start".to_owned(),
        name => format!("r_{}", name.replace('-', "_").to_lowercase()),
    }
}

type Chars<'a> = std::iter::Peekable<std::str::Chars<'a>>;

/// A string after its opening quote. Escapes are JSON's, and `\xNN`.
fn literal(chars: &mut Chars<'_>, out: &mut String) -> Option<()> {
    out.push('"');
    loop {
        match chars.next()? {
            '"' => break,
            '\\' => match chars.next()? {
                'x' => {
                    let digits: String = chars.by_ref().take(2).collect();
                    out.push_str("\\u00");
                    out.push_str(&digits);
                }
                '\'' => out.push('\''),
                c => out.extend(['\\', c]),
            },
            c => out.push(c),
        }
    }
    out.push('"');
    Some(())
}

/// A character class after its opening bracket, as a regex.
fn class(chars: &mut Chars<'_>, out: &mut String) -> Option<()> {
    out.push_str("/[");
    loop {
        match chars.next()? {
            ']' => break,
            '\\' => out.extend(['\\', chars.next()?]),
            c @ ('/' | '[' | '&' | '~') => out.extend(['\\', c]),
            c => out.push(c),
        }
    }
    out.push_str("]/");
    Some(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_respelled() {
        let lark =
            to_lark("# c\nroot ::= \"a\\x41\" some-Rule* # x\n  | [a-z/]{2,3}\nsome-Rule ::= (\"b\" | .)?")
                .unwrap();
        let words: Vec<&str> = lark.split_whitespace().collect();
        assert_eq!(
            words.join(" "),
            r#"start: "a\u0041" r_some_rule* | /[a-z\/]/{2,3} r_some_rule: ("b" | /(.|\n)/)?"#
        );
    }

    #[test]
    fn errors_name_the_line() {
        for (text, error) in [
            ("a ::= \"x\"", "has no rule named root"),
            ("root ::= \"x", "line 1: a string is not closed"),
            ("root ::= [x", "line 1: a character class is not closed"),
            ("root ::= x )", "line 1: a parenthesis is not opened"),
            ("root ::= ( x", "a parenthesis is not closed"),
            ("root ::= (\nb ::= c", "line 2: a rule begins within parentheses"),
            ("root ::= a ; b", "line 1: unexpected ';'"),
            ("1a ::= b", "line 1: \"1a\" is not a rule's name"),
        ] {
            assert_eq!(to_lark(text).unwrap_err(), error);
        }
    }
}
