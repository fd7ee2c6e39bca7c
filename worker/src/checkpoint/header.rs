//! The header of one safetensors file: which tensors it holds, of which type and shape, and where.
//!
//! The safetensors crate decodes types and judges the whole; this file first finds what the crate cannot name (a
//! tensor listed twice, the tensor at fault). Must stay true: nothing is allocated from a number in the file; the
//! header is at most [`MAX_HEADER_BYTES`] long and lies inside the file before it is read.
//!
//! Keeps invariant C1 of ARCHITECTURE.md.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use safetensors::tensor::{Metadata, TensorInfo};
use serde::de::{Deserializer as _, Error as _, MapAccess, Visitor};

use super::error::{CheckpointError, DOWNLOAD_AGAIN, Result};

/// The format's own limit.
pub const MAX_HEADER_BYTES: u64 = 100_000_000;
const LENGTH_BYTES: usize = 8;

/// Tensors of one file in the order of their data, and where the data begins in the file.
#[derive(Debug)]
pub struct Header {
    pub tensors: Vec<(String, TensorInfo)>,
    pub data_start: usize,
}

/// Reads and checks the header of `file`, whose whole content is `bytes`.
pub fn read(file: &Path, bytes: &[u8]) -> Result<Header> {
    let wrong = |problem: String| CheckpointError::file(file, problem, DOWNLOAD_AGAIN);
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(wrong(format!("it has {} bytes, a header needs 8", bytes.len())));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        return Err(wrong(format!(
            "header length is {length}, at most {MAX_HEADER_BYTES} is allowed"
        )));
    }
    let Some(text) = rest.get(..length as usize) else {
        return Err(wrong(format!(
            "header length is {length}, the file ends after {} bytes",
            rest.len()
        )));
    };
    let text = std::str::from_utf8(text).map_err(|error| wrong(format!("header is not UTF-8: {error}")))?;
    let mut json = serde_json::Deserializer::from_str(text);
    let (mut tensors, metadata) = json
        .deserialize_map(Entries)
        .and_then(|entries| json.end().map(|()| entries))
        .map_err(|error| wrong(format!("header: {error}")))?;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let data_bytes = rest.len() - length as usize;
    check_ranges(file, &tensors, data_bytes)?;
    Metadata::new(metadata, tensors.clone()).map_err(|error| wrong(format!("header: {error}")))?;
    Ok(Header {
        tensors,
        data_start: LENGTH_BYTES + length as usize,
    })
}

/// Every tensor begins where the one before it ends, has the bytes its shape and type say, and the last one ends
/// with the file.
fn check_ranges(file: &Path, tensors: &[(String, TensorInfo)], data_bytes: usize) -> Result<()> {
    let mut end = 0;
    for (name, info) in tensors {
        let wrong = |problem: String| Err(CheckpointError::tensor(file, name, problem));
        let (from, to) = info.data_offsets;
        if to < from {
            return wrong(format!(
                "data_offsets are [{from}, {to}], the end lies before the begin"
            ));
        }
        if from < end {
            return wrong(format!(
                "data_offsets are [{from}, {to}], which overlaps the tensor before it (to {end})"
            ));
        }
        if from > end {
            return wrong(format!(
                "data_offsets are [{from}, {to}], which leaves a hole from {end}"
            ));
        }
        if to > data_bytes {
            return wrong(format!(
                "data_offsets are [{from}, {to}], the file holds {data_bytes} bytes of data"
            ));
        }
        let elements = info
            .shape
            .iter()
            .try_fold(1usize, |product, &side| product.checked_mul(side));
        let bits = elements.and_then(|elements| elements.checked_mul(info.dtype.bitsize()));
        match bits {
            Some(bits) if bits % 8 == 0 && bits / 8 == to - from => {}
            Some(bits) if bits % 8 == 0 => {
                let expected = bits / 8;
                return wrong(format!(
                    "{} {:?} takes {expected} bytes, data_offsets give {}",
                    info.dtype,
                    info.shape,
                    to - from
                ));
            }
            _ => {
                return wrong(format!(
                    "{} {:?} is no whole number of bytes that fits",
                    info.dtype, info.shape
                ));
            }
        }
        end = to;
    }
    if end != data_bytes {
        let problem = format!("its tensors end after {end} bytes of data, the file after {data_bytes}");
        return Err(CheckpointError::file(file, problem, DOWNLOAD_AGAIN));
    }
    Ok(())
}

type Parsed = (Vec<(String, TensorInfo)>, Option<HashMap<String, String>>);

/// Takes a header's entries one by one, so that a name listed twice is seen.
struct Entries;

impl<'de> Visitor<'de> for Entries {
    type Value = Parsed;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> std::result::Result<Parsed, A::Error> {
        let mut seen: HashMap<String, ()> = HashMap::new();
        let mut tensors = Vec::new();
        let mut metadata = None;
        while let Some(name) = map.next_key::<String>()? {
            let shown = super::error::shortened(&name);
            if seen.insert(name.clone(), ()).is_some() {
                return Err(A::Error::custom(format!("tensor {shown} is listed twice")));
            }
            if name == "__metadata__" {
                metadata = Some(map.next_value()?);
                continue;
            }
            let value: serde_json::Value = map.next_value()?;
            let info = serde_json::from_value(value)
                .map_err(|error| A::Error::custom(format!("tensor {shown}: {error}")))?;
            tensors.push((name, info));
        }
        Ok((tensors, metadata))
    }
}
