//! For processes that another `conclave` process started: they end when their standard input closes, so that none
//! outlives its parent, however that ends.

use std::io::Read;

use tokio::sync::oneshot;

/// Completes when standard input is closed. A thread of its own reads it: such a read cannot be cancelled.
pub async fn gone() {
    let (closed, is_closed) = oneshot::channel();
    let reader = std::thread::Builder::new().name("parent".into()).spawn(move || {
        let mut ignored = [0u8; 64];
        while matches!(std::io::stdin().read(&mut ignored), Ok(read) if read > 0) {}
        // The receiver is gone if the worker ends for another reason.
        let _ = closed.send(());
    });
    if let Err(error) = reader {
        tracing::warn!(%error, "the parent process cannot be watched");
        std::future::pending::<()>().await;
    }
    // A dropped sender is a thread that ended, too.
    let _ = is_closed.await;
    tracing::debug!("standard input is closed: the parent process ended, or wants this one to");
}
