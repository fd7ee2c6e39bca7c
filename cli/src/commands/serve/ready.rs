//! The block that says: it serves, here, and this is how to try it. On standard output, once.

use std::net::SocketAddr;

pub struct Ready<'a> {
    pub model: &'a str,
    pub workers: u32,
    pub seconds: f64,
    pub http: SocketAddr,
    pub grpc: SocketAddr,
    pub needs_key: bool,
    pub tls: bool,
    /// No tokenizer: prompts are token ids.
    pub needs_ids: bool,
}

pub fn print(ready: &Ready<'_>) {
    println!("{}", render(ready));
}

fn render(ready: &Ready<'_>) -> String {
    let Ready {
        model,
        workers,
        seconds,
        http,
        grpc,
        ..
    } = ready;
    let plural = if *workers == 1 { "worker" } else { "workers" };
    let key = if ready.needs_key {
        " -H 'Authorization: Bearer YOUR_KEY'"
    } else {
        ""
    };
    let (path, body) = if ready.needs_ids {
        (
            "completions",
            r#"{"prompt":[1,2,3],"max_tokens":16,"return_token_ids":true}"#,
        )
    } else {
        (
            "chat/completions",
            r#"{"messages":[{"role":"user","content":"What is expert parallelism?"}]}"#,
        )
    };
    let chat = match ready {
        Ready { needs_ids: true, .. } => String::new(),
        // The gRPC port asks for no key and speaks no TLS.
        Ready { needs_key: true, .. } | Ready { tls: true, .. } => {
            format!("\n  or    conclave chat --url grpc://{grpc}")
        }
        _ => format!("\n  or    conclave chat --url http://{http}"),
    };
    format!(
        "conclave {version} serves {model} on {workers} {plural}, ready after {seconds:.1} s\n\
         \x20 HTTP  {scheme}://{http}\n\
         \x20 gRPC  http://{grpc}\n\
         \x20 try   curl {scheme}://{http}/v1/{path} -H 'Content-Type: application/json'{key} -d '{body}'{chat}",
        version = env!("CARGO_PKG_VERSION"),
        scheme = if ready.tls { "https" } else { "http" },
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_both_ports_and_a_command_to_try() {
        let address = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let mut ready = Ready {
            model: "demo",
            workers: 1,
            seconds: 0.84,
            http: address(8000),
            grpc: address(50051),
            needs_key: true,
            tls: false,
            needs_ids: false,
        };
        let text = render(&ready);
        assert!(
            text.contains("serves demo on 1 worker, ready after 0.8 s\n  HTTP  http://127.0.0.1:8000\n"),
            "{text}"
        );
        assert!(text.contains("\n  gRPC  http://127.0.0.1:50051\n"), "{text}");
        assert!(
            text.contains("/v1/chat/completions") && text.contains("Bearer YOUR_KEY"),
            "{text}"
        );
        assert!(
            text.ends_with("conclave chat --url grpc://127.0.0.1:50051"),
            "{text}"
        );
        ready.needs_key = false;
        assert!(render(&ready).ends_with("conclave chat --url http://127.0.0.1:8000"));
        ready.needs_ids = true;
        assert!(render(&ready).contains("/v1/completions"));
        ready.tls = true;
        assert!(render(&ready).contains("curl https://127.0.0.1:8000"));
    }
}
