//! Bodies that are no JSON, odd ones that are, and what they are said to be.

use serde_json::{Value, json};

use crate::router::{hello, start_saying};

const TEXT: &str = "/v1/completions";

#[tokio::test]
async fn what_is_no_json_is_refused_without_a_field() {
    let setup = start_saying(hello()).await;
    let nested = |open: &str, close: &str| {
        let mut body = String::from("{\"prompt\":\"a\",\"x\":");
        body.push_str(&open.repeat(10_000));
        body.push_str(&close.repeat(10_000));
        body.push('}');
        body.into_bytes()
    };
    let cases: Vec<Vec<u8>> = vec![
        b"".to_vec(),
        b" ".to_vec(),
        b"\0".to_vec(),
        b"{".to_vec(),
        b"{}{}".to_vec(),
        b"{\"prompt\":\"a\",}".to_vec(),
        b"{'prompt':'a'}".to_vec(),
        b"prompt=a".to_vec(),
        b"\xef\xbb\xbf{\"prompt\":\"a\"}".to_vec(),
        b"\xff\xfe{\0}\0".to_vec(),
        b"{\"prompt\":\"\xff\"}".to_vec(),
        b"{\"prompt\":\"\xed\xa0\x80\"}".to_vec(),
        b"{\"prompt\":\"a\nb\"}".to_vec(),
        br#"{"prompt":"\ud800"}"#.to_vec(),
        br#"{"prompt":"\udc00\ud800"}"#.to_vec(),
        br#"{"prompt":"\u12"}"#.to_vec(),
        br#"{"prompt":"a","temperature":NaN}"#.to_vec(),
        br#"{"prompt":"a","temperature":Infinity}"#.to_vec(),
        br#"{"prompt":"a","temperature":1e400}"#.to_vec(),
        br#"{"prompt":"a","temperature":01}"#.to_vec(),
        br#"{"prompt":"a","temperature":.5}"#.to_vec(),
        nested("[", "]"),
        nested("{\"a\":", "}")
            .iter()
            .map(|byte| if *byte == b'}' { b'}' } else { *byte })
            .collect(),
    ];
    for body in &cases {
        let reply = setup.client.post_text(TEXT, body).await;
        let shown = String::from_utf8_lossy(&body[..body.len().min(60)]).into_owned();
        assert_eq!(reply.status, 400, "{shown:?}: {reply:?}");
        let (_, message, param, code) = reply.error();
        assert_eq!(
            (param, code),
            (Value::Null, json!("invalid_json")),
            "{shown:?}: {message}"
        );
    }
    for not_an_object in ["5", "null", "\"a\"", "[]", "true"] {
        let reply = setup.client.post_text(TEXT, not_an_object).await;
        assert_eq!(reply.status, 400, "{not_an_object}");
    }
    assert!(setup.seen.generate.lock().unwrap().is_empty());
}

#[tokio::test]
async fn odd_but_valid_bodies_pass() {
    let setup = start_saying(hello()).await;
    for body in [
        r#"{"prompt":"\u0000"}"#,
        r#"{"prompt":"\ud83d\ude00"}"#,
        r#"{"prompt":"a","temperature":-0}"#,
        r#"{"prompt":"a","temperature":1E-400}"#,
        r#"{"prompt":"a","unknown":{"a":1,"a":2}}"#,
        " \r\n\t{\"prompt\":\"a\"}\n ",
        r#"{"prompt":"a","n":null,"stream":null,"stop":null,"logit_bias":null,"stream_options":null,"suffix":""}"#,
    ] {
        let reply = setup.client.post_text(TEXT, body).await;
        assert_eq!(reply.status, 200, "{body}: {reply:?}");
    }
    for (content_type, status) in [
        ("application/json", 200),
        ("Application/JSON; charset=utf-8", 200),
        ("application/vnd.x+json", 200),
        ("", 200),
        ("text/plain", 415),
        ("application/x-www-form-urlencoded", 415),
        ("multipart/form-data; boundary=x", 415),
    ] {
        let reply = setup
            .client
            .post_as(TEXT, content_type, b"{\"prompt\":\"a\"}")
            .await;
        assert_eq!(reply.status, status, "{content_type}");
    }
}
