//! The set of routers: those configured, and those that a configured name's several addresses stand for.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::{Duration, Instant};

use conclave_proto::v1;
use tokio::task::JoinHandle;

use super::choose::{self, Candidate};
use super::link::{self, Link};
use super::prefix::{Fingerprints, PrefixTable, ROUTERS_MAX};

/// How often names are looked up again.
const RESOLVE_INTERVAL: Duration = Duration::from_secs(10);
const RESOLVE_TIMEOUT: Duration = Duration::from_secs(5);

pub(super) struct Pool {
    configured: Vec<String>,
    links: RwLock<Arc<[Arc<Link>]>>,
    fingerprints: Fingerprints,
    prefixes: Mutex<PrefixTable>,
    turn: AtomicUsize,
}

/// A router that a request may go to, and how much of its prompt would be new there.
pub(super) struct Choice {
    pub(super) link: Arc<Link>,
    pub(super) new_bytes: u64,
}

/// Where a request goes, in order of preference.
pub(super) struct Plan {
    pub(super) choices: Vec<Choice>,
    fingerprint: Option<super::prefix::Fingerprint>,
}

impl Pool {
    /// # Errors
    /// An address that is none, or too many of them.
    pub(super) fn new(configured: &[String]) -> anyhow::Result<Self> {
        anyhow::ensure!(!configured.is_empty(), "router: at least one address is needed");
        let names: BTreeSet<&String> = configured.iter().collect();
        anyhow::ensure!(
            names.len() <= ROUTERS_MAX,
            "router: {} addresses, at most {ROUTERS_MAX}",
            names.len()
        );
        // In the order given, each once.
        let mut links: Vec<Arc<Link>> = Vec::new();
        for address in configured {
            if links.iter().all(|link| link.address != *address) {
                let slot = links.len() as u8;
                links.push(Arc::new(Link::new(address, slot)?));
            }
        }
        Ok(Self {
            configured: configured.to_vec(),
            links: RwLock::new(links.into()),
            fingerprints: Fingerprints::default(),
            prefixes: Mutex::default(),
            turn: AtomicUsize::new(0),
        })
    }

    pub(super) fn links(&self) -> Arc<[Arc<Link>]> {
        self.links.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Routers for `request`, best first.
    pub(super) fn plan(&self, request: &v1::GenerateRequest) -> Plan {
        let links = self.links();
        if let [only] = &*links {
            return Plan {
                choices: vec![Choice {
                    link: only.clone(),
                    new_bytes: 0,
                }],
                fingerprint: None,
            };
        }
        let model = request.model.as_str();
        let mut serving: Vec<Arc<Link>> = links
            .iter()
            .filter(|link| model.is_empty() || link.may_serve(model))
            .cloned()
            .collect();
        if serving.is_empty() {
            // Nobody knows it: any router says so better than we could.
            serving = links.to_vec();
        }
        let fingerprint = self.fingerprints.of(request);
        let slots: Vec<u8> = serving.iter().map(|link| link.slot).collect();
        let matched = self.prefixes().matched(&fingerprint, &slots);
        let now = Instant::now();
        let candidates: Vec<Candidate> = serving
            .iter()
            .zip(&matched)
            .map(|(link, matched)| Candidate {
                tier: link.tier(),
                load: link.load(now),
                matched: *matched,
            })
            .collect();
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let choices = choose::order(&candidates, fingerprint.bytes, turn)
            .into_iter()
            .map(|at| Choice {
                link: serving[at].clone(),
                new_bytes: fingerprint.bytes.saturating_sub(matched[at]),
            })
            .collect();
        Plan {
            choices,
            fingerprint: Some(fingerprint),
        }
    }

    /// The request of `plan` goes to `link`.
    pub(super) fn sent(&self, plan: &Plan, link: &Link) {
        if let Some(fingerprint) = &plan.fingerprint {
            self.prefixes().insert(fingerprint, link.slot);
        }
    }

    fn prefixes(&self) -> std::sync::MutexGuard<'_, PrefixTable> {
        self.prefixes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Watches every router, and follows names whose addresses change, until dropped.
    pub(super) async fn watch(self: Arc<Self>) {
        let mut watched: Vec<(Arc<Link>, Watcher)> = Vec::new();
        loop {
            let links = self.links();
            watched.retain(|(link, _)| links.iter().any(|kept| Arc::ptr_eq(kept, link)));
            for link in links.iter() {
                if watched.iter().all(|(known, _)| !Arc::ptr_eq(known, link)) {
                    let pool = self.clone();
                    let forget = move |slot| pool.prefixes().forget(slot);
                    let task = tokio::spawn(link.clone().watch(forget));
                    watched.push((link.clone(), Watcher(task)));
                }
            }
            self.resolve().await;
            if Arc::ptr_eq(&links, &self.links()) {
                tokio::time::sleep(RESOLVE_INTERVAL).await;
            }
        }
    }

    /// Looks the configured names up and changes the links where their addresses changed.
    async fn resolve(&self) {
        let mut wanted: Vec<String> = Vec::new();
        for name in &self.configured {
            for address in addresses(name).await {
                if !wanted.contains(&address) {
                    wanted.push(address);
                }
            }
        }
        if wanted.len() > ROUTERS_MAX {
            tracing::warn!(
                found = wanted.len(),
                used = ROUTERS_MAX,
                "more routers than are served"
            );
            wanted.truncate(ROUTERS_MAX);
        }
        let links = self.links();
        if links.iter().map(|link| &link.address).eq(&wanted) {
            return;
        }
        let mut next: Vec<Arc<Link>> = links
            .iter()
            .filter(|link| wanted.contains(&link.address))
            .cloned()
            .collect();
        for address in &wanted {
            let free = (0..ROUTERS_MAX as u8).find(|slot| next.iter().all(|link| link.slot != *slot));
            let is_known = next.iter().any(|link| link.address == *address);
            let Some(slot) = free.filter(|_| !is_known) else {
                continue;
            };
            match Link::new(address, slot) {
                Ok(link) => {
                    self.prefixes().forget(slot);
                    next.push(Arc::new(link));
                }
                Err(error) => tracing::warn!(%error, "a router's address is no good"),
            }
        }
        next.sort_by_key(|link| wanted.iter().position(|address| *address == link.address));
        tracing::info!(routers = ?wanted, "routers found");
        *self.links.write().unwrap_or_else(PoisonError::into_inner) = next.into();
    }
}

/// Ends with its owner.
struct Watcher(JoinHandle<()>);

impl Drop for Watcher {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a configured address stands for: itself, unless it is a name with several addresses.
async fn addresses(configured: &str) -> Vec<String> {
    let itself = || vec![configured.to_owned()];
    let Ok(endpoint) = link::endpoint(configured) else {
        return itself();
    };
    let (Some(host), Some(port)) = (endpoint.uri().host(), endpoint.uri().port_u16()) else {
        return itself();
    };
    let lookup = tokio::net::lookup_host((host.trim_matches(['[', ']']), port));
    match tokio::time::timeout(RESOLVE_TIMEOUT, lookup).await {
        Ok(Ok(found)) => {
            let found: BTreeSet<String> = found.map(|address| address.to_string()).collect();
            if found.len() > 1 {
                found.into_iter().collect()
            } else {
                itself()
            }
        }
        // The name may come back: what is connected stays connected.
        _ => itself(),
    }
}
