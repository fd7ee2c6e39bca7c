//! The id of an epoch's NCCL communicator: rank 0 draws it and tells the router, which tells the others.

use std::time::Duration;

use conclave_proto::cluster::v1 as wire;
use conclave_proto::cluster::v1::from_worker::Message;
use tokio::sync::oneshot;

use crate::device::Outbox;
use crate::transport::nccl::{self, CommunicatorId};
use crate::transport::tcp::ConnectError;

/// This rank's part: draws the id, or waits for it until `deadline`.
pub(super) async fn agree(
    (epoch, rank): (u64, u32),
    told: oneshot::Receiver<CommunicatorId>,
    outbox: &Outbox,
    deadline: Duration,
) -> Result<CommunicatorId, ConnectError> {
    if rank > 0 {
        return match tokio::time::timeout(deadline, told).await {
            Ok(Ok(id)) => Ok(id),
            Ok(Err(_)) | Err(_) => Err(ConnectError::NoCommunicator {
                milliseconds: deadline.as_millis(),
            }),
        };
    }
    // The library is loaded with it: up to a second the first time.
    let drawn = tokio::task::spawn_blocking(nccl::draw_id).await;
    let id = drawn
        .unwrap_or_else(|error| Err(error.to_string()))
        .map_err(ConnectError::Communicator)?;
    outbox.send(Message::CommunicatorId(wire::CommunicatorId {
        epoch,
        id: id.0.to_vec().into(),
    }));
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_rank_waits_for_the_id_and_no_longer_than_its_deadline() {
        let (outbox, _queue) = Outbox::new();
        let id = CommunicatorId([7; nccl::ID_BYTES]);
        let (tell, told) = oneshot::channel();
        tell.send(id).unwrap();
        let agreed = agree((1, 1), told, &outbox, Duration::from_secs(10)).await;
        assert_eq!(agreed.unwrap(), id);
        let (_tell, told) = oneshot::channel();
        let error = agree((1, 1), told, &outbox, Duration::from_millis(20))
            .await
            .unwrap_err();
        assert_eq!(error.suspect(), Some(0));
        assert!(error.to_string().contains("within 20 ms"), "{error}");
    }

    /// Rank 0 tells the router the very id that it uses, or says what it lacks.
    #[tokio::test]
    async fn rank_0_draws_the_id() {
        let (outbox, mut queue) = Outbox::new();
        let (_tell, told) = oneshot::channel();
        match agree((5, 0), told, &outbox, Duration::from_secs(10)).await {
            Ok(id) => {
                let Some(Message::CommunicatorId(said)) = queue.recv().await.unwrap().message else {
                    panic!("another message")
                };
                assert_eq!((said.epoch, &said.id[..]), (5, &id.0[..]));
            }
            Err(error) => assert!(error.to_string().contains("communicator"), "{error}"),
        }
    }
}
