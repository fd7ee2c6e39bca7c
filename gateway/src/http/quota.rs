//! Bounds per API key: requests and tokens a minute, and requests at one time.
//!
//! Rates are token buckets of one minute's size. Tokens are known only at an answer's end, so a key may overdraw
//! its bucket by the requests that run, and waits until it is paid back.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::error::{ApiError, ApiResult};

/// What one key may use. `None`: unbounded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KeyLimits {
    /// Requests a minute.
    pub requests_per_minute: Option<u32>,
    /// Tokens a minute, of prompts and answers.
    pub tokens_per_minute: Option<u32>,
    /// Requests at one time.
    pub concurrent: Option<u32>,
}

/// One key's use.
pub(crate) struct Quota {
    limits: KeyLimits,
    state: Mutex<State>,
}

struct State {
    requests: Bucket,
    tokens: Bucket,
    running: u32,
}

/// Filled to `size` over a minute. May be overdrawn.
#[derive(Clone, Copy)]
struct Bucket {
    size: f64,
    level: f64,
    at: Instant,
}

impl Bucket {
    fn new(size: u32, now: Instant) -> Self {
        Self {
            size: f64::from(size),
            level: f64::from(size),
            at: now,
        }
    }

    fn fill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.at).as_secs_f64() * self.size / 60.0;
        self.level = (self.level + gained).min(self.size);
        self.at = now;
    }

    /// Until `amount` is there; `None` when it never will be.
    fn wait_for(&self, amount: f64) -> Option<Duration> {
        (amount <= self.size)
            .then(|| Duration::from_secs_f64((amount - self.level).max(0.0) * 60.0 / self.size))
    }
}

impl Quota {
    pub(crate) fn new(limits: KeyLimits, now: Instant) -> Self {
        let bucket = |size: Option<u32>| Bucket::new(size.unwrap_or(0), now);
        let state = State {
            requests: bucket(limits.requests_per_minute),
            tokens: bucket(limits.tokens_per_minute),
            running: 0,
        };
        Self {
            limits,
            state: Mutex::new(state),
        }
    }

    pub(crate) fn limits(&self) -> KeyLimits {
        self.limits
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets one request in, and counts it until the guard is dropped.
    ///
    /// # Errors
    /// 429 with the time to wait; nothing was used up then.
    pub(crate) fn admit(self: &Arc<Self>, now: Instant) -> ApiResult<Admission> {
        let mut state = self.lock();
        state.requests.fill(now);
        state.tokens.fill(now);
        if let Some(limit) = self.limits.concurrent
            && state.running >= limit
        {
            return Err(exceeded(
                format!("{limit} requests of this key are running"),
                Duration::from_secs(1),
            ));
        }
        if let Some(limit) = self.limits.requests_per_minute {
            if state.requests.level < 1.0 {
                let wait = state.requests.wait_for(1.0).unwrap_or(Duration::from_secs(60));
                return Err(exceeded(
                    format!("this key may make {limit} requests a minute"),
                    wait,
                ));
            }
            state.requests.level -= 1.0;
        }
        if let Some(limit) = self.limits.tokens_per_minute
            && state.tokens.level < 1.0
        {
            // The request was not made: it costs none.
            state.requests.level += 1.0;
            let wait = state.tokens.wait_for(1.0).unwrap_or(Duration::from_secs(60));
            return Err(exceeded(
                format!("this key may use {limit} tokens a minute"),
                wait,
            ));
        }
        state.running += 1;
        Ok(Admission(self.clone()))
    }

    /// OpenAI's headers about what is left.
    pub(crate) fn write_headers(&self, headers: &mut HeaderMap) {
        let state = self.lock();
        let mut write = |what: &str, limit: Option<u32>, bucket: &Bucket| {
            let Some(limit) = limit else { return };
            let wait = bucket.wait_for(bucket.size).unwrap_or_default();
            for (name, value) in [
                ("limit", limit.to_string()),
                ("remaining", format!("{:.0}", bucket.level.max(0.0).floor())),
                ("reset", format!("{:.3}s", wait.as_secs_f64())),
            ] {
                let name = HeaderName::try_from(format!("x-ratelimit-{name}-{what}"));
                if let (Ok(name), Ok(value)) = (name, HeaderValue::from_str(&value)) {
                    headers.insert(name, value);
                }
            }
        };
        write("requests", self.limits.requests_per_minute, &state.requests);
        write("tokens", self.limits.tokens_per_minute, &state.tokens);
    }
}

fn exceeded(message: String, wait: Duration) -> ApiError {
    let message = format!("{message}: try again in {:.1} s", wait.as_secs_f64().max(0.1));
    ApiError::new(StatusCode::TOO_MANY_REQUESTS, message)
        .code("rate_limit_exceeded")
        .retry_after(wait)
}

/// A request that was let in.
pub(crate) struct Admission(Arc<Quota>);

impl Admission {
    /// Takes what the request used from its key's tokens.
    pub(crate) fn charge(&self, tokens: u64) {
        if self.0.limits.tokens_per_minute.is_some() {
            self.0.lock().tokens.level -= tokens as f64;
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        self.0.lock().running -= 1;
    }
}

impl std::fmt::Debug for Admission {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Admission").field(&self.0.limits).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(limits: KeyLimits, now: Instant) -> Arc<Quota> {
        Arc::new(Quota::new(limits, now))
    }

    #[test]
    fn requests_come_back_with_time() {
        let start = Instant::now();
        let quota = quota(
            KeyLimits {
                requests_per_minute: Some(2),
                ..Default::default()
            },
            start,
        );
        assert!(quota.admit(start).is_ok() && quota.admit(start).is_ok());
        let error = quota.admit(start).unwrap_err();
        assert_eq!(
            (error.status.as_u16(), error.retry_after),
            (429, Some(Duration::from_secs(30)))
        );
        assert!(quota.admit(start + Duration::from_secs(31)).is_ok());
        assert!(quota.admit(start + Duration::from_secs(32)).is_err());
    }

    #[test]
    fn tokens_may_be_overdrawn_and_are_paid_back() {
        let start = Instant::now();
        let limits = KeyLimits {
            requests_per_minute: Some(9),
            tokens_per_minute: Some(60),
            ..Default::default()
        };
        let quota = quota(limits, start);
        quota.admit(start).unwrap().charge(90);
        let error = quota.admit(start).unwrap_err();
        assert_eq!(error.retry_after, Some(Duration::from_secs(31)));
        assert!(quota.admit(start + Duration::from_secs(29)).is_err());
        assert!(quota.admit(start + Duration::from_secs(31)).is_ok());
        assert!(
            (quota.lock().requests.level - 8.0).abs() < 1.0,
            "refused requests cost none"
        );
    }

    #[test]
    fn running_requests_are_counted_until_they_end() {
        let now = Instant::now();
        let quota = quota(
            KeyLimits {
                concurrent: Some(1),
                ..Default::default()
            },
            now,
        );
        let first = quota.admit(now).unwrap();
        assert!(quota.admit(now).is_err());
        drop(first);
        assert!(quota.admit(now).is_ok());
    }
}
