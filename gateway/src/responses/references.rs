//! References to items of earlier answers. Clients that count on the store send them in place of the items.
//!
//! Each reads its own item and nothing else of the answer, which the store found when it kept it; what all of a
//! request bring in is bounded as a body is.

use http::StatusCode;

use super::conversation::wrong;
use super::input::{Input, ItemIn};
use super::store::Store;
use crate::http::auth::Caller;
use crate::http::error::{ApiError, ApiResult};

/// Puts each item in the place of its reference; together they may have `bytes_max` of JSON.
pub(super) fn resolve(input: &mut Input, store: &Store, caller: Caller, bytes_max: usize) -> ApiResult<()> {
    let Input::Items(items) = input else {
        return Ok(());
    };
    let mut bytes = 0;
    for (at, item) in items.iter_mut().enumerate() {
        if item.kind.as_deref() != Some("item_reference") {
            continue;
        }
        let id = item.id.as_deref().unwrap_or_default();
        let unknown = || {
            let problem = format!("{id:?} is of no response that is stored here: send the item itself");
            wrong(format!("input[{at}].id"), &problem)
        };
        let json = find(id, store, caller).ok_or_else(unknown)?;
        bytes += json.len();
        if bytes > bytes_max {
            return Err(too_large(at, bytes_max));
        }
        let named: ItemIn = serde_json::from_slice(&json).map_err(|_| unknown())?;
        if named.id.as_deref() != Some(id) {
            return Err(unknown());
        }
        *item = named;
    }
    Ok(())
}

/// The item of this id, which names its response and its place there.
fn find(id: &str, store: &Store, caller: Caller) -> Option<bytes::Bytes> {
    let mut words = id.split('_').skip(1);
    let (response, at) = (words.next()?, words.next()?.parse().ok()?);
    store.item(&format!("resp_{response}"), at, caller)
}

fn too_large(at: usize, bytes_max: usize) -> ApiError {
    let param = format!("input[{at}].id");
    let message = format!(
        "{param}: the items that references name are larger than {bytes_max} bytes together: \
         send previous_response_id"
    );
    ApiError {
        param: Some(param),
        ..ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, message).code("request_too_large")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::Limits;

    const OPEN: Caller = Caller::Anyone;
    const ITEM: &str = r#"{"type":"message","id":"msg_a_0","role":"assistant","content":"hi"}"#;

    fn store() -> Store {
        let store = Store::new(&Limits::default());
        let json = format!(r#"{{"id":"resp_a","output":[{ITEM}]}}"#);
        store.put("resp_a".into(), OPEN, None, Vec::new(), json.into());
        store
    }

    fn references(id: &str, count: usize) -> Input {
        let one = serde_json::json!({"type": "item_reference", "id": id});
        serde_json::from_value(vec![one; count].into()).unwrap()
    }

    #[test]
    fn what_references_bring_in_is_bounded() {
        let store = store();
        let limit = 3 * ITEM.len();
        let mut input = references("msg_a_0", 3);
        resolve(&mut input, &store, OPEN, limit).unwrap();
        let Input::Items(items) = input else {
            panic!("not items")
        };
        assert!(items.iter().all(|item| item.role.as_deref() == Some("assistant")));
        let error = resolve(&mut references("msg_a_0", 4), &store, OPEN, limit).unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.param.as_deref()),
            (413, Some("input[3].id"))
        );
    }

    #[test]
    fn an_id_that_is_no_items_is_refused() {
        let store = store();
        for id in [
            "",
            "msg",
            "msg_a",
            "msg_a_1",
            "msg_a_x",
            "fc_a_0",
            "msg_b_0",
            "msg_a_0_0",
        ] {
            let error = resolve(&mut references(id, 1), &store, OPEN, 9999).unwrap_err();
            assert_eq!(
                (error.status.as_u16(), error.param.as_deref()),
                (400, Some("input[0].id")),
                "{id}"
            );
        }
    }
}
