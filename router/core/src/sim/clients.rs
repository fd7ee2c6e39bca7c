//! The simulated clients, and what they may see: every sequence gets exactly the tokens of a run without failures, each
//! once and in order, and ends exactly once, with the right reason.
//!
//! Proves invariants S2 and S4 of ARCHITECTURE.md.

use std::collections::BTreeMap;

use crate::api::{
    Command, Delivered, EndReason, Event, FinishReason, Logprobs, Rejection, SequenceId, Submit, Usage,
};
use crate::sim::model::{expected, logprobs, mask};

#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) submit: Submit,
    tokens: Vec<u32>,
    reason: FinishReason,
    delivered: usize,
    next_prompt_logprob: u32,
    pub(crate) ended_by: Option<EndReason>,
    pub(crate) outcome: Option<Outcome>,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    Finished(FinishReason, Usage),
    Rejected(Rejection),
}

#[derive(Debug, Default)]
pub(crate) struct Clients {
    all: BTreeMap<SequenceId, Client>,
    open: usize,
    pub(crate) drained: bool,
}

type Check<T> = Result<T, String>;

impl Clients {
    /// Notes a request that is submitted now; the events are it and its first mask.
    pub(crate) fn submit(&mut self, submit: Submit) -> Vec<Event> {
        let (tokens, reason) = expected(&submit);
        let client = Client {
            tokens,
            reason,
            delivered: 0,
            next_prompt_logprob: 1,
            ended_by: None,
            outcome: None,
            submit: submit.clone(),
        };
        let mask = client.mask();
        self.open += 1;
        let before = self.all.insert(submit.id, client);
        assert!(before.is_none(), "a sequence number is used once");
        std::iter::once(Event::Submit(submit)).chain(mask).collect()
    }

    /// The client goes away, unless it has all it wants.
    pub(crate) fn end(&mut self, id: SequenceId, reason: EndReason) -> Option<Event> {
        let client = self.all.get_mut(&id).filter(|client| client.outcome.is_none())?;
        client.ended_by = Some(reason);
        Some(Event::End { id, reason })
    }

    pub(crate) fn open(&self) -> usize {
        self.open
    }

    pub(crate) fn get(&self, id: SequenceId) -> &Client {
        &self.all[&id]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Client> {
        self.all.values()
    }

    /// Takes a command to a client and returns its answer: the next mask.
    pub(crate) fn take(&mut self, command: &Command) -> Check<Option<Event>> {
        let (Command::Deliver { id, .. }
        | Command::PromptLogprobs { id, .. }
        | Command::Finish { id, .. }
        | Command::Reject { id, .. }) = command
        else {
            self.drained |= *command == Command::Drained;
            return Ok(None);
        };
        let client = self
            .all
            .get_mut(id)
            .ok_or(format!("sequence {} was not submitted", id.0))?;
        if let Some(outcome) = &client.outcome {
            return Err(format!("sequence {} got {command:?} after {outcome:?}", id.0));
        }
        let answer = client
            .take(command)
            .map_err(|problem| format!("sequence {}: {problem}", id.0))?;
        self.open -= usize::from(client.outcome.is_some());
        Ok(answer)
    }
}

impl Client {
    fn take(&mut self, command: &Command) -> Check<Option<Event>> {
        match command {
            Command::Deliver { tokens, .. } => {
                tokens.iter().try_for_each(|token| self.deliver(token))?;
                return Ok(self.mask());
            }
            Command::PromptLogprobs {
                position, entries, ..
            } => self.prompt_logprobs(*position, entries)?,
            Command::Finish { reason, usage, .. } => {
                self.finish(reason, *usage)?;
                self.outcome = Some(Outcome::Finished(reason.clone(), *usage));
            }
            Command::Reject { error, .. } => {
                if self.delivered > 0 {
                    return Err("rejected after it was admitted".into());
                }
                self.outcome = Some(Outcome::Rejected(error.clone()));
            }
            _ => {}
        }
        Ok(None)
    }

    fn deliver(&mut self, delivered: &Delivered) -> Check<()> {
        let index = self.delivered;
        let wanted = self.tokens.get(index);
        if wanted != Some(&delivered.token) {
            return Err(format!(
                "new token {index} is {}, it should be {wanted:?}",
                delivered.token
            ));
        }
        let wanted = self
            .submit
            .sampling
            .logprobs
            .map(|_| logprobs(delivered.token, self.position()));
        if delivered.logprobs != wanted {
            return Err(format!(
                "log-probabilities {:?} at {index}, not {wanted:?}",
                delivered.logprobs
            ));
        }
        self.delivered += 1;
        Ok(())
    }

    fn prompt_logprobs(&mut self, position: u32, entries: &[Logprobs]) -> Check<()> {
        if self.submit.prompt_logprobs.is_none() || position != self.next_prompt_logprob {
            return Err(format!(
                "prompt log-probabilities from {position}, not {}",
                self.next_prompt_logprob
            ));
        }
        for entry in entries {
            let token = self.submit.prompt.get(self.next_prompt_logprob as usize).copied();
            let wanted = token.map(|token| logprobs(token, self.next_prompt_logprob));
            if Some(entry) != wanted.as_ref() {
                return Err(format!("prompt log-probability {entry:?}, not {wanted:?}"));
            }
            self.next_prompt_logprob += 1;
        }
        Ok(())
    }

    fn finish(&self, reason: &FinishReason, usage: Usage) -> Check<()> {
        let by_client = self.ended_by.is_some_and(|by| match by {
            EndReason::Stop => *reason == FinishReason::Stop(None),
            EndReason::Cancelled => *reason == FinishReason::Cancelled,
        });
        if !by_client {
            if *reason != self.reason || self.delivered != self.tokens.len() {
                let (got, all) = (self.delivered, self.tokens.len());
                return Err(format!(
                    "{reason:?} after {got} of {all} tokens, not {:?}",
                    self.reason
                ));
            }
            let all = self.submit.prompt.len() as u32;
            if self.submit.prompt_logprobs.is_some()
                && self.next_prompt_logprob < all
                && !self.tokens.is_empty()
            {
                return Err(format!(
                    "{} of {all} prompt log-probabilities",
                    self.next_prompt_logprob
                ));
            }
        }
        let generated = self.submit.generated.len() + self.delivered;
        if usage.prompt_tokens != self.submit.prompt.len() as u32
            || usage.generated_tokens != generated as u32
        {
            return Err(format!("usage {usage:?} with {generated} tokens generated"));
        }
        Ok(())
    }

    /// Position of the next token.
    fn position(&self) -> u32 {
        (self.submit.prompt.len() + self.submit.generated.len() + self.delivered) as u32
    }

    fn mask(&self) -> Option<Event> {
        let submit = &self.submit;
        let new = &self.tokens[..self.delivered];
        let tokens: Vec<u32> = submit
            .prompt
            .iter()
            .chain(&submit.generated)
            .chain(new)
            .copied()
            .collect();
        submit.masked.then(|| Event::Mask {
            id: submit.id,
            position: self.position(),
            mask: mask(&tokens),
        })
    }
}
