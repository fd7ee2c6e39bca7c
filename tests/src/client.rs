//! A plain HTTP client of the OpenAI API: whole answers and event streams.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::{Value, json};

/// Bound of any one call, on a busy machine of two cores.
const CALL_WITHIN: Duration = Duration::from_secs(120);

/// Speaks to one server.
#[derive(Clone)]
pub struct Client {
    agent: ureq::Agent,
    base: String,
}

/// Status and JSON body.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub retry_after: Option<String>,
    pub body: Value,
}

impl Client {
    /// `address` is `host:port`.
    pub fn new(address: &str) -> Client {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(CALL_WITHIN))
            .http_status_as_error(false);
        Client {
            agent: config.build().into(),
            base: format!("http://{address}"),
        }
    }

    pub fn get(&self, path: &str) -> Answer {
        read(self.agent.get(format!("{}{path}", self.base)).call())
    }

    pub fn get_text(&self, path: &str) -> String {
        let mut response = self
            .agent
            .get(format!("{}{path}", self.base))
            .call()
            .expect("GET");
        response.body_mut().read_to_string().expect("a text body")
    }

    pub fn post(&self, path: &str, body: &Value) -> Answer {
        self.post_bytes(path, body.to_string().as_bytes())
    }

    /// Any bytes as a JSON body.
    pub fn post_bytes(&self, path: &str, body: &[u8]) -> Answer {
        let request = self
            .agent
            .post(format!("{}{path}", self.base))
            .header("content-type", "application/json");
        read(request.send(body))
    }

    /// A streamed call: the events' data, without the closing `[DONE]`; `each` sees every event as it comes.
    pub fn stream(&self, path: &str, body: &Value, mut each: impl FnMut(usize, &Value)) -> Vec<Value> {
        let request = self
            .agent
            .post(format!("{}{path}", self.base))
            .header("content-type", "application/json");
        let response = request.send(body.to_string().as_bytes()).expect("POST");
        assert_eq!(response.status(), 200, "{path} {body}");
        let mut events = Vec::new();
        for line in BufReader::new(response.into_body().into_reader()).lines() {
            let line = line.expect("the stream goes on until [DONE]");
            let Some(data) = line.strip_prefix("data: ") else {
                continue;
            };
            if data == "[DONE]" {
                return events;
            }
            let event: Value = serde_json::from_str(data).expect("an event is JSON");
            assert!(event.get("error").is_none(), "error event: {event}");
            each(events.len(), &event);
            events.push(event);
        }
        panic!("the stream ended without [DONE]");
    }

    /// Token ids of a greedy or seeded completion over prompt token ids or text.
    pub fn complete_ids(&self, body: Value) -> Vec<u64> {
        let mut body = body;
        body["return_token_ids"] = json!(true);
        let answer = self.post("/v1/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        ids(&answer.body["choices"][0]["token_ids"])
    }
}

/// Sends a request and leaves the answer unread, for as long as the socket is kept.
pub fn unread(address: &str, path: &str, body: &str) -> TcpStream {
    let mut socket = TcpStream::connect(address).expect("connect");
    let head = format!("POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n");
    write!(socket, "{head}content-length: {}\r\n\r\n{body}", body.len()).expect("send");
    socket
}

/// A JSON list of token ids.
pub fn ids(list: &Value) -> Vec<u64> {
    let list = list
        .as_array()
        .unwrap_or_else(|| panic!("no list of token ids but {list}"));
    list.iter().map(|id| id.as_u64().expect("a token id")).collect()
}

fn read(response: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Answer {
    let mut response = response.expect("an HTTP answer");
    let retry_after = response
        .headers()
        .get("retry-after")
        .and_then(|v| v.to_str().ok())
        .map(str::to_string);
    let status = response.status().as_u16();
    let text = response.body_mut().read_to_string().expect("a text body");
    let body = serde_json::from_str(&text).unwrap_or(Value::String(text));
    Answer {
        status,
        retry_after,
        body,
    }
}
