//! `conclave chat`: a conversation in the terminal, over HTTP or gRPC.
//!
//! In a terminal lines are edited and remembered, and thinking is dimmed. When standard input is a pipe, every line is
//! a message, answers alone go to standard output, and the first call that fails ends the program with status 1.
//!
//! Must stay true: what the model has not answered is no part of the conversation, so that a failed or interrupted
//! call can be repeated; an interrupt during an answer cancels that answer and nothing else.

mod answer;
mod command;
mod conversation;
mod grpc;
mod http;
mod input;
mod options;
mod screen;
mod server;

use std::io::{self, IsTerminal};

use anyhow::{Context, Result};

use crate::settings::ChatSettings;
use answer::{Answer, Ended};
use command::{Command, HELP};
use conversation::{Conversation, Message, Tools};
use input::{Input, Line};
use options::Options;
use screen::Screen;
use server::Server;

/// Calls of tools that follow one another without a word of the user.
const MAX_TOOL_ROUNDS: usize = 20;

pub async fn run(settings: &ChatSettings) -> Result<()> {
    let conversation = Conversation::new(
        settings.system.clone(),
        settings.tools.as_deref().map(Tools::read).transpose()?,
    );
    let interactive = io::stdin().is_terminal();
    let server = Server::reach(settings).await?;
    let mut chat = Chat {
        options: Options::new(settings, server.model.clone()),
        screen: Screen::new(interactive),
        input: Input::new(interactive)?,
        interactive,
        server,
        conversation,
    };
    let ended = chat.converse().await;
    chat.input.close().await;
    chat.server.end().await?;
    ended
}

struct Chat {
    server: Server,
    conversation: Conversation,
    options: Options,
    screen: Screen,
    input: Input,
    interactive: bool,
}

impl Chat {
    async fn converse(&mut self) -> Result<()> {
        if self.interactive {
            self.screen.note(&format!(
                "{} at {}. /help lists the commands, Ctrl-D ends.",
                self.options.model_name(),
                self.server.place()
            ));
        }
        loop {
            match self.input.line("> ").await? {
                Line::End => return Ok(()),
                Line::Interrupted => self.screen.note("Ctrl-D ends"),
                Line::Text(line) if line.trim().is_empty() => {}
                Line::Text(line) => match Command::read(&line) {
                    Ok(Some(Command::Quit)) => return Ok(()),
                    Ok(Some(command)) => self.obey(command)?,
                    Ok(None) => self.ask(command::unescape(line)).await?,
                    Err(problem) => self.refuse(problem)?,
                },
            }
        }
    }

    /// What cannot be done ends a piped chat, and is told in a terminal.
    fn refuse(&self, problem: anyhow::Error) -> Result<()> {
        if self.interactive {
            self.screen.problem(&format!("{problem:#}"));
            return Ok(());
        }
        Err(problem)
    }

    fn obey(&mut self, command: Command) -> Result<()> {
        let done = match command {
            Command::Quit => Ok(None),
            Command::Help => Ok(Some(HELP.to_owned())),
            Command::Clear => {
                self.conversation.clear();
                Ok(Some("a new conversation".to_owned()))
            }
            Command::System(None) => Ok(Some(match self.conversation.system() {
                Some(system) => format!("system message: {system}"),
                None => "no system message".to_owned(),
            })),
            Command::System(Some(text)) => {
                self.conversation
                    .set_system(Some(text).filter(|text| text != "off"));
                Ok(Some("the system message holds from here on".to_owned()))
            }
            Command::ShowTools => Ok(Some(self.conversation.tools().describe())),
            Command::Tools(None) => {
                self.conversation.set_tools(Tools::default());
                Ok(Some("no tools".to_owned()))
            }
            Command::Tools(Some(file)) => Tools::read(&file).map(|tools| {
                let text = tools.describe();
                self.conversation.set_tools(tools);
                Some(text)
            }),
            Command::ShowOptions => Ok(Some(self.options.describe())),
            Command::Set(name, value) => self
                .options
                .set(&name, &value)
                .map(|()| Some(format!("{name} is {value}"))),
        };
        match done {
            Ok(None) => Ok(()),
            Ok(Some(text)) => {
                self.screen.note(&text);
                Ok(())
            }
            Err(problem) => self.refuse(problem),
        }
    }

    /// One message of the user, and answers until one makes no call.
    async fn ask(&mut self, text: String) -> Result<()> {
        let before = self.conversation.len();
        self.conversation.push(Message::User(text));
        for _ in 0..MAX_TOOL_ROUNDS {
            let answer = match self.answer().await {
                Ok(Some(answer)) => answer,
                Ok(None) => {
                    self.conversation.truncate(before);
                    self.screen
                        .note("interrupted; the question is no part of the conversation");
                    return Ok(());
                }
                Err(problem) => {
                    self.conversation.truncate(before);
                    return self.refuse(problem);
                }
            };
            let calls = answer.whole_calls();
            self.conversation.push(Message::Assistant(answer));
            if calls.is_empty() {
                return Ok(());
            }
            for call in calls {
                match self.input.line(&format!("result of {}> ", call.name)).await? {
                    Line::Text(result) => self.conversation.push(Message::Tool {
                        call_id: call.id,
                        result,
                    }),
                    Line::Interrupted | Line::End => {
                        self.conversation.truncate(before);
                        self.screen
                            .note("no result: the question is no part of the conversation");
                        return Ok(());
                    }
                }
            }
        }
        self.refuse(anyhow::anyhow!(
            "{MAX_TOOL_ROUNDS} rounds of tool calls for one question: say how to go on"
        ))
    }

    /// `None` if it was interrupted.
    async fn answer(&mut self) -> Result<Option<Answer>> {
        let mut stream = self.server.answer(&self.conversation, &self.options).await?;
        let mut answer = Answer::new();
        loop {
            let piece = tokio::select! {
                piece = stream.next() => piece,
                interrupted = tokio::signal::ctrl_c() => {
                    interrupted.context("interrupts cannot be watched")?;
                    self.screen.end_of_answer();
                    // Dropping the stream cancels the call.
                    return Ok(None);
                }
            };
            let piece = piece.inspect_err(|_| self.screen.end_of_answer())?;
            let Some(piece) = piece else { break };
            self.screen.piece(&piece, self.options.shows_thinking());
            answer.add(piece);
        }
        self.screen.end_of_answer();
        if self.interactive && self.options.shows_figures() {
            self.screen.note(&answer.figures());
        }
        match answer.ended {
            Ended::Length => self
                .screen
                .problem("the answer was cut at max_tokens or at the model's length"),
            Ended::Stop | Ended::ToolCalls => {}
        }
        Ok(Some(answer))
    }
}
