//! Completions: the forms of a prompt, `echo`, log-probabilities, `best_of`, streams over several prompts.

use conclave_proto::v1;
use conclave_proto::v1::FinishReason;
use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::generate_response::Event;
use serde_json::{Value, json};

use crate::router::{finished, hello, logprob, say, start, start_saying, started, text, usage};

const PATH: &str = "/v1/completions";

fn scored(index: u32, shown: &str, value: f32) -> Event {
    let entry = v1::TokenLogprobs {
        sampled: Some(logprob(4, shown.as_bytes(), value, 1)),
        ..Default::default()
    };
    Event::Delta(v1::Delta {
        index,
        text: shown.into(),
        token_ids: vec![4],
        logprobs: vec![entry],
        ..Default::default()
    })
}

#[tokio::test]
async fn a_whole_answer_has_openais_shape() {
    let setup = start_saying(hello()).await;
    let reply = setup
        .client
        .post(PATH, &json!({"model": "demo", "prompt": "hi"}))
        .await;
    let mut answer = reply.json();
    answer["id"] = json!("x");
    answer["created"] = json!(0);
    assert_eq!(
        answer,
        json!({
            "id": "x", "object": "text_completion", "created": 0, "model": "demo",
            "choices": [{"index": 0, "text": "Hello", "logprobs": null, "finish_reason": "stop", "stop_reason": null}],
            "service_tier": null, "system_fingerprint": null,
            "usage": {
                "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5,
                "prompt_tokens_details": {"cached_tokens": 1},
                "completion_tokens_details": {"reasoning_tokens": 0},
            },
        })
    );
}

#[tokio::test]
async fn max_tokens_defaults_to_sixteen_and_null_means_no_limit() {
    let setup = start_saying(hello()).await;
    for (body, expected) in [
        (json!({"prompt": "a"}), Some(16)),
        (json!({"prompt": "a", "max_tokens": null}), None),
        (json!({"prompt": "a", "max_tokens": -3}), Some(-3)),
    ] {
        setup.client.post(PATH, &body).await;
        let seen = setup.seen.generate.lock().unwrap().pop().unwrap();
        assert_eq!(seen.sampling.unwrap().max_tokens, expected, "{body}");
    }
}

#[tokio::test]
async fn each_prompt_of_a_list_is_a_call_and_keeps_its_place() {
    let setup = start(|request| {
        let Some(Prompt::TokenIds(ids)) = &request.prompt else {
            panic!("no ids")
        };
        let id = ids.ids[0];
        Ok(say(vec![
            started(&ids.ids),
            text(1, &format!("{id}b"), &[1]),
            text(0, &format!("{id}a"), &[1]),
            finished(0, FinishReason::Stop),
            finished(1, FinishReason::Stop),
            usage(1, 2, 0, 0),
        ]))
    })
    .await;
    let body = json!({"prompt": [[7], [8], [9]], "n": 2});
    let answer = setup.client.post(PATH, &body).await.json();
    let texts: Vec<_> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| choice["text"].clone())
        .collect();
    assert_eq!(texts, ["7a", "7b", "8a", "8b", "9a", "9b"]);
    assert_eq!(answer["usage"]["total_tokens"], 9);
    let streamed =
        json!({"prompt": [[7], [8], [9]], "n": 2, "stream": true, "stream_options": {"include_usage": true}});
    let chunks = setup.client.post(PATH, &streamed).await.chunks();
    let mut texts = vec![String::new(); 6];
    for choice in chunks.iter().filter_map(|chunk| chunk["choices"].get(0)) {
        let index = usize::try_from(choice["index"].as_u64().unwrap()).unwrap();
        texts[index].push_str(choice["text"].as_str().unwrap());
    }
    assert_eq!(texts, ["7a", "7b", "8a", "8b", "9a", "9b"]);
    assert_eq!(chunks.last().unwrap()["usage"]["total_tokens"], 9);
    let ids: Vec<_> = setup
        .seen
        .generate
        .lock()
        .unwrap()
        .iter()
        .map(|request| request.request_id.clone())
        .collect();
    assert!(ids[0].ends_with("-0") && ids[2].ends_with("-2"), "{ids:?}");
}

#[tokio::test]
async fn echo_puts_the_prompts_logprobs_before_the_answers() {
    let prompt_logprobs = vec![
        v1::TokenLogprobs::default(),
        v1::TokenLogprobs {
            sampled: Some(logprob(2, b"B", -2.0, 5)),
            top: vec![logprob(3, b"C", -0.1, 1)],
            text_offset: 1,
        },
    ];
    let generated = v1::TokenLogprobs {
        sampled: Some(logprob(4, b"D", -0.5, 1)),
        top: vec![logprob(4, b"D", -0.5, 1)],
        text_offset: 2,
    };
    let events = vec![
        Event::Started(v1::Started {
            model: "demo".into(),
            prompt_token_ids: vec![1, 2],
            prompt_logprobs,
            ..Default::default()
        }),
        text(0, "AB", &[]),
        Event::Delta(v1::Delta {
            text: "D".into(),
            token_ids: vec![4],
            logprobs: vec![generated],
            ..Default::default()
        }),
        finished(0, FinishReason::Length),
        usage(2, 1, 0, 0),
    ];
    let setup = start_saying(events).await;
    let body = json!({"prompt": [1, 2], "echo": true, "logprobs": 1, "max_tokens": 1, "prompt_logprobs": 1});
    let answer = setup.client.post(PATH, &body).await.json();
    assert_eq!(answer["choices"][0]["text"], "ABD");
    let expected = json!({
        "text_offset": [0, 1, 2],
        "token_logprobs": [null, -2.0, -0.5],
        "tokens": ["A", "B", "D"],
        "top_logprobs": [null, {"C": -0.1_f32, "B": -2.0}, {"D": -0.5}],
    });
    let got = &answer["choices"][0]["logprobs"];
    assert_eq!(got["token_logprobs"], expected["token_logprobs"]);
    assert_eq!(got["tokens"], expected["tokens"]);
    assert_eq!(got["text_offset"], expected["text_offset"]);
    assert_eq!(got["top_logprobs"][0], Value::Null);
    assert_eq!(got["top_logprobs"][1]["B"], -2.0);
    assert_eq!(got["top_logprobs"][2], json!({"D": -0.5}));
    let prompt = &answer["choices"][0]["prompt_logprobs"];
    assert_eq!((&prompt[0], &prompt[1]["2"]["rank"]), (&Value::Null, &json!(5)));
    let output = setup.seen.only().output.unwrap();
    assert_eq!(
        (output.echo, output.logprobs, output.prompt_logprobs),
        (true, Some(1), Some(1))
    );
    let streamed = json!({"prompt": [1, 2], "echo": true, "logprobs": 1, "stream": true});
    let chunks = setup.client.post(PATH, &streamed).await.chunks();
    assert_eq!(chunks[0]["choices"][0]["logprobs"]["tokens"], json!(["A", "B"]));
    assert_eq!(chunks[1]["choices"][0]["logprobs"]["tokens"], json!(["D"]));
}

#[tokio::test]
async fn best_of_returns_the_likeliest() {
    let events = vec![
        started(&[1]),
        scored(0, "bad", -3.0),
        scored(1, "best", -0.1),
        scored(2, "good", -1.0),
        finished(0, FinishReason::Stop),
        finished(1, FinishReason::Stop),
        finished(2, FinishReason::Stop),
        usage(1, 3, 0, 0),
    ];
    let setup = start_saying(events).await;
    let answer = setup
        .client
        .post(PATH, &json!({"prompt": "a", "n": 2, "best_of": 3}))
        .await
        .json();
    let shown: Vec<_> = answer["choices"]
        .as_array()
        .unwrap()
        .iter()
        .map(|choice| {
            (
                choice["index"].clone(),
                choice["text"].clone(),
                choice["logprobs"].clone(),
            )
        })
        .collect();
    assert_eq!(
        shown,
        [
            (json!(0), json!("best"), Value::Null),
            (json!(1), json!("good"), Value::Null)
        ]
    );
    let seen = setup.seen.only();
    assert_eq!((seen.n, seen.output.unwrap().logprobs), (3, Some(0)));
    for bad in [
        json!({"prompt": "a", "n": 3, "best_of": 2}),
        json!({"prompt": "a", "best_of": 2, "stream": true}),
    ] {
        assert_eq!(setup.client.post(PATH, &bad).await.error().2, "best_of");
    }
}

#[tokio::test]
async fn stop_reasons_are_shown() {
    let stopped = |reason: &str| {
        Event::Finished(v1::Finished {
            reason: FinishReason::Stop.into(),
            stop_reason: reason.into(),
            ..Default::default()
        })
    };
    // A number is a token, unless it is a stop string of the request.
    for (reason, stop, shown) in [
        ("", "x", Value::Null),
        ("END", "END", json!("END")),
        ("42", "END", json!(42)),
        ("42", "42", json!("42")),
        ("007", "007", json!("007")),
    ] {
        let setup = start_saying(vec![
            started(&[1]),
            text(0, "a", &[2]),
            stopped(reason),
            usage(1, 1, 0, 0),
        ])
        .await;
        let mut body = json!({"prompt": "a", "stop": ["y", stop]});
        let answer = setup.client.post(PATH, &body).await.json();
        assert_eq!(answer["choices"][0]["stop_reason"], shown);
        body["stream"] = json!(true);
        let chunks = setup.client.post(PATH, &body).await.chunks();
        assert_eq!(chunks.last().unwrap()["choices"][0]["stop_reason"], shown);
    }
}

#[tokio::test]
async fn echo_of_one_token_names_it_too() {
    let generated = v1::TokenLogprobs {
        sampled: Some(logprob(4, b"D", -0.5, 1)),
        top: vec![],
        text_offset: 2,
    };
    let events = vec![
        started(&[1]),
        Event::Delta(v1::Delta {
            text: "éAD".into(),
            token_ids: vec![4],
            logprobs: vec![generated],
            ..Default::default()
        }),
        finished(0, FinishReason::Length),
        usage(1, 1, 0, 0),
    ];
    let setup = start_saying(events).await;
    for stream in [false, true] {
        let body = json!({"prompt": [1], "echo": true, "logprobs": 0, "stream": stream});
        let reply = setup.client.post(PATH, &body).await;
        let answer = if stream {
            reply.chunks().remove(0)
        } else {
            reply.json()
        };
        let logprobs = &answer["choices"][0]["logprobs"];
        assert_eq!(
            (&logprobs["tokens"], &logprobs["token_logprobs"]),
            (&json!(["éA", "D"]), &json!([null, -0.5]))
        );
    }
}
