//! gRPC `conclave.v1` as a client of a router.

use std::time::Duration;

use anyhow::{Context, Result};
use conclave_proto::v1::conclave_client::ConclaveClient;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Largest message taken from the router.
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Connects to a router's gRPC port, given as host:port or with a scheme.
pub async fn connect(router: &str) -> Result<ConclaveClient<Channel>> {
    let address = if router.contains("://") {
        router.to_owned()
    } else {
        format!("http://{router}")
    };
    let endpoint = Endpoint::from_shared(address)
        .with_context(|| format!("router is {router:?}: give host:port"))?
        .connect_timeout(CONNECT_TIMEOUT);
    let channel = endpoint.connect().await.with_context(|| {
        format!("no router answers at {router}; start one with `conclave serve`, or correct the address")
    })?;
    Ok(ConclaveClient::new(channel).max_decoding_message_size(MAX_MESSAGE_BYTES))
}

/// A router's status, for people.
pub fn refused(status: tonic::Status) -> anyhow::Error {
    let hint = match status.code() {
        // What tonic makes of an answer that is no gRPC, or of a service that is not there.
        Code::Internal | Code::Unimplemented => "; give the address that is printed as gRPC",
        _ => "",
    };
    anyhow::anyhow!(
        "the router answered {}: {}{hint}",
        status.code(),
        status.message()
    )
}
