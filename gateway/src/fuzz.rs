//! Seeded mutations of a corpus through every decoder, and random answers through every event writer; `conclave_fuzz`
//! says how long they run and how a failure is replayed.

use axum::response::Response;
use conclave_fuzz::{Random, is_replay, run};
use conclave_proto::v1;
use futures::StreamExt;
use http_body_util::BodyExt;

use crate::generate::CallEvents;
use crate::upstream::Event;
use crate::{anthropic, openai, responses};

fn corpus() -> Vec<Vec<u8>> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/corpus");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

/// What JSON and its readers trip over.
const PIECES: &[&str] = &[
    "null",
    "true",
    "-1",
    "0",
    "1e400",
    "-0.0",
    "9223372036854775808",
    "18446744073709551616",
    "1.5",
    "\"\"",
    "\"\\ud800\"",
    "\"\\u0000\"",
    "[]",
    "{}",
    "[[[[",
    "}}",
    "\"",
    "\\",
    ",",
    ":",
    "NaN",
    "\u{feff}",
    "\u{0}",
    "\"role\":",
    "\"type\":\"text\"",
    "\"content\":",
    "{\"type\":\"image_url\"}",
    "\"n\":1000000000,",
];

fn mutate(body: &mut Vec<u8>, others: &[Vec<u8>], random: &mut Random) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(body.len() + 1);
        match random.below(6) {
            0 if at < body.len() => body[at] = random.word() as u8,
            1 => drop(body.drain(at..(at + random.below(20)).min(body.len()))),
            2 => drop(body.splice(at..at, random.pick(PIECES).bytes())),
            3 => {
                // A value for another value.
                let end = body[at..]
                    .iter()
                    .position(|byte| b",}]".contains(byte))
                    .map_or(at, |found| at + found);
                body.splice(at..end, random.pick(PIECES).bytes());
            }
            4 => {
                let other = random.pick(others);
                let from = random.below(other.len());
                let piece = other[from..(from + random.below(200)).min(other.len())].to_vec();
                body.splice(at..at, piece);
            }
            _ => body.truncate(at),
        }
    }
}

#[test]
fn bodies_are_decoded_or_refused() {
    let corpus = corpus();
    let (mut taken, mut refused) = (0_u32, 0_u32);
    run("bodies_are_decoded_or_refused", 100, |random| {
        let mut body = random.pick(&corpus).clone();
        if random.below(50) > 0 {
            mutate(&mut body, &corpus, random);
        }
        for result in [
            openai::try_chat(&body),
            openai::try_completion(&body),
            anthropic::try_body(&body),
            responses::try_body(&body),
        ] {
            match result {
                Ok(()) => taken += 1,
                Err(error) => {
                    refused += 1;
                    assert!(
                        error.status.is_client_error() && !error.message.is_empty(),
                        "{error:?}"
                    );
                }
            }
        }
    });
    assert!(is_replay() || (taken > 0 && refused > 0), "{taken} {refused}");
}

/// Text with what writers of JSON and of events must escape.
const TEXTS: &[&str] = &[
    "",
    "a",
    "\n",
    "\n\ndata: x",
    "\r\n",
    "\"",
    "\\",
    "\u{0}",
    "\u{2028}",
    "é",
    "😀",
    "event: y\n\n",
    " ",
];

/// A random answer, with its reasoning, text and arguments.
fn answer(random: &mut Random) -> (Vec<Event>, [String; 3]) {
    let mut events = vec![Event::Started(v1::Started {
        model: "m".into(),
        ..Default::default()
    })];
    let mut said = [String::new(), String::new(), String::new()];
    let mut calls = 0;
    for _ in 0..random.below(12) {
        let mut delta = v1::Delta {
            token_ids: vec![1],
            ..Default::default()
        };
        match random.below(5) {
            0 => delta.reasoning = (*random.pick(TEXTS)).to_owned(),
            1 => delta.text = (*random.pick(TEXTS)).to_owned(),
            2 if calls > 0 || random.below(2) == 0 => {
                let is_new = calls == 0
                    || random.below(2) == 0
                    || !matches!(events.last(), Some(Event::Delta(last)) if !last.tool_calls.is_empty());
                calls += u32::from(is_new);
                let name = if is_new { "f" } else { "" };
                let arguments = (*random.pick(TEXTS)).to_owned();
                said[2].push_str(&arguments);
                delta.tool_calls = vec![v1::ToolCallDelta {
                    index: calls - 1,
                    id: name.into(),
                    name: name.into(),
                    arguments,
                }];
            }
            3 => {
                events.push(Event::KeepAlive(v1::KeepAlive::default()));
                continue;
            }
            _ => {}
        }
        said[0].push_str(&delta.reasoning);
        said[1].push_str(&delta.text);
        events.push(Event::Delta(delta));
    }
    events.push(Event::Finished(v1::Finished {
        reason: v1::FinishReason::Stop.into(),
        ..Default::default()
    }));
    events.push(Event::Usage(v1::Usage::default()));
    (events, said)
}

/// The JSON of every event of a stream; panics where a line is none.
async fn parse(response: Response) -> Vec<serde_json::Value> {
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    let text = std::str::from_utf8(&bytes).unwrap();
    assert!(text.ends_with("\n\n"), "{text:?}");
    let mut events = Vec::new();
    for event in text.trim_end_matches('\n').split("\n\n") {
        for line in event.split('\n') {
            match line.split_once(": ") {
                Some(("data", "[DONE]")) | Some(("event", _)) => {}
                Some(("data", json)) => events.push(serde_json::from_str(json).unwrap()),
                _ if line.starts_with(": keep-alive") => {}
                _ => panic!("not a line of an event: {line:?}"),
            }
        }
    }
    events
}

/// All strings at these pointers, joined.
fn gather(events: &[serde_json::Value], pointers: &[&str]) -> String {
    events
        .iter()
        .flat_map(|event| {
            pointers
                .iter()
                .filter_map(|pointer| event.pointer(pointer)?.as_str())
        })
        .collect()
}

/// Blank text between blocks is not shown by the APIs of blocks.
fn squeezed(text: &str) -> String {
    text.chars().filter(|char| !char.is_whitespace()).collect()
}

#[test]
fn whatever_is_said_is_written_as_it_was() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    run("whatever_is_said_is_written_as_it_was", 100, |random| {
        let (events, [reasoning, text, arguments]) = answer(random);
        let stream = || -> CallEvents {
            futures::stream::iter(events.clone().into_iter().map(|event| Ok((0, event)))).boxed()
        };
        runtime.block_on(async {
            let chat = parse(openai::chat_events(stream())).await;
            assert_eq!(gather(&chat, &["/choices/0/delta/content"]), text);
            assert_eq!(gather(&chat, &["/choices/0/delta/reasoning_content"]), reasoning);
            assert_eq!(
                gather(&chat, &["/choices/0/delta/tool_calls/0/function/arguments"]),
                arguments
            );
            let completion = parse(openai::completion_events(stream())).await;
            assert_eq!(gather(&completion, &["/choices/0/text"]), text);
            let messages = parse(anthropic::events(stream())).await;
            assert_eq!(squeezed(&gather(&messages, &["/delta/text"])), squeezed(&text));
            assert_eq!(gather(&messages, &["/delta/thinking"]), reasoning);
            assert_eq!(gather(&messages, &["/delta/partial_json"]), arguments);
            let items = parse(responses::events(stream())).await;
            let of = |kind: &str| {
                let same = |event: &&serde_json::Value| event["type"] == format!("response.{kind}.delta");
                items
                    .iter()
                    .filter(same)
                    .filter_map(|event| event["delta"].as_str())
                    .collect::<String>()
            };
            assert_eq!(squeezed(&of("output_text")), squeezed(&text));
            assert_eq!(of("reasoning_text"), reasoning);
            assert_eq!(of("function_call_arguments"), arguments);
        });
    });
}
