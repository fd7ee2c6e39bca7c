//! A small HTTP/1.1 client over a raw socket, so that tests see the bytes.

use std::net::SocketAddr;
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Nothing in these tests takes longer, on a busy machine either, unless it hangs.
pub const PATIENCE: Duration = Duration::from_secs(120);

#[derive(Clone, Debug)]
pub struct Client {
    pub address: SocketAddr,
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Client {
    pub fn new(address: SocketAddr) -> Self {
        Self { address }
    }

    pub async fn connect(&self) -> TcpStream {
        TcpStream::connect(self.address).await.unwrap()
    }

    pub async fn get(&self, path: &str) -> Reply {
        self.send("GET", path, &[], b"").await
    }

    pub async fn post(&self, path: &str, body: &Value) -> Reply {
        self.send(
            "POST",
            path,
            &[("content-type", "application/json")],
            body.to_string().as_bytes(),
        )
        .await
    }

    /// One request on a connection of its own.
    pub async fn send(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Reply {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n");
        for (name, value) in headers {
            head.push_str(&format!("{name}: {value}\r\n"));
        }
        if !body.is_empty() || method == "POST" {
            head.push_str(&format!("content-length: {}\r\n", body.len()));
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body);
        self.raw(&bytes).await
    }

    /// A body as it stands, said to be of this type, or of none.
    pub async fn post_as(&self, path: &str, content_type: &str, body: impl AsRef<[u8]>) -> Reply {
        let headers = [("content-type", content_type)];
        let headers = if content_type.is_empty() {
            &[][..]
        } else {
            &headers
        };
        self.send("POST", path, headers, body.as_ref()).await
    }

    /// A body as it stands, said to be JSON.
    pub async fn post_text(&self, path: &str, body: impl AsRef<[u8]>) -> Reply {
        self.post_as(path, "application/json", body).await
    }

    /// Sends bytes as they are and reads the answer to the connection's end.
    pub async fn raw(&self, bytes: &[u8]) -> Reply {
        let mut stream = self.connect().await;
        // A server that refuses early may have closed already.
        let _ = stream.write_all(bytes).await;
        Reply::parse(&read_to_end(&mut stream).await)
    }
}

/// Everything until the peer closes; a reset counts as an end.
pub async fn read_to_end(stream: &mut TcpStream) -> Vec<u8> {
    let mut all = Vec::new();
    let reading = async {
        let mut piece = vec![0; 64 << 10];
        while let Ok(count) = stream.read(&mut piece).await {
            if count == 0 {
                break;
            }
            all.extend_from_slice(&piece[..count]);
        }
    };
    tokio::time::timeout(PATIENCE, reading)
        .await
        .expect("the connection should have ended");
    all
}

/// Reads until `needle` came.
pub async fn read_until(stream: &mut TcpStream, needle: &str) -> String {
    let mut all = Vec::new();
    let reading = async {
        let mut piece = vec![0; 64 << 10];
        while !String::from_utf8_lossy(&all).contains(needle) {
            let count = stream.read(&mut piece).await.unwrap();
            assert!(
                count > 0,
                "ended before {needle:?}: {}",
                String::from_utf8_lossy(&all)
            );
            all.extend_from_slice(&piece[..count]);
        }
    };
    tokio::time::timeout(PATIENCE, reading)
        .await
        .unwrap_or_else(|_| panic!("{needle:?} never came"));
    String::from_utf8_lossy(&all).into_owned()
}

impl Reply {
    pub fn parse(bytes: &[u8]) -> Self {
        let text = String::from_utf8_lossy(bytes);
        let (head, body) = text.split_once("\r\n\r\n").unwrap_or((&text, ""));
        let status = head
            .split(' ')
            .nth(1)
            .and_then(|status| status.parse().ok())
            .unwrap_or(0);
        let is_chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        let body = if is_chunked {
            dechunk(body)
        } else {
            body.to_owned()
        };
        Self {
            status,
            head: head.to_ascii_lowercase(),
            body,
        }
    }

    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head
            .lines()
            .find_map(|line| line.strip_prefix(name)?.strip_prefix(": "))
    }

    /// Name and JSON of every named event.
    pub fn named_events(&self) -> Vec<(String, Value)> {
        let named = |event: &str| {
            let (name, data) = event.strip_prefix("event: ")?.split_once("\ndata: ")?;
            Some((name.to_owned(), serde_json::from_str(data).unwrap()))
        };
        self.body.split("\n\n").filter_map(named).collect()
    }

    /// The text of every `data:` event.
    pub fn events(&self) -> Vec<String> {
        self.body
            .split("\n\n")
            .filter_map(|event| event.strip_prefix("data: "))
            .map(str::to_owned)
            .collect()
    }

    /// The JSON of every event; the last must be `[DONE]`.
    pub fn chunks(&self) -> Vec<Value> {
        let mut events = self.events();
        assert_eq!(events.pop().as_deref(), Some("[DONE]"), "{self:?}");
        events
            .iter()
            .map(|event| serde_json::from_str(event).unwrap())
            .collect()
    }

    /// Status and the error's message, param and code.
    pub fn error(&self) -> (u16, String, Value, Value) {
        let error = &self.json()["error"];
        let message = error["message"]
            .as_str()
            .unwrap_or_else(|| panic!("{self:?}"))
            .to_owned();
        assert!(error["type"].is_string(), "{self:?}");
        (
            self.status,
            message,
            error["param"].clone(),
            error["code"].clone(),
        )
    }
}

/// The chunks' text. A stream that was cut lacks the last chunk, which shows in [`is_whole`].
fn dechunk(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let Ok(size) = usize::from_str_radix(size.trim(), 16) else {
            break;
        };
        if size == 0 || rest.len() < size {
            break;
        }
        out.push_str(&rest[..size]);
        body = rest[size..].trim_start_matches("\r\n");
    }
    out
}
