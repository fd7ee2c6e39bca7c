//! The two wire protocols of Conclave, generated from the `.proto` files beside this crate.
//!
//! `v1` is what clients speak to a router (and what the gateway translates HTTP into); `cluster::v1` is what
//! workers speak to it. Nothing here interprets a message: limits and meaning belong to the two ends.

/// Clients to router: text in, tokens and text out.
pub mod v1 {
    #![allow(clippy::all, reason = "generated code")]
    tonic::include_proto!("conclave.v1");
}

/// Workers to router: membership, epochs and steps.
pub mod cluster {
    /// Version 1 of the cluster protocol.
    pub mod v1 {
        #![allow(clippy::all, reason = "generated code")]
        tonic::include_proto!("conclave.cluster.v1");
    }
}

/// The serialized file descriptor set, for gRPC reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
