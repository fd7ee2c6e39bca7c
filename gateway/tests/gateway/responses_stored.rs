//! Stored responses: continued, read, deleted, and whose they are.

use serde_json::{Value, json};

use crate::responses::{agentic, conversation, turn};
use crate::router::{hello, say, start_saying, start_with};

const PATH: &str = "/v1/responses";

#[tokio::test]
async fn a_response_can_be_continued_read_and_deleted() {
    let setup = start_saying(agentic()).await;
    let first = setup
        .client
        .post(PATH, &json!({"input": "hi", "instructions": "one"}))
        .await
        .json();
    let output = json!([{"type": "function_call_output", "call_id": "c1", "output": "2"}]);
    let body = json!({"input": output, "previous_response_id": first["id"], "instructions": "two"});
    let second = setup.client.post(PATH, &body).await.json();
    assert_eq!(second["previous_response_id"], first["id"]);
    assert_eq!(
        conversation(&setup),
        [
            turn("system", "two", "", 0),
            turn("user", "hi", "", 0),
            turn("assistant", "Calling.", "let me see", 1),
            turn("tool", "2", "", 0),
        ]
    );
    let third = json!({"input": "more", "previous_response_id": second["id"], "store": false});
    let third = setup.client.post(PATH, &third).await.json();
    assert_eq!(conversation(&setup).len(), 5);
    let path = |response: &Value| format!("{PATH}/{}", response["id"].as_str().unwrap());
    assert_eq!(setup.client.get(&path(&first)).await.json(), first);
    assert_eq!(setup.client.get(&path(&third)).await.status, 404);
    let deleted = setup.client.send("DELETE", &path(&first), &[], b"").await;
    assert_eq!(deleted.json()["deleted"], true);
    assert_eq!(
        setup.client.send("DELETE", &path(&first), &[], b"").await.status,
        404
    );
    // The chain does not break where a link's own entry is gone.
    setup
        .client
        .post(PATH, &json!({"input": "x", "previous_response_id": second["id"]}))
        .await;
    assert_eq!(conversation(&setup).len(), 5);
    let unknown = setup
        .client
        .post(PATH, &json!({"input": "x", "previous_response_id": first["id"]}))
        .await;
    assert_eq!(unknown.error().3, "previous_response_not_found");
}

#[tokio::test]
async fn one_keys_responses_are_not_anothers() {
    let keys = vec![String::from("one"), String::from("two")];
    let setup = start_with(|config| config.api_keys = keys, |_| Ok(say(hello()))).await;
    let post = async |key: &str, body: Value| {
        let headers = [("x-api-key", key), ("content-type", "application/json")];
        setup
            .client
            .send("POST", PATH, &headers, body.to_string().as_bytes())
            .await
    };
    let id = post("one", json!({"input": "hi"})).await.json()["id"].clone();
    let follow = json!({"input": "hi", "previous_response_id": id});
    assert_eq!(post("two", follow.clone()).await.status, 400);
    assert_eq!(post("one", follow).await.status, 200);
    let path = format!("{PATH}/{}", id.as_str().unwrap());
    assert_eq!(
        setup
            .client
            .send("DELETE", &path, &[("x-api-key", "two")], b"")
            .await
            .status,
        404
    );
    assert_eq!(
        setup
            .client
            .send("GET", &path, &[("x-api-key", "one")], b"")
            .await
            .status,
        200
    );
}

/// A client that chooses the ids of its requests does not choose under which ids responses are stored.
#[tokio::test]
async fn a_request_id_replaces_no_stored_response() {
    let keys = vec![String::from("one"), String::from("two")];
    let setup = start_with(|config| config.api_keys = keys, |_| Ok(say(hello()))).await;
    let mut ids = Vec::new();
    for key in ["one", "two", "one"] {
        let headers = [
            ("x-api-key", key),
            ("x-request-id", "same"),
            ("content-type", "application/json"),
        ];
        let reply = setup
            .client
            .send("POST", PATH, &headers, br#"{"input":"hi"}"#)
            .await;
        assert_eq!(reply.header("x-request-id"), Some("same"));
        ids.push((key, reply.json()["id"].as_str().unwrap().to_owned()));
    }
    for (key, id) in ids {
        let path = format!("{PATH}/{id}");
        let reply = setup.client.send("GET", &path, &[("x-api-key", key)], b"").await;
        assert_eq!(reply.status, 200, "{key}: {id}");
    }
}

#[tokio::test]
async fn the_store_makes_room() {
    let setup = start_with(|config| config.limits.responses_stored = 1, |_| Ok(say(hello()))).await;
    let first = setup.client.post(PATH, &json!({"input": "a"})).await.json();
    let second = setup.client.post(PATH, &json!({"input": "b"})).await.json();
    let status = async |response: &Value| {
        setup
            .client
            .get(&format!("{PATH}/{}", response["id"].as_str().unwrap()))
            .await
            .status
    };
    assert_eq!((status(&first).await, status(&second).await), (404, 200));
}

/// As Vercel's AI SDK goes on after a call, unless it is told to store nothing.
#[tokio::test]
async fn items_of_stored_answers_may_be_named_by_their_ids() {
    let setup = start_saying(agentic()).await;
    let answer = setup.client.post(PATH, &json!({"input": "hi"})).await.json();
    let output = answer["output"].as_array().unwrap();
    let named = output
        .iter()
        .map(|item| json!({"type": "item_reference", "id": item["id"]}));
    let mut input = vec![json!({"role": "user", "content": "hi"})];
    input.extend(named);
    let call = output.last().unwrap();
    input.push(json!({"type": "function_call_output", "call_id": call["call_id"], "output": "1"}));
    let reply = setup.client.post(PATH, &json!({"input": input})).await;
    assert_eq!(reply.status, 200, "{reply:?}");
    let items = [
        &[json!({"role": "user", "content": "hi"})],
        &output[..],
        &input[input.len() - 1..],
    ]
    .concat();
    let by_reference = conversation(&setup);
    setup.client.post(PATH, &json!({"input": items})).await;
    assert_eq!(conversation(&setup), by_reference);
}
