//! Connects the ranks of an epoch with each other: the higher rank dials the lower one.
//!
//! Both sides prove that they know the epoch's secret without sending it: an HMAC over both sides' random numbers, the
//! epoch and the ranks, so that nothing that was heard can be used again. Must stay true: nothing is read from a
//! connection beyond [`MESSAGE_BYTES`] before the proof is good; every step has a deadline; the number of connections
//! in the handshake is bounded.

use std::io;
use std::time::Duration;

use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::Sha256;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::timeout;

/// Who the ranks of an epoch are, as one of them sees it.
#[derive(Clone, Debug)]
pub struct Group {
    pub epoch: u64,
    pub rank: u32,
    /// All ranks but this one.
    pub peers: Vec<PeerAddress>,
    pub secret: Vec<u8>,
}

#[derive(Clone, Debug)]
pub struct PeerAddress {
    pub rank: u32,
    /// host:port.
    pub address: String,
}

/// Why the ranks could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("rank {rank} at {address} could not be reached within {milliseconds} ms: {problem}")]
    Unreachable {
        rank: u32,
        address: String,
        milliseconds: u128,
        problem: String,
    },
    #[error("ranks {missing:?} did not connect within {milliseconds} ms")]
    Missing { missing: Vec<u32>, milliseconds: u128 },
    #[error("the peers' listener failed: {0}")]
    Listener(io::Error),
    #[error("rank 0 did not give the id of the communicator within {milliseconds} ms")]
    NoCommunicator { milliseconds: u128 },
    #[error("no id for a communicator: {0}")]
    Communicator(String),
}

impl ConnectError {
    /// The rank at fault, if it is one.
    pub fn suspect(&self) -> Option<u32> {
        match self {
            ConnectError::Unreachable { rank, .. } => Some(*rank),
            ConnectError::Missing { missing, .. } => missing.first().copied(),
            ConnectError::NoCommunicator { .. } => Some(0),
            ConnectError::Listener(_) | ConnectError::Communicator(_) => None,
        }
    }
}

/// One handshake; a peer on the same network needs a few milliseconds.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(2);
/// Between two attempts to reach a peer that has not begun the epoch yet.
const DIAL_PAUSE: Duration = Duration::from_millis(20);
/// Incoming connections that have not proved anything yet.
const MAX_PENDING_HANDSHAKES: usize = 128;
/// Every message of the handshake has this length.
const MESSAGE_BYTES: usize = 64;
const NONCE_BYTES: usize = 32;
const PROOF_BYTES: usize = 32;
const MAGIC: [u8; 8] = *b"CONCLAV1";
const ACCEPTED: u8 = 1;

/// Connects to all peers within `deadline`. Connections by rank, none at this rank's own place.
pub async fn connect(
    listener: &TcpListener,
    group: &Group,
    deadline: Duration,
) -> Result<Vec<Option<std::net::TcpStream>>, ConnectError> {
    let highest = group
        .peers
        .iter()
        .map(|peer| peer.rank)
        .chain([group.rank])
        .max()
        .unwrap_or(0);
    let mut streams: Vec<Option<std::net::TcpStream>> = (0..=highest).map(|_| None).collect();
    let lower: Vec<PeerAddress> = group
        .peers
        .iter()
        .filter(|peer| peer.rank < group.rank)
        .cloned()
        .collect();
    let higher: Vec<u32> = group
        .peers
        .iter()
        .map(|peer| peer.rank)
        .filter(|&rank| rank > group.rank)
        .collect();
    let (dialled, accepted) = tokio::join!(
        dial_all(group, lower, deadline),
        accept_all(listener, group, &higher, deadline)
    );
    for (rank, stream) in dialled?.into_iter().chain(accepted?) {
        streams[rank as usize] = Some(stream.into_std().map_err(ConnectError::Listener)?);
    }
    Ok(streams)
}

async fn dial_all(
    group: &Group,
    peers: Vec<PeerAddress>,
    deadline: Duration,
) -> Result<Vec<(u32, TcpStream)>, ConnectError> {
    let mut tasks = JoinSet::new();
    for peer in peers {
        let (epoch, rank, secret) = (group.epoch, group.rank, group.secret.clone());
        tasks.spawn(async move {
            let ids = Ids {
                epoch,
                dialer: rank,
                acceptor: peer.rank,
            };
            let stream = dial(&peer, ids, &secret, deadline).await?;
            Ok((peer.rank, stream))
        });
    }
    let mut streams = Vec::new();
    while let Some(result) = tasks.join_next().await {
        streams.push(result.map_err(|error| ConnectError::Listener(io::Error::other(error)))??);
    }
    Ok(streams)
}

/// Tries until the peer has begun the same epoch.
async fn dial(
    peer: &PeerAddress,
    ids: Ids,
    secret: &[u8],
    deadline: Duration,
) -> Result<TcpStream, ConnectError> {
    let end = tokio::time::Instant::now() + deadline;
    let mut problem = "no attempt was made".to_owned();
    while tokio::time::Instant::now() < end {
        let attempt = async {
            let mut stream = TcpStream::connect(&peer.address).await?;
            stream.set_nodelay(true)?;
            prove_as_dialer(&mut stream, ids, secret).await?;
            Ok::<_, io::Error>(stream)
        };
        let left = end - tokio::time::Instant::now();
        match timeout(left.min(HANDSHAKE_DEADLINE), attempt).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => problem = error.to_string(),
            Err(_) => problem = "it did not answer".into(),
        }
        tokio::time::sleep(DIAL_PAUSE).await;
    }
    Err(ConnectError::Unreachable {
        rank: peer.rank,
        address: peer.address.clone(),
        milliseconds: deadline.as_millis(),
        problem,
    })
}

async fn accept_all(
    listener: &TcpListener,
    group: &Group,
    wanted: &[u32],
    deadline: Duration,
) -> Result<Vec<(u32, TcpStream)>, ConnectError> {
    let end = tokio::time::Instant::now() + deadline;
    let mut streams: Vec<(u32, TcpStream)> = Vec::new();
    let mut handshakes = JoinSet::new();
    while streams.len() < wanted.len() {
        tokio::select! {
            () = tokio::time::sleep_until(end) => {
                let here = |rank: &&u32| !streams.iter().any(|(found, _)| found == *rank);
                let missing = wanted.iter().filter(here).copied().collect();
                return Err(ConnectError::Missing { missing, milliseconds: deadline.as_millis() });
            }
            incoming = listener.accept(), if handshakes.len() < MAX_PENDING_HANDSHAKES => {
                // A connection that broke before it was accepted concerns nobody else.
                let Ok((stream, _)) = incoming else { continue };
                let (epoch, rank, secret) = (group.epoch, group.rank, group.secret.clone());
                handshakes.spawn(timeout(HANDSHAKE_DEADLINE, accept(stream, epoch, rank, secret)));
            }
            Some(done) = handshakes.join_next() => {
                let Ok(Ok(Ok((rank, stream)))) = done else { continue };
                if wanted.contains(&rank) {
                    // A peer that dials again has given up its earlier connection.
                    streams.retain(|(found, _)| *found != rank);
                    streams.push((rank, stream));
                }
            }
        }
    }
    Ok(streams)
}

async fn accept(
    mut stream: TcpStream,
    epoch: u64,
    rank: u32,
    secret: Vec<u8>,
) -> io::Result<(u32, TcpStream)> {
    stream.set_nodelay(true)?;
    let dialer = prove_as_acceptor(&mut stream, epoch, rank, &secret).await?;
    Ok((dialer, stream))
}

#[derive(Clone, Copy, Debug)]
struct Ids {
    epoch: u64,
    dialer: u32,
    acceptor: u32,
}

impl Ids {
    fn proof(&self, secret: &[u8], role: &[u8], nonces: [&[u8]; 2]) -> io::Result<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(secret).map_err(io::Error::other)?;
        mac.update(&MAGIC);
        mac.update(role);
        mac.update(&self.epoch.to_le_bytes());
        mac.update(&self.dialer.to_le_bytes());
        mac.update(&self.acceptor.to_le_bytes());
        nonces.iter().for_each(|nonce| mac.update(nonce));
        Ok(mac)
    }
}

fn nonce() -> io::Result<[u8; NONCE_BYTES]> {
    let mut nonce = [0; NONCE_BYTES];
    getrandom::fill(&mut nonce).map_err(io::Error::other)?;
    Ok(nonce)
}

fn refused(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::PermissionDenied, what.into())
}

/// Hello (magic, epoch, ranks, nonce); challenge (nonce, proof); proof; one byte: accepted.
async fn prove_as_dialer(stream: &mut TcpStream, ids: Ids, secret: &[u8]) -> io::Result<()> {
    let own = nonce()?;
    let mut hello = [0; MESSAGE_BYTES];
    hello[..8].copy_from_slice(&MAGIC);
    hello[8..16].copy_from_slice(&ids.epoch.to_le_bytes());
    hello[16..20].copy_from_slice(&ids.dialer.to_le_bytes());
    hello[20..24].copy_from_slice(&ids.acceptor.to_le_bytes());
    hello[32..].copy_from_slice(&own);
    stream.write_all(&hello).await?;
    let mut challenge = [0; MESSAGE_BYTES];
    stream.read_exact(&mut challenge).await?;
    let (theirs, proof) = challenge.split_at(NONCE_BYTES);
    ids.proof(secret, b"acceptor", [&own, theirs])?
        .verify_slice(proof)
        .map_err(|_| refused("it does not know the epoch's secret"))?;
    let proof = ids
        .proof(secret, b"dialer", [&own, theirs])?
        .finalize()
        .into_bytes();
    stream.write_all(&proof).await?;
    match stream.read_u8().await? {
        ACCEPTED => Ok(()),
        other => Err(refused(format!("it answered {other}"))),
    }
}

/// The dialer's rank.
async fn prove_as_acceptor(stream: &mut TcpStream, epoch: u64, rank: u32, secret: &[u8]) -> io::Result<u32> {
    let mut hello = [0; MESSAGE_BYTES];
    stream.read_exact(&mut hello).await?;
    let field = |at: usize| u32::from_le_bytes([hello[at], hello[at + 1], hello[at + 2], hello[at + 3]]);
    let ids = Ids {
        epoch: u64::from(field(8)) | u64::from(field(12)) << 32,
        dialer: field(16),
        acceptor: field(20),
    };
    if hello[..8] != MAGIC || ids.epoch != epoch || ids.acceptor != rank || ids.dialer <= rank {
        return Err(refused("it is not of this epoch"));
    }
    let (theirs, own) = (&hello[32..], nonce()?);
    let mut challenge = [0; MESSAGE_BYTES];
    challenge[..NONCE_BYTES].copy_from_slice(&own);
    let proof = ids
        .proof(secret, b"acceptor", [theirs, &own])?
        .finalize()
        .into_bytes();
    challenge[NONCE_BYTES..].copy_from_slice(&proof);
    stream.write_all(&challenge).await?;
    let mut proof = [0; PROOF_BYTES];
    stream.read_exact(&mut proof).await?;
    ids.proof(secret, b"dialer", [theirs, &own])?
        .verify_slice(&proof)
        .map_err(|_| refused("it does not know the epoch's secret"))?;
    stream.write_u8(ACCEPTED).await?;
    Ok(ids.dialer)
}
