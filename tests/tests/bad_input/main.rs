//! Requests that are wrong, sent to a running cluster over HTTP and gRPC while healthy streams run beside them: each
//! gets an error that names its field, and no token of the others changes.
//!
//! Where the same is tested closer to the code: every field of the gateway's bodies and its limits in
//! `gateway/tests/gateway/{bad_input,not_json,errors,wire}.rs` (with `anthropic.rs` and `responses.rs` for their own fields),
//! fuzzed decoders in `gateway/src/fuzz.rs`; every field of a GenerateRequest, all pairs of sampling values and slow
//! readers at the router in `router/tests/limits.rs`; what a worker refuses in `worker/tests/{slots/main,peer_port}.rs`;
//! checkpoints in `worker/tests/checkpoint/main.rs`, configs in `plan/tests/config.rs`; templates, grammars and parsers in
//! `router/text`. Processes that must not start are in `bad_start.rs`, clients that leave in `vanishing.rs`.
//!
//! Proves invariant B2 of ARCHITECTURE.md.

mod cases;

use std::time::Duration;

use conclave_proto::v1::generate_request::Prompt;
use conclave_proto::v1::{GenerateRequest, SamplingParams, TokenIds};
use conclave_tests::client::unread;
use conclave_tests::metrics::wait_for;
use conclave_tests::{Client, Grpc, Healthy, Server};
use serde_json::json;
use tonic::Code;
use tonic_types::StatusExt as _;

use cases::{Case, TEXT, bodies, contents, numbers, ranges};

const HEALTHY_STREAMS: u64 = 8;

#[test]
fn wrong_bodies_are_refused_by_field_and_disturb_nobody() {
    let server = Server::serve(&["--workers", "2"]);
    let client = Client::new(&server.http);
    let healthy = Healthy::start(&client, HEALTHY_STREAMS);
    let cases: Vec<Case> = [numbers(), ranges(), bodies(), contents()]
        .into_iter()
        .flatten()
        .collect();
    assert!(cases.len() > 300, "{}", cases.len());
    for case in &cases {
        case.check(&client);
    }
    for odd in [
        r#"{"prompt":"\u0000","max_tokens":2}"#,
        r#"{"prompt":"a","temperature":-0.0,"max_tokens":2}"#,
    ] {
        assert_eq!(client.post_bytes(TEXT, odd.as_bytes()).status, 200, "{odd}");
    }
    healthy.finish();
    println!("{} bodies refused", cases.len());
}

fn request(sampling: SamplingParams) -> GenerateRequest {
    GenerateRequest {
        prompt: Some(Prompt::TokenIds(TokenIds { ids: vec![5, 6, 7] })),
        sampling: Some(sampling),
        ..GenerateRequest::default()
    }
}

/// Sampling on the real workers: the router's own test of all pairs has scripted ones.
#[test]
fn all_pairs_of_sampling_values_end_in_tokens_or_an_error_by_field() {
    type Set = fn(&mut SamplingParams, f32);
    let fields: [(&str, Set); 7] = [
        ("sampling.temperature", |s, v| s.temperature = Some(v)),
        ("sampling.top_p", |s, v| s.top_p = Some(v)),
        ("sampling.min_p", |s, v| s.min_p = Some(v)),
        ("sampling.repetition_penalty", |s, v| {
            s.repetition_penalty = Some(v)
        }),
        ("sampling.presence_penalty", |s, v| s.presence_penalty = Some(v)),
        ("sampling.frequency_penalty", |s, v| s.frequency_penalty = Some(v)),
        ("sampling.top_k", |s, v| s.top_k = Some(v as i32)),
    ];
    // Least, most and beyond of the several ranges; no numbers.
    let values = [
        0.0,
        f32::MIN_POSITIVE,
        1.0,
        2.0,
        100.0,
        -1.0,
        f32::MAX,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
    ];
    let server = Server::serve(&["--workers", "2"]);
    let grpc = Grpc::connect(&server.grpc);
    let healthy = Healthy::start(&Client::new(&server.http), 2);
    let (mut served, mut refused) = (0, 0);
    for (i, (first, set_first)) in fields.iter().enumerate() {
        for (second, set_second) in &fields[i + 1..] {
            for (a, b) in values.iter().flat_map(|&a| values.iter().map(move |&b| (a, b))) {
                let mut sampling = SamplingParams {
                    max_tokens: Some(2),
                    seed: Some(1),
                    ignore_eos: true,
                    ..SamplingParams::default()
                };
                set_first(&mut sampling, a);
                set_second(&mut sampling, b);
                match grpc.generate(request(sampling)) {
                    Ok(_) => served += 1,
                    Err(status) => {
                        let what = format!("{first} {a}, {second} {b}: {status:?}");
                        assert_eq!(status.code(), Code::InvalidArgument, "{what}");
                        let details = status.get_error_details();
                        let named = details
                            .bad_request()
                            .map(|bad| bad.field_violations[0].field.clone());
                        assert!(
                            named.is_some_and(|field| field == *first || field == *second),
                            "{what}"
                        );
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(
        served > 300 && refused > 300,
        "{served} served, {refused} refused"
    );
    healthy.finish();
}

/// A varint of the wire format.
fn varint(mut value: u64, to: &mut Vec<u8>) {
    while value >= 0x80 {
        to.push(value as u8 | 0x80);
        value >>= 7;
    }
    to.push(value as u8);
}

/// Field `number`, length-delimited.
fn delimited(number: u64, content: &[u8]) -> Vec<u8> {
    let mut message = Vec::new();
    varint(number << 3 | 2, &mut message);
    varint(content.len() as u64, &mut message);
    message.extend_from_slice(content);
    message
}

#[test]
fn malformed_proto_is_refused_and_disturbs_nobody() {
    let server = Server::serve(&["--workers", "2"]);
    let grpc = Grpc::connect(&server.grpc);
    let healthy = Healthy::start(&Client::new(&server.http), HEALTHY_STREAMS);
    // prompt.text = 3; sampling = 6 with max_tokens = 10 (zigzag of 2).
    let whole = [delimited(3, b"Hello there"), delimited(6, &[10 << 3, 4])].concat();
    assert!(grpc.raw("Generate", &whole).expect("a right message") >= 3);
    let mut wrong: Vec<Vec<u8>> = (1..whole.len())
        .filter(|&length| length != delimited(3, b"Hello there").len())
        .map(|length| whole[..length].to_vec())
        .collect();
    wrong.extend([
        vec![],
        vec![0xff; 64],
        // A length of 2^31 - 1, and one of 2^63.
        vec![3 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 7],
        vec![3 << 3 | 2, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f],
        // Field 0; a group that is never ended; text of another wire type; text that is no UTF-8.
        vec![2, 0],
        vec![3 << 3 | 3],
        vec![3 << 3, 5],
        delimited(3, b"\xff\xfe"),
    ]);
    for bytes in &wrong {
        let status = grpc.raw("Generate", bytes).expect_err("it is refused");
        let shown = format!("{:?}: {status:?}", &bytes[..bytes.len().min(24)]);
        assert!(
            matches!(status.code(), Code::InvalidArgument | Code::Internal),
            "{shown}"
        );
    }
    // Groups in groups deeper than decoders follow, and a message larger than the port takes.
    let deep = [0xa3, 0x06].repeat(101);
    assert!(grpc.raw("Generate", &deep).is_err());
    let large = delimited(3, &vec![b'a'; 64 << 20]);
    let status = grpc.raw("Generate", &large).expect_err("it is too large");
    assert!(
        matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted),
        "{status:?}"
    );
    assert_eq!(
        grpc.raw("NoSuchMethod", &whole).expect_err("unknown").code(),
        Code::Unimplemented
    );
    healthy.finish();
}

#[test]
fn a_full_queue_refuses_with_a_hint_over_both_apis() {
    let server = Server::serve(&["--workers", "1", "--max-num-seqs", "1", "--max-waiting", "2"]);
    let client = Client::new(&server.http);
    let long = json!({"prompt": "a", "max_tokens": 20000, "ignore_eos": true, "stream": true}).to_string();
    let within = Duration::from_secs(30);
    let open = || unread(&server.http, TEXT, &long);
    let mut held = vec![open()];
    wait_for(&client, "vllm:num_requests_running", within, |n| n == 1.0);
    held.extend([open(), open()]);
    wait_for(&client, "vllm:num_requests_waiting", within, |n| n == 2.0);
    let answer = client.post(TEXT, &json!({"prompt": "b", "max_tokens": 2}));
    assert_eq!(answer.status, 429, "{answer:?}");
    let wait: u64 = answer.retry_after.expect("Retry-After").parse().expect("seconds");
    assert!((1..=600).contains(&wait), "{wait}");
    let sampling = SamplingParams {
        max_tokens: Some(2),
        ..SamplingParams::default()
    };
    let status = Grpc::connect(&server.grpc)
        .generate(request(sampling))
        .expect_err("the queue is full");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    assert!(status.get_error_details().retry_info().is_some(), "{status:?}");
    drop(held);
    wait_for(&client, "vllm:num_requests_running", within, |n| n == 0.0);
    assert_eq!(
        client.post(TEXT, &json!({"prompt": "b", "max_tokens": 2})).status,
        200
    );
}
