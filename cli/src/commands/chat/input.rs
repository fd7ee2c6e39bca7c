//! Lines from the user: edited and remembered in a terminal, as they are from a pipe.
//!
//! A thread of its own reads, only when asked: a blocked read must not hold the runtime.

use std::fs;
use std::io::{self, BufRead, Read};
use std::path::PathBuf;
use std::thread;

use anyhow::{Context, Result, anyhow};
use rustyline::completion::Completer;
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::Validator;
use rustyline::{Config, Editor, Helper};
use tokio::sync::{mpsc, oneshot};

use super::{command, options};

/// Lines that the history file keeps.
const HISTORY_LINES: usize = 1000;
/// Longest line of a pipe.
const MAX_LINE_BYTES: u64 = 16 << 20;

#[derive(Debug, PartialEq, Eq)]
pub enum Line {
    Text(String),
    /// Ctrl-C.
    Interrupted,
    /// Ctrl-D, or the end of the pipe.
    End,
}

type Reply = oneshot::Sender<Result<Line>>;

pub struct Input {
    asks: mpsc::Sender<(String, Reply)>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Input {
    pub fn new(interactive: bool) -> Result<Input> {
        // One line is asked for at a time.
        let (asks, asked) = mpsc::channel(1);
        let thread = thread::Builder::new().name("input".into());
        let thread = thread.spawn(move || match interactive {
            true => serve_terminal(asked),
            false => serve_pipe(asked),
        });
        Ok(Input {
            asks,
            thread: Some(thread.context("no thread for the input")?),
        })
    }

    /// The next line; lines that end with a backslash are joined.
    pub async fn line(&self, prompt: &str) -> Result<Line> {
        let mut whole = String::new();
        let mut prompt = prompt.to_owned();
        loop {
            match self.one(&prompt).await? {
                Line::Text(text) => match text.strip_suffix('\\') {
                    Some(begun) => {
                        whole += begun;
                        whole.push('\n');
                        prompt = ". ".to_owned();
                    }
                    None => return Ok(Line::Text(whole + &text)),
                },
                other => return Ok(other),
            }
        }
    }

    async fn one(&self, prompt: &str) -> Result<Line> {
        let (reply, line) = oneshot::channel();
        let ended = || anyhow!("the input's thread ended");
        let asked = self.asks.send((prompt.to_owned(), reply)).await;
        asked.map_err(|_| ended())?;
        line.await.map_err(|_| ended())?
    }

    /// Lets the thread write its history and end.
    pub async fn close(&mut self) {
        let (closed, _) = mpsc::channel(1);
        self.asks = closed;
        if let Some(thread) = self.thread.take() {
            // It waits for a question at most, and gets none.
            let _ = tokio::task::spawn_blocking(move || thread.join()).await;
        }
    }
}

fn serve_pipe(mut asked: mpsc::Receiver<(String, Reply)>) {
    let mut input = io::stdin().lock();
    while let Some((_, reply)) = asked.blocking_recv() {
        let mut bytes = Vec::new();
        let read = input
            .by_ref()
            .take(MAX_LINE_BYTES + 1)
            .read_until(b'\n', &mut bytes);
        let line = match read {
            Err(error) => Err(error).context("standard input cannot be read"),
            Ok(0) => Ok(Line::End),
            Ok(read) if read as u64 > MAX_LINE_BYTES => {
                Err(anyhow!("a line is longer than {MAX_LINE_BYTES} bytes"))
            }
            Ok(_) => match String::from_utf8(bytes) {
                Ok(text) => Ok(Line::Text(text.trim_end_matches(['\n', '\r']).to_owned())),
                Err(_) => Err(anyhow!("a line is not UTF-8")),
            },
        };
        // Who asked may have gone.
        let _ = reply.send(line);
    }
}

fn serve_terminal(mut asked: mpsc::Receiver<(String, Reply)>) {
    let mut editor = match editor() {
        Ok(editor) => editor,
        Err(error) => {
            if let Some((_, reply)) = asked.blocking_recv() {
                let _ = reply.send(Err(error));
            }
            return;
        }
    };
    let history = history_file();
    if let Some(file) = &history {
        // The first chat has no file yet.
        let _ = editor.load_history(file);
    }
    while let Some((prompt, reply)) = asked.blocking_recv() {
        let line = match editor.readline(prompt.as_str()) {
            Ok(text) => Ok(Line::Text(text)),
            Err(ReadlineError::Interrupted) => Ok(Line::Interrupted),
            Err(ReadlineError::Eof) => Ok(Line::End),
            Err(error) => Err(error).context("the terminal cannot be read"),
        };
        let _ = reply.send(line);
    }
    if let Some(file) = &history
        && let Err(error) = editor.save_history(file)
    {
        tracing::warn!(file = %file.display(), %error, "the history cannot be saved");
    }
}

fn editor() -> Result<Editor<Words, FileHistory>> {
    let config = Config::builder()
        .max_history_size(HISTORY_LINES)?
        .auto_add_history(true)
        .build();
    let mut editor = Editor::with_config(config).context("the terminal cannot be edited in")?;
    editor.set_helper(Some(Words));
    Ok(editor)
}

/// `$XDG_STATE_HOME/conclave/chat_history`, or in `~/.local/state`; `None` without a home.
fn history_file() -> Option<PathBuf> {
    let from = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let state = from("XDG_STATE_HOME").or_else(|| from("HOME").map(|home| home.join(".local/state")))?;
    let folder = state.join("conclave");
    fs::create_dir_all(&folder).ok()?;
    Some(folder.join("chat_history"))
}

/// Completes commands, and the names of settings after `/set`.
struct Words;

impl Completer for Words {
    type Candidate = String;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &rustyline::Context<'_>,
    ) -> rustyline::Result<(usize, Vec<String>)> {
        Ok(completions(&line[..position]))
    }
}

impl Hinter for Words {
    type Hint = String;
}

impl Highlighter for Words {}
impl Validator for Words {}
impl Helper for Words {}

/// Where the word begins, and what it may become.
fn completions(typed: &str) -> (usize, Vec<String>) {
    let (start, names): (usize, &[&str]) = match typed.strip_prefix("/set ") {
        Some(_) => (5, &options::NAMES),
        None if typed.starts_with('/') => (0, &command::NAMES),
        None => return (typed.len(), Vec::new()),
    };
    let matching = names.iter().filter(|name| name.starts_with(&typed[start..]));
    (start, matching.map(|name| format!("{name} ")).collect())
}

#[cfg(test)]
mod tests {
    use super::completions;

    #[test]
    fn commands_and_settings_are_completed() {
        assert_eq!(completions("/se"), (0, vec!["/set ".to_owned()]));
        assert_eq!(completions("/set tem"), (5, vec!["temperature ".to_owned()]));
        assert!(completions("/nothing").1.is_empty() && completions("set").1.is_empty());
    }
}
