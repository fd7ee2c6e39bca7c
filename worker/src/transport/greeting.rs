//! What ranks whose devices exchange by themselves tell each other first, over connections that were proved: the sizes
//! of their exchange and a handle of their buffers.
//!
//! Must stay true: a fixed number of bytes is read; a peer with other sizes is named and nothing of it is used; no wait is
//! longer than its bound, and an abort ends it.
//!
//! Keeps invariant C1 of ARCHITECTURE.md.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use super::{Abort, Result, TransportError};

/// What opens a rank's buffers to its peers, as the device makes it; zeros: nothing is opened.
pub const HANDLE_BYTES: usize = 128;
const SIZES: usize = 8;
const MAGIC: [u8; 4] = *b"CXD2";
const BYTES: usize = 4 + SIZES * 4 + HANDLE_BYTES;
/// How often a wait looks whether it is over.
const LOOK_EVERY: Duration = Duration::from_millis(20);

#[derive(Clone, Debug)]
pub struct Greeting {
    /// By name; equal on all ranks.
    pub sizes: [(&'static str, u32); SIZES],
    pub handle: [u8; HANDLE_BYTES],
}

/// Tells every peer and hears all of them: handles by rank, this one's own included. `streams` are by rank.
pub fn meet(
    streams: &[Option<TcpStream>],
    own: &Greeting,
    within: Duration,
    abort: &Abort,
) -> Result<Vec<[u8; HANDLE_BYTES]>> {
    let until = Instant::now() + within;
    let bytes = own.encode();
    let peer = |rank: usize, problem: String| TransportError::Peer {
        rank: rank as u32,
        problem,
    };
    for (rank, stream) in streams.iter().enumerate() {
        let Some(mut stream) = stream.as_ref() else {
            continue;
        };
        // So few bytes fit into the connection's buffer: nobody waits for a peer here.
        stream
            .set_nonblocking(false)
            .and_then(|()| stream.set_write_timeout(Some(within)))
            .and_then(|()| stream.write_all(&bytes))
            .map_err(|error| peer(rank, error.to_string()))?;
    }
    let mut handles = Vec::with_capacity(streams.len());
    for (rank, stream) in streams.iter().enumerate() {
        let Some(stream) = stream else {
            handles.push(own.handle);
            continue;
        };
        let heard = hear(stream, until, within, abort).map_err(|problem| match problem {
            None => TransportError::Aborted,
            Some(problem) => peer(rank, problem),
        })?;
        handles.push(
            own.understand(&heard)
                .map_err(|problem| TransportError::Protocol {
                    rank: rank as u32,
                    problem,
                })?,
        );
    }
    Ok(handles)
}

/// `Err(None)`: aborted.
fn hear(
    mut stream: &TcpStream,
    until: Instant,
    within: Duration,
    abort: &Abort,
) -> std::result::Result<[u8; BYTES], Option<String>> {
    let text = |error: std::io::Error| Some(error.to_string());
    stream.set_read_timeout(Some(LOOK_EVERY)).map_err(text)?;
    let (mut bytes, mut heard) = ([0; BYTES], 0);
    while heard < BYTES {
        if abort.is_aborted() {
            return Err(None);
        }
        if Instant::now() > until {
            return Err(Some(format!("it said nothing for {} ms", within.as_millis())));
        }
        match stream.read(&mut bytes[heard..]) {
            Ok(0) => return Err(Some("it left before the exchange stood".into())),
            Ok(count) => heard += count,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(error) => return Err(text(error)),
        }
    }
    Ok(bytes)
}

impl Greeting {
    fn encode(&self) -> [u8; BYTES] {
        let mut bytes = [0; BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        for (place, (_, value)) in bytes[4..].chunks_exact_mut(4).zip(self.sizes) {
            place.copy_from_slice(&value.to_le_bytes());
        }
        bytes[BYTES - HANDLE_BYTES..].copy_from_slice(&self.handle);
        bytes
    }

    /// The peer's handle, if its sizes are this rank's.
    fn understand(&self, theirs: &[u8; BYTES]) -> std::result::Result<[u8; HANDLE_BYTES], String> {
        if theirs[..4] != MAGIC {
            return Err(format!("{:02x?} instead of its sizes", &theirs[..4]));
        }
        for (word, (name, here)) in theirs[4..].as_chunks::<4>().0.iter().zip(self.sizes) {
            let there = u32::from_le_bytes(*word);
            if there != here {
                return Err(format!(
                    "{name}: {there}, here it is {here}; start all workers with the same --max-num-batched-tokens and \
                     --deterministic"
                ));
            }
        }
        let mut handle = [0; HANDLE_BYTES];
        handle.copy_from_slice(&theirs[BYTES - HANDLE_BYTES..]);
        Ok(handle)
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    fn greeting(tokens: u32, byte: u8) -> Greeting {
        Greeting {
            sizes: [
                "ranks",
                "hidden",
                "top-k",
                "few",
                "many",
                "exact",
                "deterministic",
                "wire",
            ]
            .map(|name| {
                let value = if name == "many" { tokens } else { 2 };
                (name, value)
            }),
            handle: [byte; HANDLE_BYTES],
        }
    }

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (dialled, listener.accept().unwrap().0)
    }

    const PATIENT: Duration = Duration::from_secs(30);

    #[test]
    fn every_rank_hears_every_handle() {
        let (a, b) = pair();
        let other =
            std::thread::spawn(move || meet(&[Some(b), None], &greeting(7, 2), PATIENT, &Abort::new()));
        let heard = meet(&[None, Some(a)], &greeting(7, 1), PATIENT, &Abort::new()).unwrap();
        assert_eq!(heard, [[1; HANDLE_BYTES], [2; HANDLE_BYTES]]);
        assert_eq!(other.join().unwrap().unwrap(), heard);
    }

    #[test]
    fn other_sizes_and_other_words_are_refused() {
        let (a, b) = pair();
        let other =
            std::thread::spawn(move || meet(&[Some(b), None], &greeting(8, 2), PATIENT, &Abort::new()));
        let error = meet(&[None, Some(a)], &greeting(7, 1), PATIENT, &Abort::new()).unwrap_err();
        assert!(error.to_string().contains("many: 8, here it is 7"), "{error}");
        assert_eq!(error.suspect(), Some(1));
        assert_eq!(other.join().unwrap().unwrap_err().suspect(), Some(0));
        let (a, mut b) = pair();
        b.write_all(&[9; BYTES]).unwrap();
        let error = meet(&[None, Some(a)], &greeting(7, 1), PATIENT, &Abort::new()).unwrap_err();
        assert!(
            matches!(error, TransportError::Protocol { rank: 1, .. }),
            "{error}"
        );
    }

    #[test]
    fn silence_ends_at_the_deadline_and_at_an_abort() {
        let (a, _b) = pair();
        let short = Duration::from_millis(50);
        let error = meet(&[None, Some(a)], &greeting(7, 1), short, &Abort::new()).unwrap_err();
        assert!(error.to_string().contains("nothing for 50 ms"), "{error}");
        let (a, _b) = pair();
        let abort = Abort::new();
        abort.abort();
        let error = meet(&[None, Some(a)], &greeting(7, 1), PATIENT, &abort).unwrap_err();
        assert!(matches!(error, TransportError::Aborted), "{error}");
        let (a, b) = pair();
        drop(b);
        let error = meet(&[None, Some(a)], &greeting(7, 1), PATIENT, &Abort::new()).unwrap_err();
        assert!(matches!(error, TransportError::Peer { rank: 1, .. }), "{error}");
    }
}
