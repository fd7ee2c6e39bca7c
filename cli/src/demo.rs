//! The copy of the demo model inside the binary, unpacked when no repository is at hand.
//!
//! Must stay true: a file is used only if its SHA-256 is the one it had when the binary was built, and it appears
//! under its name only when it is whole, so that several processes may unpack at once.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use sha2::{Digest, Sha256};

/// One file of the model.
pub struct EmbeddedFile {
    pub name: &'static str,
    pub sha256: [u8; 32],
    pub bytes: &'static [u8],
}

include!(concat!(env!("OUT_DIR"), "/demo.rs"));

/// Unpacks what is missing or differs into the cache directory and returns the model's directory.
pub fn unpack() -> Result<PathBuf> {
    unpack_into(&cache_directory())
}

/// `$XDG_CACHE_HOME/conclave`, `~/.cache/conclave`, or the temporary directory.
fn cache_directory() -> PathBuf {
    let from = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    from("XDG_CACHE_HOME")
        .or_else(|| from("HOME").map(|home| home.join(".cache")))
        .unwrap_or_else(std::env::temp_dir)
        .join("conclave")
}

fn unpack_into(cache: &Path) -> Result<PathBuf> {
    // The directory's name follows the content: another version of the binary has another one.
    let mut all = Sha256::new();
    for file in FILES {
        all.update(file.sha256);
    }
    let digest: [u8; 32] = all.finalize().into();
    let short: String = digest[..8].iter().map(|byte| format!("{byte:02x}")).collect();
    let directory = cache.join(format!("demo-{short}"));
    fs::create_dir_all(&directory).with_context(|| {
        format!(
            "{}: cannot be created; set XDG_CACHE_HOME, or give a MODEL",
            directory.display()
        )
    })?;
    for file in FILES {
        let path = directory.join(file.name);
        if !is_intact(&path, file) {
            write_whole(&path, file.bytes).with_context(|| {
                format!(
                    "{}: cannot be written; set XDG_CACHE_HOME, or give a MODEL",
                    path.display()
                )
            })?;
        }
    }
    Ok(directory)
}

fn is_intact(path: &Path, file: &EmbeddedFile) -> bool {
    // The length is compared first: no more is read than the file should have.
    let length = fs::metadata(path).map(|metadata| metadata.len());
    length.is_ok_and(|length| length == file.bytes.len() as u64)
        && fs::read(path).is_ok_and(|found| Sha256::digest(&found)[..] == file.sha256)
}

fn write_whole(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    let mut file = File::create(&partial)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&partial, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unpacks_what_is_missing_and_mends_what_differs() {
        let cache = tempfile::tempdir().expect("temporary directory");
        let directory = unpack_into(cache.path()).expect("unpacks");
        let config = directory.join("config.json");
        assert!(directory.join("model.safetensors").is_file() && config.is_file());
        let good = fs::read(&config).expect("config");

        let mut bad = good.clone();
        bad[0] ^= 1;
        fs::write(&config, &bad).expect("damages it");
        fs::remove_file(directory.join("tokenizer.json")).expect("removes one");
        assert_eq!(unpack_into(cache.path()).expect("unpacks again"), directory);
        assert_eq!(fs::read(&config).expect("config"), good);
        assert!(directory.join("tokenizer.json").is_file());
        let left: Vec<_> = fs::read_dir(&directory).expect("lists").collect();
        assert_eq!(left.len(), FILES.len(), "no partial file stays");
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_an_error_that_says_what_to_do() {
        let file = tempfile::NamedTempFile::new().expect("temporary file");
        let error = format!(
            "{:#}",
            unpack_into(file.path()).expect_err("a file is no directory")
        );
        assert!(error.contains("set XDG_CACHE_HOME, or give a MODEL"), "{error}");
    }
}
