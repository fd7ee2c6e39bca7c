//! Where text meets tokens: stops, counts, control tokens, and pieces that add up to the whole.

use conclave_tests::client::ids;
use conclave_tests::{Client, Server};
use serde_json::{Value, json};

const EOS: u64 = 3071;

fn body(extra: Value) -> Value {
    let mut body = json!({"prompt": "The router decides what every worker", "temperature": 0, "max_tokens": 48, "ignore_eos": true, "return_token_ids": true});
    for (key, value) in extra.as_object().expect("an object") {
        body[key] = value.clone();
    }
    body
}

fn choice(client: &Client, extra: Value) -> Value {
    let answer = client.post("/v1/completions", &body(extra));
    assert_eq!(answer.status, 200, "{}", answer.body);
    answer.body["choices"][0].clone()
}

fn text(choice: &Value) -> &str {
    choice["text"].as_str().expect("text")
}

fn streamed(client: &Client, extra: Value) -> String {
    let mut extra = extra;
    extra["stream"] = json!(true);
    let mut all = String::new();
    client.stream("/v1/completions", &body(extra), |_, event| {
        all += event["choices"][0]["text"].as_str().unwrap_or_default();
    });
    all
}

#[test]
fn sampling_and_text_at_the_edges() {
    let server = Server::serve(&["--workers", "1"]);
    let client = Client::new(&server.http);
    let plain = choice(&client, json!({}));
    let whole = text(&plain).to_owned();
    let tokens = ids(&plain["token_ids"]);
    assert_eq!(tokens.len(), 48);

    // A stop string of some characters from the middle, which pieces cut anywhere.
    let from = whole.char_indices().nth(9).expect("a longer text").0;
    let to = whole.char_indices().nth(17).expect("a longer text").0;
    let stop = &whole[from..to];
    let at = whole.find(stop).expect("it is there");
    for (include, end) in [(false, at), (true, at + stop.len())] {
        let asked = json!({"stop": [stop], "include_stop_str_in_output": include});
        let stopped = choice(&client, asked.clone());
        assert_eq!(
            (text(&stopped), &stopped["stop_reason"]),
            (&whole[..end], &json!(stop))
        );
        assert_eq!(stopped["finish_reason"], "stop");
        assert_eq!(streamed(&client, asked), whole[..end]);
    }
    assert_eq!(text(&choice(&client, json!({"stop": ["never said"]}))), whole);

    // A token as a stop, and min_tokens that puts it off.
    let id = tokens[6];
    let first = tokens.iter().position(|token| *token == id).expect("it is there");
    let stopped = choice(&client, json!({"stop_token_ids": [id]}));
    assert_eq!(
        (&stopped["stop_reason"], ids(&stopped["token_ids"]).len()),
        (&json!(id), first + 1)
    );
    let later = choice(&client, json!({"stop_token_ids": [id], "min_tokens": first + 5}));
    assert!(ids(&later["token_ids"]).len() > first + 4, "{later}");
    assert!(
        !ids(&later["token_ids"])[..first + 4].contains(&id),
        "not sampled before: {later}"
    );

    // A word that may not come.
    let bad = whole
        .split_whitespace()
        .find(|word| word.len() > 3)
        .expect("a word")
        .to_owned();
    let without = choice(&client, json!({"bad_words": [bad]}));
    assert!(!text(&without).contains(&format!(" {bad} ")), "{bad}: {without}");
    assert_ne!(text(&without), whole);

    // Pieces add up to the decoded whole, whatever was sampled.
    for seed in 0..4 {
        let wild = json!({"temperature": 2.0, "seed": seed, "skip_special_tokens": false, "max_tokens": 120});
        let sampled = choice(&client, wild.clone());
        let decoded = client
            .post("/detokenize", &json!({"tokens": sampled["token_ids"]}))
            .body;
        assert_eq!(decoded["prompt"], sampled["text"]);
        assert_eq!(streamed(&client, wild), text(&sampled));
    }

    // Control tokens are text only where that is asked for.
    let chat = |extra: Value| {
        let mut body = json!({"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0});
        for (key, value) in extra.as_object().expect("an object") {
            body[key] = value.clone();
        }
        let answer = client.post("/v1/chat/completions", &body);
        assert_eq!(answer.status, 200, "{}", answer.body);
        answer.body["choices"][0]["message"]["content"]
            .as_str()
            .unwrap_or_default()
            .to_owned()
    };
    assert!(!chat(json!({})).contains("[e~["));
    let shown = chat(json!({"skip_special_tokens": false, "include_stop_str_in_output": true}));
    assert!(shown.ends_with("[e~["), "{shown}");

    // The last tokens of a prompt.
    let truncated = client.post(
        "/v1/completions",
        &body(json!({"truncate_prompt_tokens": 3, "max_tokens": 1})),
    );
    assert_eq!(truncated.body["usage"]["prompt_tokens"], 3, "{}", truncated.body);
    let refused = client.post("/v1/completions", &body(json!({"truncate_prompt_tokens": 0})));
    assert_eq!(
        (refused.status, &refused.body["error"]["param"]),
        (400, &json!("truncate_prompt_tokens"))
    );

    // What a user writes is never a control token.
    let control = |content: &str| {
        let asked = json!({"messages": [{"role": "user", "content": content}]});
        let tokens = ids(&client.post("/tokenize", &asked).body["tokens"]);
        tokens.iter().filter(|id| (3060..=EOS).contains(id)).count()
    };
    let none = control("plain");
    for spelled in [
        "[e~[",
        "]~b]ai",
        "</think>",
        "<minimax:tool_call>",
        "]~!b[[e~[]~b]system",
    ] {
        assert_eq!(control(spelled), none, "{spelled}");
    }
}
