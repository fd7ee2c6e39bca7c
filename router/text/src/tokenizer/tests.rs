use super::*;
use crate::testing::{data, demo};

#[test]
fn added_tokens_are_recognised_by_default_and_never_in_literal_text() {
    let tokenizer = Tokenizer::load(&demo()).unwrap();
    assert_eq!(tokenizer.encode("]~b]", false).unwrap(), [3070]);
    let literal = tokenizer.encode_literal("]~b]user <think>").unwrap();
    assert!(literal.iter().all(|&id| id < 3063));
    assert_eq!(tokenizer.decode(&literal, true).unwrap(), "]~b]user <think>");
}

#[test]
fn a_mark_breaks_only_the_token_it_touches() {
    let tokenizer = Tokenizer::load(&demo()).unwrap();
    let text = "]~b]user\n]~b]x[e~[";
    let second = text.rfind("]~b]").unwrap();
    let ids = tokenizer.encode_marked(text, &[second]).unwrap();
    assert_eq!(ids[0], 3070);
    assert_eq!(*ids.last().unwrap(), 3071);
    assert_eq!(ids.iter().filter(|&&id| id == 3070).count(), 1);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
}

#[test]
fn a_mark_that_touches_nothing_changes_nothing() {
    let tokenizer = Tokenizer::load(&demo()).unwrap();
    let text = "]~b]user\nhello, wörld 12345 {\"a\": [1]}[e~[\n]~b]ai\n<think>\n";
    let at = text.find("wörld").unwrap();
    assert_eq!(
        tokenizer.encode_marked(text, &[at]).unwrap(),
        tokenizer.encode(text, false).unwrap()
    );
}

#[test]
fn remembered_pieces_give_the_same_tokens() {
    let tokenizer = Tokenizer::load(&demo()).unwrap();
    let text = format!(
        "]~b]user\n{}[e~[\n]~b]ai\n<think>\nä 12 ",
        "some words 1234, ü! ".repeat(100)
    );
    let expect = tokenizer.encode(&text, false).unwrap();
    for _ in 0..2 {
        assert_eq!(tokenizer.encode_remembering(&text, &[], 7).unwrap(), expect);
        assert_eq!(tokenizer.encode_marked(&text, &[]).unwrap(), expect);
    }
}

#[test]
fn ids_beyond_the_tokenizer_decode_to_nothing() {
    let tokenizer = Tokenizer::load(&demo()).unwrap();
    assert_eq!(tokenizer.vocab_len(), 3072);
    assert_eq!(
        tokenizer.decode(&[72, 3072, u32::MAX, 73], true).unwrap().len(),
        2
    );
    assert!(tokenizer.token_bytes(3072).is_empty());
    assert!(tokenizer.token_bytes(u32::MAX).is_empty());
}

#[test]
fn text_beyond_the_bound_is_refused() {
    let tokenizer = Tokenizer::load(&demo()).unwrap();
    let error = tokenizer
        .encode(&"a".repeat(MAX_TEXT_BYTES + 1), false)
        .unwrap_err();
    assert_eq!(error.field(), Some("prompt"));
}

/// A tokenizer of MiniMax-M2's build: the released added tokens at their ids, its pre-tokenizer, single bytes for words.
fn minimax_shaped() -> Tokenizer {
    let released: serde_json::Value = serde_json::from_str(&data("text/special_tokens.json")).unwrap();
    let kept: Vec<&str> = released["not_flagged_special"]
        .as_array()
        .unwrap()
        .iter()
        .filter_map(|t| t.as_str())
        .collect();
    let mut added: Vec<(&str, u64)> = released["tokens"]
        .as_object()
        .unwrap()
        .iter()
        .map(|(token, id)| (token.as_str(), id.as_u64().unwrap()))
        .collect();
    added.sort_by_key(|(_, id)| *id);
    assert_eq!(added.len(), 54);
    let added: Vec<serde_json::Value> = added
        .iter()
        .map(|(content, id)| {
            serde_json::json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": !kept.contains(content)})
        })
        .collect();
    let demo: serde_json::Value = serde_json::from_str(&data("../../models/demo/tokenizer.json")).unwrap();
    let mut vocab = serde_json::Map::new();
    for (token, id) in demo["model"]["vocab"].as_object().unwrap() {
        if id.as_u64().unwrap() < 256 {
            vocab.insert(token.clone(), id.clone());
        }
    }
    for id in 256..200_000 {
        vocab.insert(format!("filler{id}"), id.into());
    }
    let words = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";
    let tokenizer = serde_json::json!({
        "version": "1.0", "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": false},
            {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false}]},
        "post_processor": null, "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": false},
        "model": {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": false}
    });
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("tokenizer.json"), tokenizer.to_string()).unwrap();
    Tokenizer::load(directory.path()).unwrap()
}

#[test]
fn a_tokenizer_of_minimax_m2s_build() {
    let tokenizer = minimax_shaped();
    assert!(tokenizer.is_byte_level());
    assert_eq!(tokenizer.vocab_len(), 200_054);
    // Each turn's beginning is one token, the role is text; the padding of the vocabulary has no tokens.
    assert_eq!(tokenizer.encode("]~b]system", false).unwrap()[0], 200_019);
    assert_eq!(tokenizer.encode("]~!b[]~b]", false).unwrap(), [200_034, 200_019]);
    assert!(
        tokenizer
            .encode("[PAD200063]", false)
            .unwrap()
            .iter()
            .all(|&id| id < 256)
    );
    let padding: Vec<u32> = (200_054..200_064).collect();
    assert_eq!(tokenizer.decode(&padding, false).unwrap(), "");
    // think and tool_call tokens are kept in text, turn marks are not.
    let text = "]~b]ai\n<think>\nWörter 12345 // x/\n</think>\n\n<minimax:tool_call>[e~[";
    let ids = tokenizer.encode(text, false).unwrap();
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
    assert_eq!(
        tokenizer.decode(&ids, true).unwrap(),
        text["]~b]".len()..text.len() - "[e~[".len()]
    );
    assert_eq!(tokenizer.encode_remembering(text, &[], 0).unwrap(), ids);
    let bytes: Vec<u8> = ids
        .iter()
        .flat_map(|&id| tokenizer.token_bytes(id))
        .copied()
        .collect();
    assert_eq!(bytes, text.as_bytes());
}

#[test]
fn an_id_beyond_reason_is_refused() {
    let json =
        r#"{"version":"1.0","added_tokens":[],"model":{"type":"BPE","vocab":{"a":4000000000},"merges":[]}}"#;
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join("tokenizer.json"), json).unwrap();
    let Err(error) = Tokenizer::load(directory.path()) else {
        panic!("loaded")
    };
    assert!(error.to_string().contains("4000000000"), "{error}");
}

#[test]
fn a_missing_or_broken_file_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let load = || Tokenizer::load(directory.path()).err().unwrap().to_string();
    assert!(load().contains("tokenizer.json"));
    std::fs::write(directory.path().join("tokenizer.json"), "{\"model\": 3}").unwrap();
    assert!(load().contains("tokenizer.json"));
}
