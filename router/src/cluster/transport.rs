//! Which transport an epoch's workers exchange tokens over: one that all of them can use. If there is none, the worker
//! that makes it so is refused when it attaches, with the reason and what to do.

use std::collections::HashMap;

use crate::sequencer::PeerIdentity;

/// All there are, best first.
const KNOWN: [&str; 4] = ["local", "ipc", "nccl", "tcp"];
/// Between GPUs.
const FAST: [&str; 2] = ["ipc", "nccl"];

/// Chooses for an epoch of these workers, or says why there is none. `asked` is `auto` or a transport's name.
///
/// `auto` takes `local` for one worker, then IPC within one host, then NCCL. TCP is chosen only where no worker has
/// anything faster: between GPUs it is an explicit choice.
pub fn choose<'a>(
    asked: &str,
    workers: impl ExactSizeIterator<Item = &'a PeerIdentity> + Clone,
) -> Result<&'static str, String> {
    if let Some(name) = KNOWN.into_iter().find(|&name| name == asked) {
        return match obstacle(name, workers) {
            None => Ok(name),
            Some(problem) => Err(format!("--transport {name} was asked for, but {problem}")),
        };
    }
    let mut problems = Vec::new();
    for name in KNOWN {
        let problem = match obstacle(name, workers.clone()) {
            None if name != "tcp" => return Ok(name),
            None if !workers.clone().any(has_faster) => return Ok(name),
            None => "there are GPUs, which use it only if it is asked for with --transport tcp".into(),
            Some(problem) => problem,
        };
        problems.push(format!("{name}: {problem}"));
    }
    Err(format!("the workers share no transport; {}", problems.join("; ")))
}

/// Why these workers cannot exchange tokens over `name`.
fn obstacle<'a>(
    name: &str,
    workers: impl ExactSizeIterator<Item = &'a PeerIdentity> + Clone,
) -> Option<String> {
    if name == "local" && workers.len() > 1 {
        return Some(format!("it serves one worker, there are {}", workers.len()));
    }
    if let Some(worker) = workers.clone().find(|worker| !speaks(worker, name)) {
        return Some(format!(
            "worker {} has only {}",
            worker.worker_id,
            worker.transports.join(", ")
        ));
    }
    match name {
        "ipc" => apart(workers),
        "nccl" => shared(workers),
        _ => None,
    }
}

/// Two workers that cannot map each other's memory.
fn apart<'a>(workers: impl Iterator<Item = &'a PeerIdentity> + Clone) -> Option<String> {
    let first = workers.clone().next()?;
    let other = workers
        .into_iter()
        .find(|worker| worker.host_id != first.host_id || worker.host_id.is_empty())?;
    Some(format!(
        "workers {} and {} are not on one host (or in containers that share neither PIDs nor IPC)",
        first.worker_id, other.worker_id
    ))
}

/// Two workers on one GPU.
fn shared<'a>(workers: impl Iterator<Item = &'a PeerIdentity>) -> Option<String> {
    let mut seen: HashMap<&str, &PeerIdentity> = HashMap::new();
    for worker in workers.filter(|worker| !worker.device_uuid.is_empty()) {
        if let Some(other) = seen.insert(&worker.device_uuid, worker) {
            return Some(format!(
                "workers {} and {} share GPU {}, which NCCL refuses; give each its own --device, or use ipc",
                other.worker_id, worker.worker_id, worker.device_uuid
            ));
        }
    }
    None
}

fn has_faster(worker: &PeerIdentity) -> bool {
    FAST.iter().any(|name| speaks(worker, name))
}

fn speaks(worker: &PeerIdentity, name: &str) -> bool {
    worker.transports.iter().any(|transport| transport == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(id: &str, host: &str, gpu: &str, transports: &[&str]) -> PeerIdentity {
        PeerIdentity {
            worker_id: id.into(),
            peer_address: "h:1".into(),
            transports: transports.iter().map(ToString::to_string).collect(),
            host_id: host.into(),
            device_uuid: gpu.into(),
        }
    }

    fn cpu(id: &str) -> PeerIdentity {
        worker(id, "a", "", &["local", "tcp"])
    }

    fn gpu(id: &str, host: &str, gpu: &str) -> PeerIdentity {
        worker(id, host, gpu, &["local", "tcp", "ipc", "nccl"])
    }

    fn auto(workers: &[PeerIdentity]) -> Result<&'static str, String> {
        choose("auto", workers.iter())
    }

    #[test]
    fn the_best_common_transport_is_chosen() {
        assert_eq!(auto(&[cpu("x")]), Ok("local"));
        assert_eq!(auto(&[cpu("x"), cpu("y")]), Ok("tcp"));
        assert_eq!(auto(&[gpu("x", "a", "0")]), Ok("local"));
        assert_eq!(auto(&[gpu("x", "a", "0"), gpu("y", "a", "1")]), Ok("ipc"));
        assert_eq!(auto(&[gpu("x", "a", "0"), gpu("y", "a", "0")]), Ok("ipc"));
        assert_eq!(auto(&[gpu("x", "a", "0"), gpu("y", "b", "1")]), Ok("nccl"));
        let no_ipc = |id, uuid| worker(id, "", uuid, &["local", "tcp", "nccl"]);
        assert_eq!(auto(&[no_ipc("x", "0"), no_ipc("y", "1")]), Ok("nccl"));
        let mixed = [gpu("x", "a", "0"), cpu("y")];
        assert_eq!(choose("tcp", mixed.iter()), Ok("tcp"));
        assert_eq!(
            choose("nccl", [gpu("x", "a", "0"), gpu("y", "a", "1")].iter()),
            Ok("nccl")
        );
    }

    #[test]
    fn without_a_common_transport_each_one_has_its_reason() {
        let problem = auto(&[gpu("x", "a", "0"), cpu("y")]).unwrap_err();
        for part in [
            "local: it serves one worker, there are 2",
            "ipc: worker y has only local, tcp",
            "nccl: worker y has only local, tcp",
            "--transport tcp",
        ] {
            assert!(problem.contains(part), "{problem}");
        }
        let refused = |asked: &str, workers: &[PeerIdentity], part: &str| {
            let problem = choose(asked, workers.iter()).unwrap_err();
            assert!(problem.contains(asked) && problem.contains(part), "{problem}");
        };
        refused(
            "nccl",
            &[gpu("x", "a", "0"), cpu("y")],
            "worker y has only local, tcp",
        );
        refused("nccl", &[gpu("x", "a", "0"), gpu("y", "a", "0")], "share GPU 0");
        refused(
            "ipc",
            &[gpu("x", "a", "0"), gpu("y", "b", "1")],
            "not on one host",
        );
        refused("ipc", &[gpu("x", "", "0"), gpu("y", "", "1")], "not on one host");
        refused("local", &[cpu("x"), cpu("y")], "it serves one worker");
        // Three on two hosts, two of them on one GPU.
        let three = [gpu("x", "a", "0"), gpu("y", "a", "0"), gpu("z", "b", "1")];
        let problem = auto(&three).unwrap_err();
        assert!(
            problem.contains("not on one host") && problem.contains("share GPU"),
            "{problem}"
        );
    }
}
