//! What strangers and broken peers can do at the port for peers: nothing that lasts.
//!
//! Proves invariant C1 of ARCHITECTURE.md.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use conclave_kernels::backend::{Backend as _, Limits};
use conclave_kernels::cpu::CpuBackend;
use conclave_plan::placement::Placement;
use conclave_worker::transport::routing::Routes;
use conclave_worker::transport::tcp::{ConnectError, Group, PeerAddress, TcpTransport, connect};
use conclave_worker::transport::{Abort, Capacity, Tokens, Transport as _, TransportError};

/// Nothing in these tests takes longer, on a busy machine either, unless it hangs.
const PATIENCE: Duration = Duration::from_secs(120);
const CAPACITY: Capacity = Capacity {
    max_tokens: 4,
    max_top_k: 2,
    hidden: 8,
};

fn group(rank: u32, epoch: u64, secret: &str, peers: &[(u32, &TcpListener)]) -> Group {
    let peers = peers.iter().map(|(rank, listener)| PeerAddress {
        rank: *rank,
        address: listener.local_addr().unwrap().to_string(),
    });
    Group {
        epoch,
        rank,
        peers: peers.collect(),
        secret: secret.into(),
    }
}

fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").unwrap()
}

type Streams = Result<Vec<Option<TcpStream>>, ConnectError>;

fn join(listener: &TcpListener, group: &Group, deadline: Duration) -> Streams {
    let listener = listener.try_clone().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        listener.set_nonblocking(true).unwrap();
        connect(
            &tokio::net::TcpListener::from_std(listener).unwrap(),
            group,
            deadline,
        )
        .await
    })
}

/// Two ranks join with these groups while `meanwhile` goes on.
fn two(
    (a, b): (&TcpListener, &TcpListener),
    groups: [Group; 2],
    deadline: Duration,
    meanwhile: impl FnOnce(),
) -> [Streams; 2] {
    std::thread::scope(|scope| {
        let first = scope.spawn(|| join(a, &groups[0], deadline));
        meanwhile();
        let second = scope.spawn(|| join(b, &groups[1], deadline));
        [first.join().unwrap(), second.join().unwrap()]
    })
}

#[test]
fn ranks_with_different_secrets_or_epochs_do_not_connect() {
    for (epoch, secret) in [(1, "another secret"), (2, "a secret"), (1, "")] {
        let (a, b) = (listen(), listen());
        let groups = [
            group(0, 1, "a secret", &[(1, &b)]),
            group(1, epoch, secret, &[(0, &a)]),
        ];
        let [first, second] = two((&a, &b), groups, Duration::from_millis(300), || {});
        let (first, second) = (first.unwrap_err(), second.unwrap_err());
        assert!(
            matches!(&first, ConnectError::Missing { missing, .. } if missing == &[1]),
            "{first}"
        );
        assert_eq!(second.suspect(), Some(0), "{second}");
    }
}

#[test]
fn strangers_do_not_keep_the_ranks_apart() {
    let (a, b) = (listen(), listen());
    let groups = [group(0, 1, "s", &[(1, &b)]), group(1, 1, "s", &[(0, &a)])];
    let mut strangers = Vec::new();
    let results = two((&a, &b), groups, PATIENCE, || {
        for index in 0..300 {
            let mut stranger = TcpStream::connect(a.local_addr().unwrap()).unwrap();
            match index % 3 {
                // Silent, talkative, and gone.
                0 => strangers.push(stranger),
                1 => {
                    let _ = stranger.write_all(&[0x55; 4096]);
                    strangers.push(stranger);
                }
                _ => {}
            }
        }
    });
    for result in results {
        result.unwrap();
    }
}

/// Passes a handshake on; what the dialer said.
fn relay(mut from: TcpStream, mut to: TcpStream) -> std::io::Result<Vec<Vec<u8>>> {
    let mut recorded = Vec::new();
    // Hello (64), challenge (64), proof (32), accepted (1).
    for (bytes, dialing) in [(64, true), (64, false), (32, true), (1, false)] {
        let mut message = vec![0; bytes];
        let (reader, writer) = if dialing {
            (&mut from, &mut to)
        } else {
            (&mut to, &mut from)
        };
        reader.read_exact(&mut message)?;
        writer.write_all(&message)?;
        if dialing {
            recorded.push(message);
        }
    }
    Ok(recorded)
}

#[test]
fn a_handshake_that_was_heard_cannot_be_used_again() {
    // The dialer's side of a good handshake, recorded by a relay. On a busy machine its time may be over, and the rank
    // dials again.
    let (a, b, between) = (listen(), listen(), listen());
    let (rank_0, rank_1) = (group(0, 1, "s", &[(1, &b)]), group(1, 1, "s", &[(0, &a)]));
    let relayed = group(1, 1, "s", &[(0, &between)]);
    let to_a = || TcpStream::connect(a.local_addr().unwrap()).unwrap();
    let recorded = std::thread::scope(|scope| {
        let acceptor = scope.spawn(|| join(&a, &rank_0, PATIENCE));
        let dialer = scope.spawn(|| join(&b, &relayed, PATIENCE));
        let recorded = loop {
            if let Ok(recorded) = relay(between.accept().unwrap().0, to_a()) {
                break recorded;
            }
        };
        acceptor.join().unwrap().unwrap();
        dialer.join().unwrap().unwrap();
        recorded
    });
    // The same epoch again: a rank that restarted, say.
    std::thread::scope(|scope| {
        let acceptor = scope.spawn(|| join(&a, &rank_0, PATIENCE));
        let replay = || {
            let mut stream = to_a();
            stream.write_all(&recorded[0])?;
            stream.read_exact(&mut [0; 64])?;
            stream.write_all(&recorded[1])?;
            Ok::<_, std::io::Error>(stream.read(&mut [0; 1]).is_ok_and(|count| count == 1))
        };
        let accepted = loop {
            if let Ok(accepted) = replay() {
                break accepted;
            }
        };
        assert!(!accepted);
        assert!(!acceptor.is_finished(), "nor taken for rank 1");
        join(&b, &rank_1, PATIENCE).unwrap();
        acceptor.join().unwrap().unwrap();
    });
}

/// Rank 0 with its transport, and the bare connection of rank 1.
fn with_bare_peer() -> (TcpTransport, TcpStream) {
    let (a, b) = (listen(), listen());
    let groups = [group(0, 1, "s", &[(1, &b)]), group(1, 1, "s", &[(0, &a)])];
    let [first, second] = two((&a, &b), groups, PATIENCE, || {});
    let routes = Routes::new(&Placement::even(4, 2), 0, 1);
    let transport = TcpTransport::new(routes, CAPACITY, first.unwrap(), PATIENCE, Abort::new()).unwrap();
    let bare = second.unwrap()[0].take().unwrap();
    bare.set_nonblocking(false).unwrap();
    (transport, bare)
}

/// Rank 0 dispatches nothing and waits for rank 1's dispatch of step 0, layer 0.
fn dispatch(transport: &mut TcpTransport) -> Result<(), TransportError> {
    let limits = Limits {
        max_tokens: 4,
        max_logit_rows: 1,
        max_runs: 1,
        max_pages_per_run: 1,
        max_expert_rows: 8,
        page_tokens: 16,
    };
    let mut backend = CpuBackend::new(limits, 1, None).unwrap();
    let (rows, experts) = (
        backend.alloc(128, "rows").unwrap(),
        backend.alloc(32, "experts").unwrap(),
    );
    transport.begin_step(0)?;
    let tokens = Tokens {
        layer: 0,
        count: 0,
        top_k: 2,
        rows: &rows,
        experts: &experts,
    };
    transport.dispatch(&mut backend, tokens)
}

fn frame(kind: u8, layer: u16, step: u64, rows: u32, pairs: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; 32];
    bytes[..4].copy_from_slice(b"CXF1");
    bytes[4] = kind;
    bytes[6..8].copy_from_slice(&layer.to_le_bytes());
    bytes[8..16].copy_from_slice(&step.to_le_bytes());
    bytes[16..20].copy_from_slice(&rows.to_le_bytes());
    bytes[20..24].copy_from_slice(&pairs.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

fn pair(row: u32, expert: u32) -> Vec<u8> {
    [row.to_le_bytes(), expert.to_le_bytes()].concat()
}

#[test]
fn what_a_peer_sends_is_checked_before_it_is_used() {
    let row = [0u8; 32];
    let with_row = |pairs: &[Vec<u8>]| [pairs.concat(), row.to_vec()].concat();
    let cases: Vec<(&str, Vec<u8>)> = vec![
        ("begins with", vec![0xee; 64]),
        ("kind 9", frame(9, 0, 0, 0, 0, &[])),
        ("4294967295 rows", frame(1, 0, 0, u32::MAX, 0, &[])),
        ("5 rows", frame(1, 0, 0, 5, 0, &[])),
        ("4 pairs", frame(1, 0, 0, 1, 4, &[])),
        ("9 pairs", frame(2, 0, 0, 0, 9, &[])),
        ("layer 1", frame(1, 1, 0, 0, 0, &[])),
        ("step 7", frame(1, 0, 7, 0, 0, &[])),
        ("Results of step 0", frame(2, 0, 0, 0, 0, &[])),
        // Rank 0 holds experts 0 and 1 of 4.
        (
            "expert 2, which is not here",
            frame(1, 0, 0, 1, 1, &with_row(&[pair(0, 2)])),
        ),
        (
            "expert 99, which is not here",
            frame(1, 0, 0, 1, 1, &with_row(&[pair(0, 99)])),
        ),
        (
            "row 1 after row 0, of 1",
            frame(1, 0, 0, 1, 1, &with_row(&[pair(1, 0)])),
        ),
        (
            "row 0 after row 1",
            frame(
                1,
                0,
                0,
                2,
                2,
                &[with_row(&[pair(1, 0), pair(0, 0)]), row.to_vec()].concat(),
            ),
        ),
        ("for more than 2 experts", {
            let pairs = [pair(0, 0), pair(0, 1), pair(0, 0)];
            frame(1, 0, 0, 2, 3, &[with_row(&pairs), row.to_vec()].concat())
        }),
    ];
    for (expected, bytes) in cases {
        let (mut transport, mut bare) = with_bare_peer();
        bare.write_all(&bytes).unwrap();
        let error = dispatch(&mut transport).unwrap_err();
        assert!(error.to_string().contains(expected), "{error} lacks {expected}");
        assert!(
            matches!(error, TransportError::Protocol { rank: 1, .. }),
            "{error}"
        );
        assert_eq!(error.suspect(), Some(1));
    }
}

#[test]
fn a_frame_may_come_byte_by_byte_and_a_cut_one_is_an_error() {
    let (mut transport, mut bare) = with_bare_peer();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for byte in frame(1, 0, 0, 1, 1, &[pair(0, 1), vec![0; 32]].concat()) {
                bare.write_all(&[byte]).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        dispatch(&mut transport).unwrap();
    });
    let (mut transport, mut bare) = with_bare_peer();
    bare.write_all(&frame(1, 0, 0, 1, 1, &[0; 10])).unwrap();
    drop(bare);
    let error = dispatch(&mut transport).unwrap_err();
    assert!(error.to_string().contains("the peer closed it"), "{error}");
}

#[test]
fn a_peer_that_floods_is_stopped_by_its_own_connection() {
    let (mut transport, mut bare) = with_bare_peer();
    bare.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
    // The first frame is good; then more than the connection's buffers hold, which nobody reads.
    bare.write_all(&frame(1, 0, 0, 0, 0, &[])).unwrap();
    let flood = frame(1, 0, 1, 4, 8, &[pair(0, 0).repeat(8), vec![0; 128]].concat());
    let begin = Instant::now();
    while bare.write(&flood).is_ok() {
        assert!(begin.elapsed() < PATIENCE, "the flood was never stopped");
    }
    dispatch(&mut transport).unwrap();
    // The rank has taken in its bound of frames and no more: the connection is still full.
    assert!(bare.write(&vec![0; 8 << 20]).is_ok_and(|count| count < 8 << 20) || bare.write(&flood).is_err());
}
