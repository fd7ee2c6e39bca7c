//! What goes over a connection between two ranks once it stands: frames of a fixed header and a body.
//!
//! Little-endian. A dispatch's body is `pairs` x (row, expert) as two U32, then `rows` rows of F32; a result's body is
//! `pairs` rows of F32, in the order of the dispatch's pairs; a goodbye has none. Must stay true: a header is checked
//! against the group's capacity before its lengths are used.
//!
//! Keeps invariant C1 of ARCHITECTURE.md.

use crate::transport::Capacity;

pub(super) const HEADER_BYTES: usize = 32;
pub(super) const PAIR_BYTES: usize = 8;
const MAGIC: [u8; 4] = *b"CXF1";

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Dispatch,
    Results,
    /// The sender leaves the epoch; `rows` is the rank it suspects plus 1, or 0.
    Goodbye,
}

impl Kind {
    /// What a rank does that waits for such a frame.
    pub(super) fn phase(self) -> &'static str {
        match self {
            Kind::Dispatch => "dispatch",
            Kind::Results => "combine",
            Kind::Goodbye => "goodbye",
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) kind: Kind,
    pub(super) layer: u16,
    pub(super) step: u64,
    pub(super) rows: u32,
    pub(super) pairs: u32,
}

impl Header {
    pub(super) fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4] = match self.kind {
            Kind::Dispatch => 1,
            Kind::Results => 2,
            Kind::Goodbye => 3,
        };
        bytes[6..8].copy_from_slice(&self.layer.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.step.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.rows.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.pairs.to_le_bytes());
        bytes
    }

    /// `Err`: what is wrong with it.
    pub(super) fn decode(bytes: &[u8; HEADER_BYTES], capacity: &Capacity) -> Result<Header, String> {
        let field = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let kind = match bytes[4] {
            _ if bytes[..4] != MAGIC => return Err(format!("a frame that begins with {:02x?}", &bytes[..4])),
            1 => Kind::Dispatch,
            2 => Kind::Results,
            3 => Kind::Goodbye,
            other => return Err(format!("a frame of kind {other}")),
        };
        let header = Header {
            kind,
            layer: u16::from_le_bytes([bytes[6], bytes[7]]),
            step: u64::from(field(8)) | u64::from(field(12)) << 32,
            rows: field(16),
            pairs: field(20),
        };
        let (rows, pairs) = (header.rows as usize, header.pairs as usize);
        let (most_rows, most_pairs) = match kind {
            Kind::Dispatch => (capacity.max_tokens, rows.saturating_mul(capacity.max_top_k)),
            Kind::Results => (0, capacity.max_work_rows()),
            Kind::Goodbye => (usize::MAX, 0),
        };
        if rows > most_rows || pairs > most_pairs {
            return Err(format!(
                "{kind:?} of {rows} rows and {pairs} pairs, at most {most_rows} and {most_pairs} are allowed"
            ));
        }
        Ok(header)
    }

    /// Bytes that follow the header.
    pub(super) fn body_bytes(&self, capacity: &Capacity) -> usize {
        let (rows, pairs) = (self.rows as usize, self.pairs as usize);
        match self.kind {
            Kind::Dispatch => pairs * PAIR_BYTES + rows * capacity.row_bytes(),
            Kind::Results => pairs * capacity.row_bytes(),
            Kind::Goodbye => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CAPACITY: Capacity = Capacity {
        max_tokens: 4,
        max_top_k: 2,
        hidden: 8,
    };

    #[test]
    fn headers_come_back() {
        let header = Header {
            kind: Kind::Dispatch,
            layer: 61,
            step: 1 << 40,
            rows: 4,
            pairs: 8,
        };
        assert_eq!(Header::decode(&header.encode(), &CAPACITY), Ok(header));
        assert_eq!(header.body_bytes(&CAPACITY), 8 * 8 + 4 * 32);
    }

    #[test]
    fn what_is_beyond_the_capacity_is_refused() {
        let header = |kind, rows, pairs| Header {
            kind,
            layer: 0,
            step: 0,
            rows,
            pairs,
        };
        for (kind, rows, pairs) in [
            (Kind::Dispatch, 5, 0),
            (Kind::Dispatch, 1, 3),
            (Kind::Dispatch, u32::MAX, u32::MAX),
            (Kind::Results, 0, 9),
            (Kind::Results, 1, 1),
            (Kind::Goodbye, 0, 1),
        ] {
            assert!(Header::decode(&header(kind, rows, pairs).encode(), &CAPACITY).is_err());
        }
        let mut bytes = header(Kind::Results, 0, 8).encode();
        assert!(Header::decode(&bytes, &CAPACITY).is_ok());
        bytes[4] = 4;
        assert!(Header::decode(&bytes, &CAPACITY).is_err());
        bytes[0] = 0;
        assert!(Header::decode(&bytes, &CAPACITY).is_err());
    }
}
