//! What connects the ranks of an epoch: one [`Fabric`] per implementation.

use std::time::Duration;

use conclave_worker::transport::routing::Routes;
use conclave_worker::transport::tcp::{self, Group, PeerAddress, TcpTransport};
use conclave_worker::transport::{Abort, LocalTransport, Transport};

use crate::rank::CAPACITY;

/// Connects the ranks of an epoch.
pub trait Fabric: Sync {
    /// Called by every rank on its own thread.
    fn connect(&self, epoch: u64, routes: Routes, deadline: Duration, abort: Abort) -> Box<dyn Transport>;
}

/// One process, loopback.
pub struct Tcp {
    listeners: Vec<std::net::TcpListener>,
}

impl Tcp {
    pub fn new(ranks: usize) -> Tcp {
        Tcp {
            listeners: (0..ranks)
                .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
                .collect(),
        }
    }
}

impl Fabric for Tcp {
    fn connect(&self, epoch: u64, routes: Routes, deadline: Duration, abort: Abort) -> Box<dyn Transport> {
        let address = |rank: usize| PeerAddress {
            rank: rank as u32,
            address: self.listeners[rank].local_addr().unwrap().to_string(),
        };
        let group = Group {
            epoch,
            rank: routes.rank,
            peers: (0..self.listeners.len())
                .filter(|&rank| rank as u32 != routes.rank)
                .map(address)
                .collect(),
            secret: b"contract".to_vec(),
        };
        let listener = self.listeners[routes.rank as usize].try_clone().unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        let streams = runtime.block_on(async {
            listener.set_nonblocking(true).unwrap();
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            tcp::connect(&listener, &group, crate::LONG).await.unwrap()
        });
        Box::new(TcpTransport::new(routes, CAPACITY, streams, deadline, abort).unwrap())
    }
}

pub struct Local;

impl Fabric for Local {
    fn connect(&self, _: u64, routes: Routes, _: Duration, _: Abort) -> Box<dyn Transport> {
        Box::new(LocalTransport::new(routes))
    }
}
