//! References to items of earlier answers. Clients that count on the store send them in place of the items.

use serde::Deserialize;

use super::conversation::wrong;
use super::input::{Input, ItemIn};
use crate::http::auth::Caller;
use crate::http::error::ApiResult;
use crate::server::App;

/// Puts each item in the place of its reference.
pub(super) fn resolve(input: &mut Input, app: &App, caller: Caller) -> ApiResult<()> {
    let Input::Items(items) = input else {
        return Ok(());
    };
    for (at, item) in items.iter_mut().enumerate() {
        if item.kind.as_deref() != Some("item_reference") {
            continue;
        }
        let id = item.id.as_deref().unwrap_or_default();
        *item = stored(id, app, caller).ok_or_else(|| {
            let problem = format!("{id:?} is of no response that is stored here: send the item itself");
            wrong(format!("input[{at}].id"), &problem)
        })?;
    }
    Ok(())
}

/// The item of this id, which names its response and its place there.
fn stored(id: &str, app: &App, caller: Caller) -> Option<ItemIn> {
    #[derive(Deserialize)]
    struct Stored {
        output: Vec<ItemIn>,
    }

    let mut words = id.split('_').skip(1);
    let (response, at) = (words.next()?, words.next()?.parse::<usize>().ok()?);
    let json = app.responses.json(&format!("resp_{response}"), caller)?;
    let stored: Stored = serde_json::from_slice(&json).ok()?;
    stored
        .output
        .into_iter()
        .nth(at)
        .filter(|item| item.id.as_deref() == Some(id))
}
