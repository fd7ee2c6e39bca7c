//! From a request's input to prompt tokens, and the calls that do only that. All of it runs on the text pool.

use std::sync::Arc;
use std::time::Instant;

use conclave_proto::v1 as pb;
use conclave_proto::v1::tokenize_request::Input as TokenizeInput;
use conclave_text::detokenize::Detokenizer;
use conclave_text::grammar::{Constraint, Grammar};
use conclave_text::output::OutputOptions;
use conclave_text::tokenizer::Tokenizer;
use conclave_text::{ChatOutput, Text, TextError};
use tonic::Status;

use super::validate::{self, Checked, Input};
use super::{Context, chat, errors};
use crate::stream::ChoiceText;

/// A prompt, ready to be submitted.
pub struct Prompt {
    pub tokens: Arc<[u32]>,
    /// Token sequences that may not appear.
    pub bad_words: Vec<Vec<u32>>,
    /// The prompt's text, if choices begin with it.
    echo: Option<Arc<str>>,
    /// How a chat's output is read; `None`: all of it is text.
    chat: Option<ChatOutput>,
    /// Where each token's text begins in the prompt's, in characters; empty without prompt log-probabilities.
    pub offsets: Vec<u32>,
    /// What the output is held to, with the mask of its first token.
    pub grammar: Option<(Grammar, Arc<[u8]>)>,
}

/// What the pool needs to know of a request.
struct Job {
    input: Input,
    bad_words: Vec<String>,
    truncate: Option<u32>,
    echo: bool,
    offsets: bool,
    skip_special_tokens: bool,
    structured: Option<Constraint>,
    salt: u64,
}

/// Does the text work of a request.
pub async fn prepare(context: &Arc<Context>, checked: &mut Checked, salt: u64) -> Result<Prompt, Status> {
    let job = Job {
        input: std::mem::replace(&mut checked.prompt, Input::Ids(Vec::new())),
        bad_words: std::mem::take(&mut checked.bad_words),
        truncate: checked.truncate,
        echo: checked.output.echo,
        offsets: checked.output.prompt_logprobs.is_some(),
        skip_special_tokens: checked.output.skip_special_tokens,
        structured: checked.structured.take(),
        salt,
    };
    let Some(text) = text(context) else {
        return job.without_text();
    };
    let (mut prompt, constraint) = context.pool.prompt(move || job.run(&text)).await?;
    if let Some(constraint) = constraint {
        let (chat, shared) = (prompt.chat.clone(), context.clone());
        let compile = move || compile(&shared, &constraint, chat.as_ref());
        prompt.grammar = Some(context.pool.grammar(compile).await?);
    }
    Ok(prompt)
}

/// A constraint's grammar, and the mask of the first token.
fn compile(
    context: &Context,
    constraint: &Constraint,
    chat: Option<&ChatOutput>,
) -> Result<(Grammar, Arc<[u8]>), Status> {
    let model = context
        .model
        .text
        .as_ref()
        .ok_or_else(|| no_tokenizer("structured"))?;
    let began = Instant::now();
    let compiled = model
        .compile(constraint, model.text.reasoning_end(chat))
        .and_then(|grammar| {
            let mask = grammar.matcher().mask()?;
            Ok((grammar, mask))
        });
    context
        .metrics
        .grammar_compile_time
        .observe(began.elapsed().as_secs_f64());
    compiled.map_err(|error| match error {
        TextError::Request { field, reason } if !field.starts_with("tool") => {
            errors::invalid_text(&format!("structured.{field}"), &reason)
        }
        other => text_error(other),
    })
}

impl Job {
    fn without_text(self) -> Result<Prompt, Status> {
        let Input::Ids(mut tokens) = self.input else {
            return Err(no_tokenizer("prompt"));
        };
        truncate(&mut tokens, self.truncate);
        Ok(Prompt {
            tokens: tokens.into(),
            bad_words: Vec::new(),
            echo: None,
            chat: None,
            offsets: Vec::new(),
            grammar: None,
        })
    }

    fn run(self, text: &Text) -> Result<(Prompt, Option<Constraint>), Status> {
        let tokenizer = text.tokenizer();
        let mut given = None;
        let mut output = None;
        let mut tokens = match self.input {
            Input::Ids(ids) => ids,
            Input::Text {
                text: prompt,
                add_special_tokens,
            } => {
                let ids = text
                    .encode_prompt(&prompt, add_special_tokens)
                    .map_err(text_error)?;
                given = Some(prompt);
                ids
            }
            Input::Chat(wire) => {
                let chat = chat::from_wire(wire)?;
                let rendered = text.render_chat_salted(&chat, self.salt).map_err(text_error)?;
                output = Some(rendered.output);
                rendered.ids
            }
        };
        if truncate(&mut tokens, self.truncate) {
            given = None;
        }
        let echo = match (self.echo, given) {
            (false, _) => None,
            (true, Some(prompt)) => Some(prompt),
            (true, None) => {
                let decoded = tokenizer.decode(&tokens, self.skip_special_tokens);
                Some(decoded.map_err(text_error)?)
            }
        };
        let constraint = text
            .constraint(output.as_ref(), self.structured)
            .map_err(text_error)?;
        let prompt = Prompt {
            bad_words: bad_words(tokenizer, &self.bad_words)?,
            offsets: if self.offsets {
                offsets(tokenizer, &tokens, self.skip_special_tokens)
            } else {
                Vec::new()
            },
            tokens: tokens.into(),
            echo: echo.map(Into::into),
            chat: output,
            grammar: None,
        };
        Ok((prompt, constraint))
    }
}

impl Prompt {
    /// How each choice's tokens become text; `None` for token ids only.
    pub fn choice_texts(
        &self,
        context: &Context,
        checked: &Checked,
    ) -> Result<Vec<Option<ChoiceText>>, Status> {
        let Some(text) = text(context).filter(|_| checked.output.text) else {
            return Ok((0..checked.n).map(|_| None).collect());
        };
        let options = OutputOptions {
            stop: checked.stop.clone(),
            include_stop_str_in_output: checked.output.include_stop,
            skip_special_tokens: checked.output.skip_special_tokens,
            stop_token_ids: checked.stop_tokens.clone(),
            min_tokens: checked.min_tokens,
        };
        (0..checked.n)
            .map(|index| {
                // Ids of tool calls: the same when the same request is run anew.
                let call_ids = super::generate::choice_seed(checked.seed, index);
                let output = text
                    .output(options.clone(), self.chat.as_ref(), call_ids)
                    .map_err(text_error)?;
                Ok(Some(ChoiceText {
                    output,
                    tokenizer: text.tokenizer().clone(),
                    echo: self.echo.clone(),
                    echo_alone: checked.output.echo_alone,
                }))
            })
            .collect()
    }
}

/// Text to token ids.
pub async fn tokenize(
    context: &Arc<Context>,
    request: pb::TokenizeRequest,
) -> Result<pb::TokenizeResponse, Status> {
    let text = text(context).ok_or_else(|| no_tokenizer("input"))?;
    let longest = context
        .model
        .text
        .as_ref()
        .and_then(|text| text.longest_prompt_bytes);
    let max_model_len = context.model.max_model_len;
    context
        .pool
        .prompt(move || {
            let (ids, rendered) = match request.input {
                None => return Err(errors::invalid("input", "unset", "give text or chat")),
                Some(TokenizeInput::Text(prompt)) => {
                    if let Some(longest) = longest.filter(|&longest| prompt.len() > longest) {
                        let problem =
                            format!("the model's length is {max_model_len} tokens, at most {longest} bytes");
                        return Err(errors::invalid(
                            "text",
                            format_args!("{} bytes", prompt.len()),
                            problem,
                        ));
                    }
                    let special = request.add_special_tokens.unwrap_or(true);
                    let ids = text.encode_prompt(&prompt, special).map_err(text_error)?;
                    (ids, String::new())
                }
                Some(TokenizeInput::Chat(wire)) => {
                    let chat = chat::from_wire(wire)?;
                    let rendered = text.render_chat(&chat).map_err(text_error)?;
                    (rendered.ids, rendered.text)
                }
            };
            let token_strs = if request.return_token_strs {
                let tokenizer = text.tokenizer();
                ids.iter()
                    .map(|&id| tokenizer.id_to_token(id).unwrap_or_default())
                    .collect()
            } else {
                Vec::new()
            };
            Ok(pb::TokenizeResponse {
                token_ids: ids,
                max_model_len,
                token_strs,
                text: rendered,
            })
        })
        .await
}

/// Token ids to text.
pub async fn detokenize(
    context: &Arc<Context>,
    request: pb::DetokenizeRequest,
) -> Result<pb::DetokenizeResponse, Status> {
    let text = text(context).ok_or_else(|| no_tokenizer("token_ids"))?;
    let mut violations = errors::Violations::default();
    validate::check_ids(&mut violations, "token_ids", &request.token_ids, &context.model);
    violations.finish()?;
    context
        .pool
        .prompt(move || {
            let text = text
                .tokenizer()
                .decode(&request.token_ids, false)
                .map_err(text_error)?;
            Ok(pb::DetokenizeResponse { text })
        })
        .await
}

/// Keeps the last tokens; true if some were dropped.
fn truncate(tokens: &mut Vec<u32>, keep: Option<u32>) -> bool {
    let surplus = keep.map_or(0, |keep| tokens.len().saturating_sub(keep as usize));
    tokens.drain(..surplus);
    surplus > 0
}

/// Each word as it is tokenized at a text's start and after a space, as in vLLM.
fn bad_words(tokenizer: &Tokenizer, words: &[String]) -> Result<Vec<Vec<u32>>, Status> {
    let mut sequences: Vec<Vec<u32>> = Vec::new();
    for word in words {
        for text in [word.clone(), format!(" {}", word.trim_start())] {
            let ids = tokenizer.encode_literal(&text).map_err(text_error)?;
            if !ids.is_empty() && !sequences.contains(&ids) {
                sequences.push(ids);
            }
        }
    }
    Ok(sequences)
}

fn offsets(tokenizer: &Arc<Tokenizer>, tokens: &[u32], skip_special_tokens: bool) -> Vec<u32> {
    let mut detokenizer = Detokenizer::new(tokenizer.clone(), skip_special_tokens);
    let mut text = String::new();
    tokens
        .iter()
        .map(|&token| {
            let offset = u32::try_from(detokenizer.chars()).unwrap_or(u32::MAX);
            text.clear();
            detokenizer.push(token, &mut text);
            offset
        })
        .collect()
}

fn text(context: &Context) -> Option<Arc<Text>> {
    context.model.text.as_ref().map(|model| model.text.clone())
}

fn no_tokenizer(field: &str) -> Status {
    errors::invalid(
        field,
        "text",
        "this router runs without a tokenizer (--skip-tokenizer-init); give token ids",
    )
}

/// What the text layer refuses is the client's fault; anything else is ours.
pub fn text_error(error: TextError) -> Status {
    match error {
        TextError::Request { field, reason } => errors::invalid_text(&field, &reason),
        TextError::Checkpoint { .. } => {
            tracing::error!(%error, "the text layer failed on a request");
            Status::internal("the model's text files failed on this request; the router's log says more")
        }
    }
}
