//! Refuses HTTP/1 requests whose framing two readers could take in two ways.
//!
//! hyper accepts `Transfer-Encoding` together with `Content-Length`, drops one of them before a handler could
//! see it, and accepts bare line feeds. This scanner reads the same bytes on their way to hyper. It knows no
//! body framing: a head begins at a line that ends in `HTTP/1.x`, which no line of a JSON body does (line
//! breaks inside JSON strings are escaped), and ends at a blank line. Where it objects it puts a NUL in place
//! of the line feed; hyper then answers 400 and closes. A wrong guess can thus only refuse, never admit.

/// The longest header name looked for, with its colon.
const PREFIX: usize = "transfer-encoding:".len();
/// Enough to recognise ` HTTP/1.1` and a carriage return.
const TAIL: usize = " HTTP/1.1\r".len();

/// State across reads of one connection.
#[derive(Default)]
pub(super) struct HeadScanner {
    line_len: usize,
    prefix: [u8; PREFIX],
    tail: [u8; TAIL],
    in_head: bool,
    transfer_encodings: u32,
    content_lengths: u32,
    hosts: u32,
}

impl HeadScanner {
    /// Reads `bytes` as they arrived, and spoils the line feed of each line that must not be accepted.
    pub(super) fn scan(&mut self, bytes: &mut [u8]) {
        let mut at = 0;
        while let Some(found) = memchr::memchr(b'\n', &bytes[at..]) {
            let end = at + found;
            self.push(&bytes[at..end]);
            if self.line_ends_badly() {
                bytes[end] = 0;
            }
            self.line_len = 0;
            at = end + 1;
        }
        self.push(&bytes[at..]);
    }

    fn push(&mut self, piece: &[u8]) {
        if self.line_len < PREFIX {
            let take = piece.len().min(PREFIX - self.line_len);
            self.prefix[self.line_len..self.line_len + take].copy_from_slice(&piece[..take]);
        }
        if piece.len() >= TAIL {
            self.tail.copy_from_slice(&piece[piece.len() - TAIL..]);
        } else {
            self.tail.copy_within(piece.len().., 0);
            self.tail[TAIL - piece.len()..].copy_from_slice(piece);
        }
        self.line_len += piece.len();
    }

    /// Judges the line that was pushed, without its line feed.
    fn line_ends_badly(&mut self) -> bool {
        let known = self.line_len.min(TAIL);
        let tail = &self.tail[TAIL - known..];
        let (text, has_cr) = match tail.split_last() {
            Some((b'\r', rest)) => (rest, true),
            _ => (tail, false),
        };
        let blank = self.line_len == usize::from(has_cr);
        if !self.in_head {
            if text.ends_with(b" HTTP/1.1") || text.ends_with(b" HTTP/1.0") {
                self.in_head = true;
                self.transfer_encodings = 0;
                self.content_lengths = 0;
                self.hosts = 0;
                return !has_cr;
            }
            return false;
        }
        if blank {
            self.in_head = false;
            return !has_cr;
        }
        let prefix = &self.prefix[..self.line_len.min(PREFIX)];
        let is = |name: &str| {
            prefix.len() >= name.len() && prefix[..name.len()].eq_ignore_ascii_case(name.as_bytes())
        };
        self.transfer_encodings += u32::from(is("transfer-encoding:"));
        self.content_lengths += u32::from(is("content-length:"));
        self.hosts += u32::from(is("host:"));
        let ambiguous = self.transfer_encodings + self.content_lengths > 1 || self.hosts > 1;
        ambiguous || !has_cr
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whether anything was spoiled, with the input cut into pieces of `step` bytes.
    fn refused(input: &[u8], step: usize) -> bool {
        let mut scanner = HeadScanner::default();
        let mut refused = false;
        for piece in input.chunks(step) {
            let mut piece = piece.to_vec();
            let before = piece.clone();
            scanner.scan(&mut piece);
            refused |= piece != before;
        }
        refused
    }

    #[test]
    fn refuses_what_two_readers_could_frame_differently() {
        let cases: &[(&str, bool)] = &[
            ("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}", false),
            (
                "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
                false,
            ),
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n",
                true,
            ),
            (
                "POST / HTTP/1.1\r\ncontent-length: 2\r\nTRANSFER-ENCODING: chunked\r\n\r\n",
                true,
            ),
            (
                "POST / HTTP/1.1\r\nContent-Length: 2\r\nContent-Length: 2\r\n\r\n",
                true,
            ),
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n\r\n",
                true,
            ),
            ("GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", true),
            ("GET / HTTP/1.1\nHost: a\r\n\r\n", true),
            ("GET / HTTP/1.1\r\nHost: a\n\r\n", true),
            ("GET / HTTP/1.1\r\nHost: a\r\n\n", true),
            // A body with line feeds of its own is nobody's head.
            (
                "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n{\n\"a\":1\n}",
                false,
            ),
            // The second of two pipelined requests, glued to the first one's body.
            (
                "POST / HTTP/1.1\r\nContent-Length: 2\r\n\r\n{}POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n",
                true,
            ),
            // A header that looks like a request line does not start a new head.
            (
                "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nX: a HTTP/1.1\r\nContent-Length: 2\r\n\r\n",
                true,
            ),
        ];
        for (input, expected) in cases {
            for step in [1, 2, 3, 7, input.len()] {
                assert_eq!(
                    refused(input.as_bytes(), step),
                    *expected,
                    "step {step}: {input:?}"
                );
            }
        }
    }
}
