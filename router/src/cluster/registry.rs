//! Who may attach: the checks of a Hello, in a fixed order, each with its own status.
//!
//! Must stay true: no two attached workers share an id or a wanted rank, and all of them have the same checkpoint
//! and page size.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use conclave_plan::limits::MAX_RANKS;
use conclave_proto::cluster::v1::Hello;
use conclave_router_core::api::{WorkerId, WorkerInfo};
use subtle::ConstantTimeEq;
use tonic::Status;

use super::transport;
use crate::config::{MAX_BATCHED_TOKENS, MAX_NUM_SEQS};
use crate::sequencer::PeerIdentity;

/// Longest text field of a Hello.
const MAX_FIELD_BYTES: usize = 256;
/// Kinds of transport a worker may list.
const MAX_TRANSPORTS: usize = 8;
/// Most pages of one worker: page numbers stay far below 2^32.
const MAX_KV_PAGES: u32 = 1 << 28;

/// What the router demands of every worker.
pub struct Terms {
    pub cluster_token: String,
    pub page_tokens: u32,
    /// Tokens of the longest sequence that is served.
    pub max_model_len: u32,
    /// Unset: the first worker's counts.
    pub checkpoint_id: Option<String>,
    pub transport: String,
    /// Bytes of one expert over all layers; 0: not known.
    pub expert_bytes: u64,
}

struct Member {
    worker: WorkerId,
    wanted_rank: Option<u32>,
    identity: PeerIdentity,
    device: String,
    progress: (u64, u64),
}

#[derive(Default)]
struct Members {
    checkpoint_id: Option<String>,
    /// An epoch has been ready: what was delivered since depends on the checkpoint.
    pinned: bool,
    by_id: HashMap<Arc<str>, Member>,
}

impl Terms {
    /// Whether a worker is one of this cluster as it is now, by what its Hello says of itself.
    fn fit(&self, members: &Members, hello: &Hello) -> Result<(), Status> {
        if let Some(expected) = &members.checkpoint_id
            && *expected != hello.checkpoint_id
        {
            return Err(Status::failed_precondition(format!(
                "checkpoint_id = {}: this cluster serves {expected}; start the worker with the same checkpoint",
                hello.checkpoint_id
            )));
        }
        if members.by_id.contains_key(hello.worker_id.as_str()) {
            return Err(Status::already_exists(format!(
                "worker_id = {}: a worker with this id is attached; each worker draws its own at start",
                hello.worker_id
            )));
        }
        let taken = |member: &&Member| hello.rank.is_some() && member.wanted_rank == hello.rank;
        if let Some(member) = members.by_id.values().find(taken) {
            return Err(Status::already_exists(format!(
                "rank = {}: worker {} has asked for this rank; give each worker its own --rank, or none",
                hello.rank.unwrap_or_default(),
                member.identity.worker_id
            )));
        }
        if hello.page_tokens != self.page_tokens {
            return Err(Status::failed_precondition(format!(
                "page_tokens = {}: this cluster has pages of {} tokens; start the worker with the router's --block-size",
                hello.page_tokens, self.page_tokens
            )));
        }
        if hello.max_model_len < self.max_model_len {
            return Err(Status::failed_precondition(format!(
                "max_model_len = {}: this cluster serves sequences of up to {} tokens; start the worker with the router's \
                 --max-model-len",
                hello.max_model_len, self.max_model_len
            )));
        }
        Ok(())
    }
}

/// All attached workers.
pub struct Registry {
    terms: Terms,
    next: AtomicU64,
    members: Mutex<Members>,
}

/// A worker's place in the registry; given back when dropped.
pub struct Membership {
    pub worker: WorkerId,
    pub info: WorkerInfo,
    pub identity: PeerIdentity,
    registry: Arc<Registry>,
}

impl Registry {
    pub fn new(terms: Terms) -> Registry {
        let checkpoint_id = terms.checkpoint_id.clone();
        Registry {
            terms,
            next: AtomicU64::new(1),
            members: Mutex::new(Members {
                pinned: checkpoint_id.is_some(),
                checkpoint_id,
                by_id: HashMap::new(),
            }),
        }
    }

    /// Lets a worker in, or says why not.
    pub fn admit(self: &Arc<Registry>, hello: Hello) -> Result<Membership, Status> {
        let token = hello.cluster_token.as_bytes();
        if !bool::from(token.ct_eq(self.terms.cluster_token.as_bytes())) {
            return Err(Status::unauthenticated(
                "cluster_token: not this cluster's; start the worker with the router's --cluster-token",
            ));
        }
        check_version(&hello.version)?;
        check_fields(&hello)?;
        let identity = PeerIdentity {
            worker_id: hello.worker_id.as_str().into(),
            peer_address: hello.peer_address.as_str().into(),
            transports: hello.transports.clone().into(),
            host_id: hello.host_id.as_str().into(),
            device_uuid: hello.device_uuid.as_str().into(),
        };

        let mut members = self.lock();
        self.terms.fit(&members, &hello)?;
        let all: Vec<&PeerIdentity> = members
            .by_id
            .values()
            .map(|member| &member.identity)
            .chain([&identity])
            .collect();
        transport::choose(&self.terms.transport, all.into_iter())
            .map_err(|problem| Status::failed_precondition(format!("transports: {problem}")))?;

        let worker = WorkerId(self.next.fetch_add(1, Ordering::Relaxed));
        members.checkpoint_id.get_or_insert(hello.checkpoint_id);
        members.by_id.insert(
            identity.worker_id.clone(),
            Member {
                worker,
                wanted_rank: hello.rank,
                identity: identity.clone(),
                device: format!("{} {}", hello.device, hello.device_name),
                progress: (0, 0),
            },
        );
        let expert_capacity = (hello.expert_bytes_capacity > 0 && self.terms.expert_bytes > 0).then(|| {
            u32::try_from(hello.expert_bytes_capacity / self.terms.expert_bytes).unwrap_or(u32::MAX)
        });
        Ok(Membership {
            worker,
            info: WorkerInfo {
                kv_pages: hello.kv_pages,
                max_slots: hello.max_slots,
                max_batched_tokens: hello.max_batched_tokens,
                expert_capacity,
                wanted_rank: hello.rank,
            },
            identity,
            registry: self.clone(),
        })
    }

    /// The checkpoint served, once a worker has named it.
    pub fn checkpoint_id(&self) -> Option<String> {
        self.lock().checkpoint_id.clone()
    }

    /// From now on the checkpoint stays, even if all workers leave.
    pub fn pin_checkpoint(&self) {
        self.lock().pinned = true;
    }

    /// How far a worker is with loading.
    pub fn progress(&self, worker: WorkerId, done: u64, total: u64) {
        if let Some(member) = self.lock().by_id.values_mut().find(|m| m.worker == worker) {
            member.progress = (done, total);
        }
    }

    /// One line per worker, for health.
    pub fn describe(&self) -> String {
        let members = self.lock();
        let mut lines: Vec<String> = members
            .by_id
            .values()
            .map(|member| {
                let (done, total) = member.progress;
                let loading = if total > done {
                    format!(", loaded {}%", u128::from(done) * 100 / u128::from(total))
                } else {
                    String::new()
                };
                format!("{} ({}{loading})", member.identity.worker_id, member.device)
            })
            .collect();
        lines.sort_unstable();
        lines.join(", ")
    }

    fn lock(&self) -> MutexGuard<'_, Members> {
        // Every change is a single insert or remove, so a panic elsewhere leaves nothing half done.
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Membership {
    fn drop(&mut self) {
        let mut members = self.registry.lock();
        members.by_id.remove(&self.identity.worker_id);
        if members.by_id.is_empty() && !members.pinned {
            // A wrong first worker must not keep the right ones out.
            members.checkpoint_id = None;
        }
    }
}

/// Major and minor version must agree: steps have no version of their own.
fn check_version(theirs: &str) -> Result<(), Status> {
    let ours = env!("CARGO_PKG_VERSION");
    let line = |version: &str| version.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
    if line(theirs) == line(ours) {
        return Ok(());
    }
    Err(Status::failed_precondition(format!(
        "version = {}: the router is {ours}; run the same major and minor version everywhere",
        super::translate::clipped(theirs)
    )))
}

fn check_fields(hello: &Hello) -> Result<(), Status> {
    let texts = [
        ("worker_id", &hello.worker_id),
        ("peer_address", &hello.peer_address),
        ("checkpoint_id", &hello.checkpoint_id),
    ];
    for (field, value) in texts {
        if value.is_empty() || value.len() > MAX_FIELD_BYTES {
            return Err(Status::invalid_argument(format!(
                "{field}: {} bytes, must have 1 to {MAX_FIELD_BYTES}",
                value.len()
            )));
        }
    }
    let optional = [
        ("device", &hello.device),
        ("device_name", &hello.device_name),
        ("host_id", &hello.host_id),
        ("device_uuid", &hello.device_uuid),
    ];
    for (field, value) in optional {
        if value.len() > MAX_FIELD_BYTES {
            return Err(Status::invalid_argument(format!(
                "{field}: {} bytes, at most {MAX_FIELD_BYTES}",
                value.len()
            )));
        }
    }
    if hello.transports.len() > MAX_TRANSPORTS {
        return Err(Status::invalid_argument(format!(
            "transports: {} of them, at most {MAX_TRANSPORTS}",
            hello.transports.len()
        )));
    }
    let numbers = [
        ("kv_pages", hello.kv_pages, MAX_KV_PAGES),
        ("max_slots", hello.max_slots, MAX_NUM_SEQS),
        ("max_batched_tokens", hello.max_batched_tokens, MAX_BATCHED_TOKENS),
    ];
    for (field, value, most) in numbers {
        if value == 0 || value > most {
            return Err(Status::invalid_argument(format!(
                "{field} = {value}: must be between 1 and {most}"
            )));
        }
    }
    if hello.rank.is_some_and(|rank| rank >= MAX_RANKS) {
        return Err(Status::invalid_argument(format!(
            "rank: must be below {MAX_RANKS}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn registry() -> Arc<Registry> {
        Arc::new(Registry::new(Terms {
            cluster_token: "secret".into(),
            page_tokens: 16,
            max_model_len: 8,
            checkpoint_id: None,
            transport: "auto".into(),
            expert_bytes: 0,
        }))
    }

    #[test]
    fn progress_is_told_for_any_numbers_a_worker_says() {
        let registry = registry();
        let hello = Hello {
            worker_id: "w".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            device: "cpu".into(),
            device_name: "x".into(),
            peer_address: "h:1".into(),
            checkpoint_id: "c".into(),
            cluster_token: "secret".into(),
            kv_pages: 1,
            page_tokens: 16,
            max_slots: 1,
            max_batched_tokens: 1,
            max_model_len: 8,
            transports: vec!["local".into()],
            ..Default::default()
        };
        let member = registry.admit(hello).expect("a good Hello");
        for (done, total, told) in [
            (1, 4, "w (cpu x, loaded 25%)"),
            (u64::MAX - 1, u64::MAX, "w (cpu x, loaded 99%)"),
            (4, 4, "w (cpu x)"),
            (5, 4, "w (cpu x)"),
            (0, 0, "w (cpu x)"),
        ] {
            registry.progress(member.worker, done, total);
            assert_eq!(registry.describe(), told);
        }
    }
}
