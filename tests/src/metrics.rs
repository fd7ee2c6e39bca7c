//! Reads figures out of the Prometheus text of `/metrics`.

use std::time::{Duration, Instant};

use crate::Client;

/// The sum over all label sets of a metric; `None` if it is not there.
pub fn value(text: &str, name: &str) -> Option<f64> {
    let of_metric = |line: &&str| {
        line.strip_prefix(name)
            .is_some_and(|rest| rest.starts_with(['{', ' ']))
    };
    let values: Vec<f64> = text
        .lines()
        .filter(of_metric)
        .filter_map(|l| l.rsplit(' ').next()?.parse().ok())
        .collect();
    (!values.is_empty()).then(|| values.iter().sum())
}

/// Waits until a metric has a value that `wanted` accepts.
pub fn wait_for(client: &Client, name: &str, within: Duration, wanted: impl Fn(f64) -> bool) {
    let deadline = Instant::now() + within;
    loop {
        let text = client.get_text("/metrics");
        let now = value(&text, name);
        if now.is_some_and(&wanted) {
            return;
        }
        assert!(
            Instant::now() < deadline,
            "{name} is {now:?} after {within:?}:\n{text}"
        );
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests {
    use super::value;

    #[test]
    fn sums_over_labels_and_tells_names_apart() {
        let text = "# TYPE a gauge\na{x=\"1\"} 2\na{x=\"2\"} 3\nab 7\n";
        assert_eq!(value(text, "a"), Some(5.0));
        assert_eq!(value(text, "ab"), Some(7.0));
        assert_eq!(value(text, "b"), None);
    }
}
