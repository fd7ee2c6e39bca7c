//! A client of `conclave.v1` for tests that have no runtime of their own: typed calls, and calls of any bytes.

use std::time::Duration;

use conclave_proto::v1::conclave_client::ConclaveClient;
use conclave_proto::v1::{GenerateRequest, GenerateResponse};
use tokio::runtime::{Builder, Runtime};
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::codegen::{Bytes, http::uri::PathAndQuery};
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Status};

/// Bound of any one call, on a busy machine of two cores.
const CALL_WITHIN: Duration = Duration::from_secs(120);

/// Speaks to one router, one call at a time.
pub struct Grpc {
    runtime: Runtime,
    channel: Channel,
}

impl Grpc {
    /// `address` is `host:port`.
    pub fn connect(address: &str) -> Grpc {
        let runtime = Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        let endpoint = Endpoint::from_shared(format!("http://{address}"))
            .expect("an address")
            .timeout(CALL_WITHIN);
        let channel = runtime.block_on(endpoint.connect()).expect("the router answers");
        Grpc { runtime, channel }
    }

    /// Everything that a Generate call streams, or why it was refused or cut off.
    pub fn generate(&self, request: GenerateRequest) -> Result<Vec<GenerateResponse>, Status> {
        let mut client = ConclaveClient::new(self.channel.clone());
        self.runtime.block_on(async move {
            let mut stream = client.generate(request).await?.into_inner();
            let mut messages = Vec::new();
            while let Some(message) = stream.message().await? {
                messages.push(message);
            }
            Ok(messages)
        })
    }

    /// The messages that answer `bytes`, whatever they are, sent as the one message of a call to
    /// `/conclave.v1.Conclave/METHOD`.
    pub fn raw(&self, method: &str, bytes: &[u8]) -> Result<usize, Status> {
        let path: PathAndQuery = format!("/conclave.v1.Conclave/{method}").parse().expect("a path");
        let message = Bytes::copy_from_slice(bytes);
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        self.runtime.block_on(async move {
            client
                .ready()
                .await
                .map_err(|error| Status::unavailable(error.to_string()))?;
            let answer = client
                .server_streaming(Request::new(message), path, AnyBytes)
                .await?;
            let (mut stream, mut messages) = (answer.into_inner(), 0);
            while stream.message().await?.is_some() {
                messages += 1;
            }
            Ok(messages)
        })
    }
}

/// Messages as they are on the wire.
struct AnyBytes;

impl Codec for AnyBytes {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = AnyBytes;
    type Decoder = AnyBytes;

    fn encoder(&mut self) -> AnyBytes {
        AnyBytes
    }

    fn decoder(&mut self) -> AnyBytes {
        AnyBytes
    }
}

impl Encoder for AnyBytes {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put(to, item);
        Ok(())
    }
}

impl Decoder for AnyBytes {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        let length = bytes::Buf::remaining(from);
        Ok(Some(bytes::Buf::copy_to_bytes(from, length)))
    }
}
