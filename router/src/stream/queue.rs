//! What a client has not read yet: a queue of responses that merges deltas, so that a reader that is a little slow
//! gets fewer and larger messages, and one that does not read at all reaches a bound.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use conclave_proto::v1::generate_response::Event;
use conclave_proto::v1::{Delta, GenerateResponse};
use tonic::Status;

/// Tokens that a client may leave unread before its stream is ended.
pub const MAX_UNREAD_TOKENS: usize = 8192;

#[derive(Default)]
struct State {
    queue: VecDeque<Event>,
    /// Responses taken out so far: the number of the queue's first one.
    taken: u64,
    /// Number of the last delta of each choice, if nothing else of that choice came after it.
    last_delta: Vec<Option<u64>>,
    /// Nothing is handed out before this is set: the first response must be `Started`.
    open: bool,
    end: Option<Result<(), Status>>,
    waker: Option<Waker>,
    /// The client is gone: everything is dropped.
    gone: bool,
}

/// The queue between the text pool and a client's stream.
pub struct ResponseQueue {
    state: Mutex<State>,
}

impl ResponseQueue {
    pub fn new(choices: usize) -> ResponseQueue {
        ResponseQueue {
            state: Mutex::new(State {
                last_delta: vec![None; choices],
                ..State::default()
            }),
        }
    }

    /// Puts `Started` in front of everything and lets responses out.
    pub fn start(&self, started: Event) {
        let mut state = self.lock();
        if !state.open && !state.gone {
            state.queue.push_front(started);
            for last in state.last_delta.iter_mut().flatten() {
                *last += 1;
            }
            state.open = true;
            wake(&mut state);
        }
    }

    /// Appends text and tokens of a choice, to its last delta if that is still here.
    pub fn push_delta(&self, delta: Delta) {
        let mut guard = self.lock();
        let state = &mut *guard;
        if state.gone || state.end.is_some() {
            return;
        }
        let choice = delta.index as usize;
        let last = state.last_delta[choice]
            .and_then(|number| number.checked_sub(state.taken))
            .and_then(|place| state.queue.get_mut(usize::try_from(place).ok()?));
        if let Some(Event::Delta(last)) = last {
            merge(last, delta);
        } else {
            state.last_delta[choice] = Some(state.taken + state.queue.len() as u64);
            state.queue.push_back(Event::Delta(delta));
        }
        wake(state);
    }

    /// Appends anything else.
    pub fn push(&self, choice: Option<usize>, event: Event) {
        let mut state = self.lock();
        if state.gone || state.end.is_some() {
            return;
        }
        if let Some(choice) = choice {
            state.last_delta[choice] = None;
        }
        state.queue.push_back(event);
        wake(&mut state);
    }

    /// Nothing comes after this. An error is handed out after what is in the queue.
    pub fn end(&self, end: Result<(), Status>) {
        let mut state = self.lock();
        state.open = true;
        state.end.get_or_insert(end);
        wake(&mut state);
    }

    /// The client is gone: forget everything.
    pub fn close(&self) {
        let mut state = self.lock();
        state.gone = true;
        state.queue = VecDeque::new();
        state.waker = None;
    }

    pub fn poll_next(&self, cx: &mut Context<'_>) -> Poll<Option<Result<GenerateResponse, Status>>> {
        let mut state = self.lock();
        if state.open
            && let Some(event) = state.queue.pop_front()
        {
            state.taken += 1;
            return Poll::Ready(Some(Ok(GenerateResponse { event: Some(event) })));
        }
        if state.open
            && let Some(end) = &mut state.end
        {
            // An error is handed out once, then the stream is over.
            return Poll::Ready(std::mem::replace(end, Ok(())).err().map(Err));
        }
        state.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while it was held cannot leave the queue half changed.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn wake(state: &mut State) {
    if let Some(waker) = state.waker.take() {
        waker.wake();
    }
}

fn merge(into: &mut Delta, delta: Delta) {
    into.token_ids.extend(delta.token_ids);
    into.text.push_str(&delta.text);
    into.reasoning.push_str(&delta.reasoning);
    into.logprobs.extend(delta.logprobs);
    for call in delta.tool_calls {
        match into.tool_calls.last_mut() {
            Some(last) if last.index == call.index && call.id.is_empty() => {
                last.arguments.push_str(&call.arguments);
            }
            _ => into.tool_calls.push(call),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use conclave_proto::v1::{Finished, Started};

    fn delta(index: u32, token: u32, text: &str) -> Delta {
        Delta {
            index,
            token_ids: vec![token],
            text: text.into(),
            ..Default::default()
        }
    }

    fn drain(queue: &ResponseQueue) -> Vec<Event> {
        let mut cx = Context::from_waker(Waker::noop());
        let mut events = Vec::new();
        while let Poll::Ready(Some(Ok(response))) = queue.poll_next(&mut cx) {
            events.extend(response.event);
        }
        events
    }

    #[test]
    fn deltas_of_a_choice_merge_and_keep_their_order() {
        let queue = ResponseQueue::new(2);
        queue.push_delta(delta(0, 1, "a"));
        queue.push_delta(delta(1, 7, "x"));
        assert_eq!(drain(&queue), [], "held until started");
        queue.start(Event::Started(Started::default()));
        queue.push_delta(delta(0, 2, "b"));
        queue.push(Some(0), Event::Finished(Finished::default()));
        queue.push_delta(delta(1, 8, "y"));
        let events = drain(&queue);
        assert_eq!(events.len(), 4, "{events:?}");
        assert!(matches!(&events[0], Event::Started(_)));
        assert!(matches!(&events[1], Event::Delta(d) if d.token_ids == [1, 2] && d.text == "ab"));
        assert!(matches!(&events[2], Event::Delta(d) if d.token_ids == [7, 8] && d.text == "xy"));
        assert!(matches!(&events[3], Event::Finished(_)));
        queue.push_delta(delta(1, 9, "z"));
        assert!(
            matches!(&drain(&queue)[..], [Event::Delta(d)] if d.token_ids == [9]),
            "not merged into a sent one"
        );
    }

    #[test]
    fn an_error_comes_once_and_after_what_was_queued() {
        let queue = ResponseQueue::new(1);
        queue.start(Event::Started(Started::default()));
        queue.end(Err(Status::internal("x")));
        queue.push_delta(delta(0, 1, "late"));
        let mut cx = Context::from_waker(Waker::noop());
        assert!(matches!(queue.poll_next(&mut cx), Poll::Ready(Some(Ok(_)))));
        assert!(matches!(queue.poll_next(&mut cx), Poll::Ready(Some(Err(_)))));
        assert!(matches!(queue.poll_next(&mut cx), Poll::Ready(None)));
    }
}
