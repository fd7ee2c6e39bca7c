//! Instructions in places where the checkpoint's template would leave them out.
//!
//! Templates such as MiniMax-M2's print a system message only as the first one, know no role `developer`, and pass over
//! what they do not know without a word. Agents send both: what they say must reach the model. Where the template prints
//! them itself, nothing is changed.

use crate::{
    error::{Result, TextError},
    json::Json,
};

/// Roles of the two APIs; each is either printed by a template or mapped to one that is.
const KNOWN: [&str; 5] = ["system", "developer", "user", "assistant", "tool"];

/// What a template prints, as found by trying.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Roles {
    /// A developer's message.
    pub developer: bool,
    /// A system message behind another message.
    pub late_system: bool,
    /// A message of a role that nobody has.
    pub any: bool,
}

impl Roles {
    /// Developers' messages become the system's. Those at the beginning become one; a later one becomes a user's, in its
    /// place, so that what stands in front of it stays a cached prefix.
    pub(crate) fn adapt(self, messages: &mut Vec<Json>, source: &str) -> Result<()> {
        if !self.any {
            known(messages, source)?;
        }
        if !self.developer {
            rename(messages, "developer", "system");
        }
        if self.late_system {
            return Ok(());
        }
        let first = messages.iter().take_while(|message| role(message) == "system");
        let first = first.count().max(1).min(messages.len());
        let rest = messages.split_off(first);
        let contents = messages.iter_mut().filter_map(content_of);
        let content = contents
            .map(|content| std::mem::replace(content, Json::Null))
            .reduce(joined);
        messages.truncate(1);
        if let (Some(whole), Some(content)) = (messages.first_mut().and_then(content_of), content) {
            *whole = content;
        }
        messages.extend(rest);
        rename(messages.get_mut(1..).unwrap_or_default(), "system", "user");
        Ok(())
    }
}

/// A role that the template may print is named in it.
fn known(messages: &[Json], source: &str) -> Result<()> {
    for (index, message) in messages.iter().enumerate() {
        let role = role(message);
        let named = |quote: char| source.contains(&format!("{quote}{role}{quote}"));
        if !KNOWN.contains(&role) && !named('"') && !named('\'') {
            return Err(TextError::request(
                format!("messages[{index}].role"),
                format!("{role:?} is not known to the chat template: use system, user, assistant or tool"),
            ));
        }
    }
    Ok(())
}

fn role(message: &Json) -> &str {
    message.get("role").and_then(Json::as_str).unwrap_or_default()
}

fn content_of(message: &mut Json) -> Option<&mut Json> {
    match message {
        Json::Object(message) => message.get_mut("content"),
        _ => None,
    }
}

fn rename(messages: &mut [Json], from: &str, to: &str) {
    for message in messages.iter_mut().filter(|message| role(message) == from) {
        if let Json::Object(message) = message {
            message.insert("role".to_owned(), Json::from(to));
        }
    }
}

/// Two contents as one, a blank line between them.
fn joined(first: Json, second: Json) -> Json {
    match (first, second) {
        (Json::String(first), Json::String(second)) => Json::String(format!("{first}\n\n{second}")),
        (first, second) => {
            let blank = parts(Json::from("\n\n"));
            Json::Array([parts(first), blank, parts(second)].concat())
        }
    }
}

fn parts(content: Json) -> Vec<Json> {
    match content {
        Json::Array(parts) => parts,
        text => vec![crate::json::object([
            ("type", Json::from("text")),
            ("text", text),
        ])],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{json, template::ChatTemplate, testing::data, tokenizer::TokenizerConfig};

    fn compile(source: String) -> ChatTemplate {
        let sources = [("default".to_owned(), source)];
        ChatTemplate::compile(&sources, &TokenizerConfig::default()).unwrap()
    }

    fn adapted(template: &ChatTemplate, messages: &str) -> Result<String> {
        let Json::Array(mut messages) = json::parse(messages).unwrap() else {
            panic!("not a list")
        };
        template.roles().adapt(&mut messages, template.source())?;
        Ok(Json::Array(messages).to_python())
    }

    const EVERYWHERE: &str = r#"[{"role": "developer", "content": "a"}, {"role": "system", "content": [{"type": "text", "text": "b"}]}, {"role": "user", "content": "c"}, {"role": "system", "content": "d"}, {"role": "developer", "content": "e"}]"#;

    #[test]
    fn what_the_released_templates_leave_out_reaches_the_model() {
        for file in [
            "chat_template.jinja",
            "chat_template.M2.jinja",
            "chat_template.M2.7.jinja",
        ] {
            let template = compile(data(&format!("text/{file}")));
            assert_eq!(
                adapted(&template, EVERYWHERE).unwrap(),
                r#"[{"role": "system", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "\n\n"}, {"type": "text", "text": "b"}]}, {"role": "user", "content": "c"}, {"role": "user", "content": "d"}, {"role": "user", "content": "e"}]"#
            );
            let texts = r#"[{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}]"#;
            assert_eq!(
                adapted(&template, texts).unwrap(),
                r#"[{"role": "system", "content": "a\n\nb"}]"#
            );
            let plain = r#"[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]"#;
            assert_eq!(adapted(&template, plain).unwrap(), plain);
            assert_eq!(adapted(&template, "[]").unwrap(), "[]");
        }
    }

    #[test]
    fn a_role_that_would_be_passed_over_is_refused() {
        let template = compile(data("text/chat_template.jinja"));
        let error = adapted(
            &template,
            r#"[{"role": "user", "content": "a"}, {"role": "assitant", "content": "b"}]"#,
        );
        let error = error.unwrap_err().to_string();
        assert!(
            error.starts_with("messages[1].role") && error.contains("\"assitant\""),
            "{error}"
        );
        let critic = "{% for m in messages %}{% if m.role in ['user', 'critic'] %}{{ m.content }}{% endif %}{% endfor %}";
        let critic = compile(critic.to_owned());
        let said = r#"[{"role": "user", "content": "a"}, {"role": "critic", "content": "b"}]"#;
        assert_eq!(adapted(&critic, said).unwrap(), said);
    }

    #[test]
    fn what_a_template_prints_stays_as_it_is() {
        let all = compile("{% for m in messages %}{{ m.role ~ m.content }}{% endfor %}".to_owned());
        assert_eq!(adapted(&all, EVERYWHERE).unwrap(), EVERYWHERE);
        let odd = r#"[{"role": "critic", "content": "b"}]"#;
        assert_eq!(adapted(&all, odd).unwrap(), odd);
    }
}
