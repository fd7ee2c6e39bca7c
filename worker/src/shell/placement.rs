//! Checks an `EpochStart` before anything of it is used.

use std::time::Duration;

use conclave_plan::limits::{MAX_EXPERTS, MAX_LAYERS, MAX_RANKS};
use conclave_plan::model::ModelSpec;
use conclave_plan::placement::{LayerPlacement, Placement};
use conclave_proto::cluster::v1 as wire;

use crate::transport::tcp::{Group, PeerAddress};
use crate::transport::{MAX_COLLECTIVE_DEADLINE_MS, TransportKind};

const MAX_SECRET_BYTES: usize = 1024;
const MAX_ADDRESS_BYTES: usize = 512;

/// What an `EpochStart` asks for, checked.
pub(super) struct EpochRequest {
    pub(super) ranks: u32,
    pub(super) transport: TransportKind,
    pub(super) placement: Placement,
    pub(super) collective_deadline: Duration,
    pub(super) group: Group,
}

/// `Err`: the field and what is wrong with it.
pub(super) fn check(
    start: wire::EpochStart,
    spec: &ModelSpec,
    transports: &[String],
) -> Result<EpochRequest, String> {
    let mut ranks: Vec<u32> = start
        .peers
        .iter()
        .map(|peer| peer.rank)
        .chain([start.rank])
        .collect();
    ranks.sort_unstable();
    ranks.dedup();
    let count = ranks.len() as u32;
    if count > MAX_RANKS || !ranks.iter().copied().eq(0..count) {
        return Err(format!(
            "peers: with this rank, {}, they are not the ranks 0..{count}",
            start.rank
        ));
    }
    let named = start.peers.iter().filter(|peer| peer.rank != start.rank).count();
    if named as u32 != count - 1 {
        return Err("peers: a rank is named twice".into());
    }
    let offered = TransportKind::named(&start.transport)
        .filter(|kind| transports.iter().any(|name| name == kind.name()));
    let Some(transport) = offered else {
        return Err(format!(
            "transport: {:?}, this worker has {transports:?}",
            shortened(&start.transport)
        ));
    };
    if transport == TransportKind::Local && count > 1 {
        return Err(format!("transport: local is for one rank, there are {count}"));
    }
    if !(1..=MAX_COLLECTIVE_DEADLINE_MS).contains(&start.collective_deadline_ms) {
        let value = start.collective_deadline_ms;
        return Err(format!(
            "collective_deadline_ms: {value}, 1 to {MAX_COLLECTIVE_DEADLINE_MS} are allowed"
        ));
    }
    if start.peer_secret.len() > MAX_SECRET_BYTES {
        return Err(format!("peer_secret: longer than {MAX_SECRET_BYTES} bytes"));
    }
    if let Some(peer) = start
        .peers
        .iter()
        .find(|peer| peer.peer_address.len() > MAX_ADDRESS_BYTES)
    {
        return Err(format!(
            "peers: the address of rank {} is longer than {MAX_ADDRESS_BYTES} bytes",
            peer.rank
        ));
    }
    let placement = placement(start.placement.ok_or("placement: it is not set")?, count, spec)?;
    let peers = start.peers.into_iter().filter(|peer| peer.rank != start.rank);
    Ok(EpochRequest {
        ranks: count,
        transport,
        placement,
        collective_deadline: Duration::from_millis(start.collective_deadline_ms),
        group: Group {
            epoch: start.epoch,
            rank: start.rank,
            peers: peers
                .map(|peer| PeerAddress {
                    rank: peer.rank,
                    address: peer.peer_address,
                })
                .collect(),
            secret: start.peer_secret.to_vec(),
        },
    })
}

fn placement(message: wire::Placement, ranks: u32, spec: &ModelSpec) -> Result<Placement, String> {
    if message.layers.len() > MAX_LAYERS || message.experts as usize > MAX_EXPERTS {
        return Err(format!(
            "placement: {} layers of {} experts",
            message.layers.len(),
            message.experts
        ));
    }
    if let Some(layer) = spec
        .layers
        .iter()
        .position(|layer| layer.moe.experts != message.experts as usize)
    {
        let experts = spec.layers[layer].moe.experts;
        return Err(format!(
            "placement: {} experts, layer {layer} has {experts}",
            message.experts
        ));
    }
    let owners = |layer: wire::LayerPlacement| LayerPlacement {
        owners: layer.owners.into_iter().map(|owners| owners.ranks).collect(),
    };
    let placement = Placement {
        ranks,
        experts: message.experts,
        layers: message.layers.into_iter().map(owners).collect(),
    };
    placement
        .check(spec.layers.len())
        .map_err(|error| error.to_string())?;
    Ok(placement)
}

fn shortened(text: &str) -> String {
    text.chars().take(40).collect()
}
