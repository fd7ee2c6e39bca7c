//! Lines that begin with a slash.

use std::path::PathBuf;

use anyhow::{Result, bail};

pub const HELP: &str = "\
/help                what you read
/system [TEXT|off]   show, set or remove the system message
/tools [FILE|off]    show the tools, read them from a JSON file, or remove them
/set [NAME VALUE]    show the settings, or change one: temperature, top_p, top_k, max_tokens, seed, stop,
                     model, thinking (show, hide), figures (show, hide); the value `default` unsets it
/clear               begin a new conversation
/quit                end; so does Ctrl-D
A line that ends with \\ goes on in the next one. Ctrl-C stops an answer. A slash at the start of a message: type two.";

/// For completion.
pub const NAMES: [&str; 6] = ["/help", "/system", "/tools", "/set", "/clear", "/quit"];

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    Help,
    Clear,
    Quit,
    /// `None` shows it.
    System(Option<String>),
    ShowTools,
    /// `None` removes them.
    Tools(Option<PathBuf>),
    ShowOptions,
    Set(String, String),
}

impl Command {
    /// `None` if the line is a message.
    pub fn read(line: &str) -> Result<Option<Command>> {
        if !line.starts_with('/') || line.starts_with("//") {
            return Ok(None);
        }
        let (name, rest) = line.trim_end().split_once(' ').unwrap_or((line.trim_end(), ""));
        let rest = rest.trim();
        let given = (!rest.is_empty()).then(|| rest.to_owned());
        Ok(Some(match (name, given) {
            ("/help" | "/?", _) => Command::Help,
            ("/clear" | "/new", _) => Command::Clear,
            ("/quit" | "/exit" | "/bye", _) => Command::Quit,
            ("/system", text) => Command::System(text),
            ("/tools", None) => Command::ShowTools,
            ("/tools", Some(file)) => Command::Tools((file != "off").then(|| file.into())),
            ("/set", None) => Command::ShowOptions,
            ("/set", Some(given)) => {
                let Some((name, value)) = given.split_once(' ') else {
                    bail!("/set {given}: give a value, or `default`");
                };
                Command::Set(name.to_owned(), value.trim().to_owned())
            }
            (unknown, _) => bail!("{unknown} is no command; /help lists them"),
        }))
    }
}

/// A message may begin with a slash: then two are typed.
pub fn unescape(line: String) -> String {
    match line.strip_prefix("//") {
        Some(rest) => format!("/{rest}"),
        None => line,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_and_messages() {
        let read = |line| Command::read(line).expect("a command or a message");
        assert_eq!(read("What is /tmp?"), None);
        assert_eq!(read("//tmp is full"), None);
        assert_eq!(unescape("//tmp is full".into()), "/tmp is full");
        assert_eq!(read("/help "), Some(Command::Help));
        assert_eq!(read("/system"), Some(Command::System(None)));
        assert_eq!(
            read("/system Be  brief."),
            Some(Command::System(Some("Be  brief.".into())))
        );
        assert_eq!(read("/tools"), Some(Command::ShowTools));
        assert_eq!(read("/tools off"), Some(Command::Tools(None)));
        assert_eq!(
            read("/tools a b.json"),
            Some(Command::Tools(Some("a b.json".into())))
        );
        assert_eq!(
            read("/set temperature 0.5"),
            Some(Command::Set("temperature".into(), "0.5".into()))
        );
        assert!(Command::read("/set temperature").is_err());
        assert!(Command::read("/hepl").is_err_and(|error| error.to_string().contains("/help")));
    }

    #[test]
    fn help_names_every_command() {
        assert!(NAMES.iter().all(|name| HELP.contains(name)));
    }
}
