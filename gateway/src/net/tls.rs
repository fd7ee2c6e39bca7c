//! TLS by rustls: certificate and key from PEM files, read again when they change.

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::config::TlsFiles;

/// How often the files' time stamps are looked at.
pub(crate) const RELOAD_INTERVAL: Duration = Duration::from_secs(1);
/// A PEM file larger than this is not one.
const FILE_BYTES_MAX: u64 = 1 << 20;

type Stamp = [(SystemTime, u64); 2];

pub(crate) struct Tls {
    files: TlsFiles,
    current: RwLock<(Stamp, TlsAcceptor)>,
}

impl Tls {
    /// # Errors
    /// A file that cannot be read or holds no certificate or key, or a key of another certificate.
    pub(crate) fn new(files: TlsFiles) -> anyhow::Result<Self> {
        let current = RwLock::new(load(&files)?);
        Ok(Self { files, current })
    }

    /// For the next connection; those that are open keep theirs.
    pub(super) fn acceptor(&self) -> TlsAcceptor {
        self.current
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .1
            .clone()
    }

    /// Reads the files if they changed since.
    pub(crate) fn reload(&self) -> anyhow::Result<()> {
        let stamp = stamps(&self.files)?;
        if self.current.read().is_ok_and(|current| current.0 == stamp) {
            return Ok(());
        }
        let loaded = load(&self.files)?;
        tracing::info!(certificate = %self.files.certificate.display(), "certificate loaded");
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = loaded;
        Ok(())
    }
}

fn load(files: &TlsFiles) -> anyhow::Result<(Stamp, TlsAcceptor)> {
    let stamp = stamps(files)?;
    let of = |path: &Path, what: &str| format!("{what} {}", path.display());
    let certificate = || of(&files.certificate, "tls certificate");
    let chain = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .with_context(certificate)?;
    anyhow::ensure!(!chain.is_empty(), "{}: holds no certificate", certificate());
    let key = PrivateKeyDer::from_pem_file(&files.key).with_context(|| of(&files.key, "tls key"))?;
    let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .context("tls: protocol versions")?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .with_context(|| {
            format!(
                "{}: does not go with {}",
                of(&files.key, "tls key"),
                certificate()
            )
        })?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok((stamp, TlsAcceptor::from(Arc::new(config))))
}

fn stamps(files: &TlsFiles) -> anyhow::Result<Stamp> {
    let one = |path: &Path| {
        let metadata = std::fs::metadata(path).with_context(|| format!("tls file {}", path.display()))?;
        anyhow::ensure!(
            metadata.len() <= FILE_BYTES_MAX,
            "tls file {}: {} bytes, at most {FILE_BYTES_MAX}",
            path.display(),
            metadata.len()
        );
        anyhow::Ok((metadata.modified()?, metadata.len()))
    };
    Ok([one(&files.certificate)?, one(&files.key)?])
}
