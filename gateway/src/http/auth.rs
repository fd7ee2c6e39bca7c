//! API keys: from flags, environment and a file that is read again when it changes.
//!
//! Keys are kept and compared as SHA-256 digests, every known key each time, so that neither a key's length
//! nor its first characters show in the time an answer takes.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use anyhow::Context as _;
use http::{HeaderMap, HeaderName, StatusCode, header};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::error::{ApiError, ApiResult};
use super::keyring;
use super::quota::{KeyLimits, Quota};

/// Anthropic's clients send their key here.
const X_API_KEY: HeaderName = HeaderName::from_static("x-api-key");
/// How often the key file's time stamp is looked at.
pub(crate) const RELOAD_INTERVAL: Duration = Duration::from_secs(1);
/// A key file larger than this is not one.
const KEY_FILE_BYTES_MAX: u64 = 1 << 20;

type KeyDigest = [u8; 32];

/// Who makes a request, as far as keys tell.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) enum Caller {
    /// The gateway is open, or the route is.
    #[default]
    Anyone,
    Key(KeyDigest),
}

/// A key and what it has used.
struct Known {
    key: KeyDigest,
    quota: Arc<Quota>,
}

/// The keys in force.
pub(crate) struct Keys {
    fixed: Vec<Known>,
    file: Option<PathBuf>,
    /// Limits of keys that have none of their own.
    limits: KeyLimits,
    /// Without keys all clients share one quota.
    anyone: Arc<Quota>,
    /// With the stamp of the file they came from.
    loaded: RwLock<(Option<Stamp>, Arc<[Known]>)>,
}

type Stamp = (SystemTime, u64);

impl Keys {
    /// # Errors
    /// An empty key, and a key file that cannot be read: an open gateway must be asked for, not fallen into.
    pub(crate) fn new(fixed: &[String], file: Option<PathBuf>, limits: KeyLimits) -> anyhow::Result<Self> {
        anyhow::ensure!(
            fixed.iter().all(|key| !key.trim().is_empty()),
            "api key: must not be empty"
        );
        let now = Instant::now();
        let known = |key: &String| Known {
            key: digest(key.trim()),
            quota: Arc::new(Quota::new(limits, now)),
        };
        let keys = Self {
            fixed: fixed.iter().map(known).collect(),
            file,
            limits,
            anyone: Arc::new(Quota::new(limits, now)),
            loaded: RwLock::new((None, Arc::from([]))),
        };
        keys.reload()?;
        Ok(keys)
    }

    /// Whether anyone may come in.
    pub(crate) fn open(&self) -> bool {
        self.fixed.is_empty() && self.file.is_none()
    }

    /// Reads the key file if it changed since. A key that stays keeps what it has used.
    pub(crate) fn reload(&self) -> anyhow::Result<()> {
        let Some(path) = &self.file else { return Ok(()) };
        let stamp = stamp(path)?;
        if self.loaded.read().is_ok_and(|loaded| loaded.0 == Some(stamp)) {
            return Ok(());
        }
        let of = || format!("api key file {}", path.display());
        let text = std::fs::read_to_string(path).with_context(of)?;
        let parsed = keyring::parse(&text, self.limits).with_context(of)?;
        let mut loaded = self.loaded.write().unwrap_or_else(PoisonError::into_inner);
        let known = |(key, limits): &(&str, KeyLimits)| {
            let key = digest(key);
            let same = loaded
                .1
                .iter()
                .find(|old| old.key == key && old.quota.limits() == *limits);
            let quota = same.map_or_else(
                || Arc::new(Quota::new(*limits, Instant::now())),
                |old| old.quota.clone(),
            );
            Known { key, quota }
        };
        let keys: Arc<[Known]> = parsed.iter().map(known).collect();
        tracing::info!(file = %path.display(), keys = keys.len(), "api keys loaded");
        *loaded = (Some(stamp), keys);
        Ok(())
    }

    /// Finds the key that a request presents.
    ///
    /// # Errors
    /// 401 in every case but a known key, presented once.
    pub(crate) fn check(&self, headers: &HeaderMap) -> ApiResult<(Caller, Arc<Quota>)> {
        if self.open() {
            return Ok((Caller::Anyone, self.anyone.clone()));
        }
        let presented = presented(headers)?;
        let given = digest(presented);
        let loaded = self
            .loaded
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .1
            .clone();
        let mut found = None;
        for known in self.fixed.iter().chain(loaded.iter()) {
            // Every key is compared, also after the right one.
            if bool::from(known.key.ct_eq(&given)) {
                found = Some(known.quota.clone());
            }
        }
        match found {
            Some(quota) => Ok((Caller::Key(given), quota)),
            None => Err(denied("the API key is not known")),
        }
    }
}

/// The key of a request. Anthropic's clients send it under both names where they were given it under both.
fn presented(headers: &HeaderMap) -> ApiResult<&str> {
    match (only(headers, header::AUTHORIZATION)?, only(headers, X_API_KEY)?) {
        (Some(bearer), None) => token(bearer),
        (None, Some(key)) => Ok(key),
        (Some(bearer), Some(key)) if token(bearer)? == key => Ok(key),
        (Some(_), Some(_)) => Err(denied(
            "Authorization and x-api-key carry two different API keys: send one of them",
        )),
        (None, None) => Err(denied("no API key: send it as \"Authorization: Bearer KEY\"")),
    }
}

/// A header that may be there once.
fn only(headers: &HeaderMap, name: HeaderName) -> ApiResult<Option<&str>> {
    let mut values = headers.get_all(name).iter();
    let Some(value) = values.next() else {
        return Ok(None);
    };
    if values.next().is_some() {
        return Err(denied("more than one API key was sent"));
    }
    let text = value
        .to_str()
        .map_err(|_| denied("the API key is not plain ASCII"))?;
    Ok(Some(text))
}

fn token(authorization: &str) -> ApiResult<&str> {
    match authorization.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Ok(key.trim_start()),
        _ => Err(denied("the Authorization header must be \"Bearer KEY\"")),
    }
}

fn denied(message: &str) -> ApiError {
    ApiError::new(StatusCode::UNAUTHORIZED, message).code("invalid_api_key")
}

fn digest(key: &str) -> KeyDigest {
    Sha256::digest(key.as_bytes()).into()
}

fn stamp(path: &Path) -> anyhow::Result<Stamp> {
    let of = || format!("api key file {}: cannot be read", path.display());
    let metadata = std::fs::metadata(path).with_context(of)?;
    anyhow::ensure!(
        metadata.len() <= KEY_FILE_BYTES_MAX,
        "api key file {}: {} bytes, at most {KEY_FILE_BYTES_MAX}",
        path.display(),
        metadata.len()
    );
    Ok((metadata.modified().with_context(of)?, metadata.len()))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn with(pairs: &[(HeaderName, &str)]) -> HeaderMap {
        pairs.iter().fold(HeaderMap::new(), |mut headers, (name, value)| {
            headers.append(name, HeaderValue::from_str(value).unwrap());
            headers
        })
    }

    #[test]
    fn only_a_known_key_presented_once_gets_in() {
        let keys = Keys::new(
            &[String::from("secret"), String::from("other")],
            None,
            KeyLimits::default(),
        )
        .unwrap();
        let bearer = |value| with(&[(header::AUTHORIZATION, value)]);
        for good in [
            bearer("Bearer secret"),
            bearer("bearer other"),
            with(&[(X_API_KEY, "secret")]),
            with(&[(header::AUTHORIZATION, "Bearer secret"), (X_API_KEY, "secret")]),
        ] {
            assert!(keys.check(&good).is_ok(), "{good:?}");
        }
        for bad in [
            with(&[]),
            bearer(""),
            bearer("secret"),
            bearer("Bearer"),
            bearer("Bearer "),
            bearer("Bearer secre"),
            bearer("Bearer secret2"),
            bearer("Bearer SECRET"),
            bearer("Bearer secret other"),
            bearer("Basic secret"),
            with(&[
                (header::AUTHORIZATION, "Bearer secret"),
                (header::AUTHORIZATION, "Bearer secret"),
            ]),
            with(&[(header::AUTHORIZATION, "Bearer wrong"), (X_API_KEY, "secret")]),
            with(&[(header::AUTHORIZATION, "Bearer other"), (X_API_KEY, "secret")]),
            with(&[(X_API_KEY, "secret"), (X_API_KEY, "secret")]),
        ] {
            let error = keys.check(&bad).err().unwrap();
            assert_eq!(error.status, StatusCode::UNAUTHORIZED, "{bad:?}");
        }
    }

    #[test]
    fn a_key_file_is_read_again_and_never_opens_the_gateway() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys");
        assert!(Keys::new(&[], Some(path.clone()), KeyLimits::default()).is_err());
        std::fs::write(&path, "# team a\none # the first\n\n").unwrap();
        let keys = Keys::new(&[], Some(path.clone()), KeyLimits::default()).unwrap();
        let key = |key: &str| keys.check(&with(&[(X_API_KEY, key)])).is_ok();
        assert!(key("one") && !key("two") && !key(""));
        std::fs::write(&path, "two rpm=x\n").unwrap();
        assert!(keys.reload().is_err());
        assert!(key("one") && !key("two"));
        std::fs::write(&path, "two\nthree rpm=5\n").unwrap();
        keys.reload().unwrap();
        assert!(!key("one") && key("two") && key("three"));
        std::fs::write(&path, "").unwrap();
        keys.reload().unwrap();
        assert!(!keys.open() && !key("two"));
        std::fs::remove_file(&path).unwrap();
        assert!(keys.reload().is_err());
    }
}
