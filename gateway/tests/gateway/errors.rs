//! The router's errors as HTTP, and errors in the middle of a stream.

use std::time::Duration;

use conclave_proto::v1;
use conclave_proto::v1::FinishReason;
use conclave_proto::v1::generate_response::Event;
use serde_json::{Value, json};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::router::{Step, finished, hello, say, start, start_saying, start_with, started, text, usage};

const PATH: &str = "/v1/completions";

#[tokio::test]
async fn each_status_has_its_http_side() {
    for (status, http, kind, code) in [
        (
            Code::InvalidArgument,
            400,
            "invalid_request_error",
            "invalid_value",
        ),
        (
            Code::FailedPrecondition,
            400,
            "invalid_request_error",
            "invalid_value",
        ),
        (
            Code::OutOfRange,
            400,
            "invalid_request_error",
            "context_length_exceeded",
        ),
        (Code::NotFound, 404, "not_found_error", "model_not_found"),
        (
            Code::ResourceExhausted,
            429,
            "rate_limit_error",
            "rate_limit_exceeded",
        ),
        (
            Code::Unauthenticated,
            401,
            "authentication_error",
            "unauthenticated",
        ),
        (
            Code::PermissionDenied,
            403,
            "permission_error",
            "permission_denied",
        ),
        (Code::DeadlineExceeded, 504, "timeout_error", "request_timeout"),
        (Code::Unavailable, 503, "server_error", "service_unavailable"),
        (Code::Aborted, 503, "server_error", "service_unavailable"),
        (Code::Unimplemented, 501, "server_error", "not_implemented"),
        (Code::Internal, 500, "server_error", "internal_error"),
    ] {
        let setup = start(move |_| Err(Status::new(status, "because"))).await;
        for stream in [false, true] {
            let reply = setup
                .client
                .post(PATH, &json!({"prompt": "a", "stream": stream}))
                .await;
            let param = if http == 404 { json!("model") } else { Value::Null };
            let error = json!({"error": {"message": "because", "type": kind, "param": param, "code": code}});
            assert_eq!((reply.status, reply.json()), (http, error), "{status:?}");
            assert_eq!(
                reply.header("retry-after").is_some(),
                matches!(http, 429 | 503),
                "{status:?}"
            );
        }
    }
}

/// In the words that each API's clients look for.
#[tokio::test]
async fn a_request_that_is_too_long_is_told_in_each_apis_words() {
    for (prompt, asked, field, anthropic) in [
        (
            "5000",
            "10",
            "prompt",
            "prompt is too long: 5000 tokens > 4096 maximum",
        ),
        (
            "1000",
            "4000",
            "sampling.max_tokens",
            "input length and `max_tokens` exceed context limit: 1000 + 4000 > 4096, decrease input length or `max_tokens` \
             and try again",
        ),
    ] {
        let setup = start(move |_| {
            let mut details = ErrorDetails::with_bad_request_violation(field, "no");
            let numbers = [
                ("prompt_tokens", prompt),
                ("max_tokens", asked),
                ("limit", "4096"),
            ];
            let numbers = numbers.map(|(name, value)| (name.to_owned(), value.to_owned()));
            details.set_error_info("CONTEXT_LENGTH_EXCEEDED", "conclave", numbers);
            let message = format!("{field} = 1: too long");
            Err(Status::with_error_details(
                Code::InvalidArgument,
                message,
                details,
            ))
        })
        .await;
        let messages = json!([{"role": "user", "content": "a"}]);
        for stream in [false, true] {
            let body = json!({"messages": messages, "max_tokens": 10, "stream": stream});
            let reply = setup.client.post("/v1/chat/completions", &body).await;
            let word = match field {
                "prompt" => "messages",
                _ => "max_tokens",
            };
            let told = (
                400,
                format!("{word} = 1: too long"),
                json!(word),
                json!("context_length_exceeded"),
            );
            assert_eq!(reply.error(), told);
            let reply = setup.client.post("/v1/messages", &body).await;
            let error = json!({"type": "invalid_request_error", "message": anthropic});
            assert_eq!((reply.status, &reply.json()["error"]), (400, &error));
        }
    }
}

#[tokio::test]
async fn details_carry_the_field_the_reason_and_the_delay() {
    let refused = |field: &'static str| {
        start(move |_| {
            let details = ErrorDetails::with_bad_request_violation(field, "no");
            Err(Status::with_error_details(Code::InvalidArgument, "no", details))
        })
    };
    for (field, chat, param) in [
        ("sampling.temperature", false, "temperature"),
        ("sampling.max_tokens", true, "max_tokens"),
        ("output.logprobs", true, "top_logprobs"),
        ("output.logprobs", false, "logprobs"),
        ("text", false, "prompt"),
        ("token_ids.ids[3]", false, "prompt"),
        ("chat.messages[2].role", true, "messages[2].role"),
        ("chat.tools[0].function_json", true, "tools[0].function"),
        ("structured.json_schema", true, "response_format"),
        ("n", false, "n"),
    ] {
        let setup = refused(field).await;
        let reply = if chat {
            let body = json!({"messages": [{"role": "user", "content": "a"}], "response_format": {"type": "json_object"}});
            setup.client.post("/v1/chat/completions", &body).await
        } else {
            setup.client.post(PATH, &json!({"prompt": "a"})).await
        };
        assert_eq!(reply.error().2, param, "{field}");
    }
    let setup = start(|_| {
        let mut details = ErrorDetails::with_retry_info(Some(Duration::from_millis(2500)));
        details.set_error_info("QUEUE_FULL", "conclave", std::collections::HashMap::new());
        Err(Status::with_error_details(
            Code::ResourceExhausted,
            "the queue is full",
            details,
        ))
    })
    .await;
    let reply = setup.client.post(PATH, &json!({"prompt": "a"})).await;
    assert_eq!((reply.status, reply.header("retry-after")), (429, Some("3")));
    assert_eq!(reply.error().3, "queue_full");
}

#[tokio::test]
async fn an_error_in_the_middle_of_a_stream_is_an_event() {
    const UNSATISFIABLE: &str = "the request's own fault";
    let broken: Vec<(&str, Vec<Step>)> = vec![
        ("status", vec![Step::Fail(Status::internal("worker lost"))]),
        (
            "choice failed",
            say(vec![
                Event::Finished(v1::Finished {
                    reason: FinishReason::Error.into(),
                    error: "worker lost".into(),
                    ..Default::default()
                }),
                usage(1, 1, 0, 0),
            ]),
        ),
        (
            UNSATISFIABLE,
            say(vec![
                Event::Finished(v1::Finished {
                    reason: FinishReason::Unsatisfiable.into(),
                    error: "no token is allowed".into(),
                    ..Default::default()
                }),
                usage(1, 1, 0, 0),
            ]),
        ),
        (
            "cancelled",
            say(vec![finished(0, FinishReason::Cancelled), usage(1, 1, 0, 0)]),
        ),
        ("no usage", say(vec![finished(0, FinishReason::Stop)])),
        ("silent end", vec![]),
        ("stray choice", say(vec![text(7, "x", &[1]), usage(1, 1, 0, 0)])),
    ];
    for path in [PATH, "/v1/chat/completions"] {
        for (name, tail) in &broken {
            let tail = tail.clone();
            let setup = start(move |_| {
                let mut steps = say(vec![started(&[1]), text(0, "a", &[2])]);
                steps.extend(tail.clone());
                Ok(steps)
            })
            .await;
            let body = |stream: bool| json!({"prompt": "a", "messages": [{"role": "user", "content": "a"}], "stream": stream});
            let chunks = setup.client.post(path, &body(true)).await.chunks();
            let error = &chunks.last().unwrap()["error"];
            assert!(error["message"].is_string(), "{path} {name}: {chunks:?}");
            let whole = setup.client.post(path, &body(false)).await;
            if *name == UNSATISFIABLE {
                let told = (whole.status, &error["type"], &error["code"]);
                assert_eq!(
                    told,
                    (400, &json!("invalid_request_error"), &json!("unsatisfiable"))
                );
            } else {
                assert!(whole.status >= 500, "{path} {name}: {whole:?}");
            }
            assert_eq!(whole.json()["error"], *error, "{path} {name}");
        }
    }
}

#[tokio::test]
async fn a_tool_call_out_of_turn_is_an_error_not_a_panic() {
    let tool_calls = vec![v1::ToolCallDelta {
        index: 3,
        ..Default::default()
    }];
    let stray = Event::Delta(v1::Delta {
        tool_calls,
        ..Default::default()
    });
    let setup = start_saying(vec![
        started(&[1]),
        stray,
        finished(0, FinishReason::Stop),
        usage(1, 1, 0, 0),
    ])
    .await;
    let body = json!({"messages": [{"role": "user", "content": "a"}]});
    assert_eq!(setup.client.post("/v1/chat/completions", &body).await.status, 502);
}

#[tokio::test]
async fn a_router_that_is_not_there_is_503() {
    let setup = start_with(
        |config| config.routers = vec![String::from("http://127.0.0.1:1")],
        |_| Ok(vec![]),
    )
    .await;
    for (path, body) in [
        (PATH, json!({"prompt": "a"})),
        (PATH, json!({"prompt": "a", "stream": true})),
        ("/tokenize", json!({"prompt": "a"})),
    ] {
        let reply = setup.client.post(path, &body).await;
        assert_eq!(
            (reply.status, reply.error().3),
            (503, json!("service_unavailable")),
            "{path}"
        );
        assert!(reply.header("retry-after").is_some());
    }
    assert_eq!(setup.client.get("/v1/models").await.status, 503);
}

#[tokio::test]
async fn a_request_may_have_a_whole_time_limit() {
    let limited = async |limit| {
        start_with(
            move |config| config.limits.request_timeout = Some(limit),
            |_| Ok([say(vec![started(&[1]), text(0, "a", &[1])]), vec![Step::Hang]].concat()),
        )
        .await
    };
    let setup = limited(Duration::from_millis(300)).await;
    let whole = setup.client.post(PATH, &json!({"prompt": "a"})).await;
    assert_eq!((whole.status, whole.error().3), (504, json!("request_timeout")));
    // Time for the first piece, on a busy machine too.
    let setup = limited(Duration::from_secs(3)).await;
    let chunks = setup
        .client
        .post(PATH, &json!({"prompt": "a", "stream": true}))
        .await
        .chunks();
    assert_eq!(chunks[0]["choices"][0]["text"], "a");
    assert_eq!(chunks[1]["error"]["code"], "request_timeout");
}

#[tokio::test]
async fn an_answer_too_large_to_collect_is_refused() {
    let setup = start_with(|config| config.limits.response_bytes = 40, |_| Ok(say(hello()))).await;
    assert_eq!(setup.client.post(PATH, &json!({"prompt": "a"})).await.status, 200);
    let setup = start_with(|config| config.limits.response_bytes = 20, |_| Ok(say(hello()))).await;
    let reply = setup.client.post(PATH, &json!({"prompt": "a"})).await;
    assert_eq!(reply.error().3, "answer_too_large");
    let streamed = setup
        .client
        .post(PATH, &json!({"prompt": "a", "stream": true}))
        .await;
    assert_eq!(streamed.chunks().last().unwrap()["error"], Value::Null);
}
