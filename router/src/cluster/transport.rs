//! Which transport an epoch's workers exchange tokens over: one that all of them speak.

use crate::sequencer::PeerIdentity;

/// Best first.
const PREFERENCE: [&str; 2] = ["ipc", "nccl"];

/// Chooses for an epoch of these workers, or says why there is none. `asked` is `auto` or a transport's name.
///
/// `auto` takes `local` for one worker, then IPC on one host, then NCCL. TCP is chosen only where no worker speaks
/// anything faster: between GPUs it is an explicit choice.
pub fn choose<'a>(
    asked: &str,
    workers: impl ExactSizeIterator<Item = &'a PeerIdentity> + Clone,
) -> Result<&'static str, String> {
    let all = |name: &str| workers.clone().all(|worker| speaks(worker, name));
    let known = ["local", "tcp", "ipc", "nccl"];
    if let Some(name) = known.into_iter().find(|&name| name == asked) {
        if name == "local" && workers.len() > 1 {
            return Err(format!(
                "transport local serves one worker, there are {}",
                workers.len()
            ));
        }
        return if all(name) {
            Ok(name)
        } else {
            Err(format!("not all workers speak the transport asked for, {name}"))
        };
    }
    if workers.len() == 1 && all("local") {
        return Ok("local");
    }
    let mut hosts = workers.clone().map(host);
    let first = hosts.next();
    let one_host = hosts.all(|host| Some(host) == first);
    for name in PREFERENCE {
        if all(name) && (name != "ipc" || one_host) {
            return Ok(name);
        }
    }
    let faster = |worker| PREFERENCE.iter().any(|name| speaks(worker, name));
    if all("tcp") && !workers.clone().any(faster) {
        return Ok("tcp");
    }
    Err("the workers share no transport; give one that all of them speak with --transport".into())
}

fn speaks(worker: &PeerIdentity, name: &str) -> bool {
    worker.transports.iter().any(|transport| transport == name)
}

fn host(worker: &PeerIdentity) -> &str {
    worker
        .peer_address
        .rsplit_once(':')
        .map_or(&*worker.peer_address, |(host, _)| host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn worker(address: &str, transports: &[&str]) -> PeerIdentity {
        PeerIdentity {
            worker_id: address.into(),
            peer_address: address.into(),
            transports: transports.iter().map(ToString::to_string).collect(),
        }
    }

    #[test]
    fn the_best_common_transport_is_chosen() {
        let cpu = |a| worker(a, &["local", "tcp"]);
        let gpu = |a| worker(a, &["local", "tcp", "ipc", "nccl"]);
        let choose_auto = |w: &[PeerIdentity]| choose("auto", w.iter());
        assert_eq!(choose_auto(&[cpu("a:1")]), Ok("local"));
        assert_eq!(choose_auto(&[cpu("a:1"), cpu("b:1")]), Ok("tcp"));
        assert_eq!(choose_auto(&[gpu("a:1"), gpu("a:2")]), Ok("ipc"));
        assert_eq!(choose_auto(&[gpu("a:1"), gpu("b:1")]), Ok("nccl"));
        assert!(choose_auto(&[gpu("a:1"), cpu("b:1")]).is_err());
        assert_eq!(choose("tcp", [gpu("a:1"), cpu("b:1")].iter()), Ok("tcp"));
        assert!(choose("nccl", [gpu("a:1"), cpu("b:1")].iter()).is_err());
        assert!(choose("local", [cpu("a:1"), cpu("b:1")].iter()).is_err());
    }
}
