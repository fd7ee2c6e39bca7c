//! The secret between this process and its workers: drawn at every start, never written anywhere.

use std::fs::File;
use std::io::Read;

use anyhow::{Context, Result};

const BYTES: usize = 16;

pub fn draw() -> Result<String> {
    let mut secret = [0u8; BYTES];
    File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut secret))
        .context("/dev/urandom: cannot draw the cluster's secret")?;
    Ok(secret.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    #[test]
    fn two_draws_differ_and_are_long() {
        let (one, two) = (super::draw().expect("random"), super::draw().expect("random"));
        assert_eq!(one.len(), 32);
        assert_ne!(one, two);
    }
}
