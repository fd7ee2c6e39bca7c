//! The table of `vllm bench serve`, line for line, and the workers' idle share.

use std::ops::Div;
use std::time::Duration;

use anyhow::Result;
use serde_json::{Map, Value, json};

use super::Timing;

pub struct Report {
    successful: usize,
    failed: usize,
    first_error: Option<String>,
    concurrency: usize,
    seconds: f64,
    input_tokens: u64,
    output_tokens: u64,
    ttft: Vec<Duration>,
    tpot: Vec<Duration>,
    itl: Vec<Duration>,
    idle_share: Option<f64>,
}

impl Report {
    pub fn of(
        results: Vec<Result<Timing>>,
        duration: Duration,
        concurrency: usize,
        idle_share: Option<f64>,
    ) -> Report {
        let mut report = Report {
            successful: 0,
            failed: 0,
            first_error: None,
            concurrency,
            seconds: duration.as_secs_f64(),
            input_tokens: 0,
            output_tokens: 0,
            ttft: Vec::new(),
            tpot: Vec::new(),
            itl: Vec::new(),
            idle_share,
        };
        for result in results {
            match result {
                Ok(timing) => report.add(&timing),
                Err(error) => {
                    report.failed += 1;
                    report.first_error.get_or_insert(format!("{error:#}"));
                }
            }
        }
        for times in [&mut report.ttft, &mut report.tpot, &mut report.itl] {
            times.sort_unstable();
        }
        report
    }

    fn add(&mut self, timing: &Timing) {
        self.successful += 1;
        self.input_tokens += u64::from(timing.prompt_tokens);
        self.output_tokens += u64::from(timing.tokens);
        self.ttft.push(timing.first);
        self.itl.extend(&timing.gaps);
        if timing.tokens > 1 {
            self.tpot
                .push(timing.total.saturating_sub(timing.first) / (timing.tokens - 1));
        }
    }

    pub fn print(&self) {
        print!("{}", self.render());
    }

    /// The table's figures under the names of `vllm bench serve --save-result`.
    pub fn json(&self) -> Value {
        let rate = |count: u64| count as f64 / self.seconds;
        let mut figures = Map::new();
        let mut put = |name: &str, value: Value| figures.insert(name.to_owned(), value);
        put("completed", json!(self.successful));
        put("failed", json!(self.failed));
        put("max_concurrency", json!(self.concurrency));
        put("duration", json!(self.seconds));
        put("total_input_tokens", json!(self.input_tokens));
        put("total_output_tokens", json!(self.output_tokens));
        put("request_throughput", json!(rate(self.successful as u64)));
        put("output_throughput", json!(rate(self.output_tokens)));
        put(
            "total_token_throughput",
            json!(rate(self.input_tokens + self.output_tokens)),
        );
        for (short, times) in [("ttft", &self.ttft), ("tpot", &self.tpot), ("itl", &self.itl)] {
            let ms = |time: Duration| json!(time.as_secs_f64() * 1e3);
            put(&format!("mean_{short}_ms"), ms(mean(times)));
            put(&format!("median_{short}_ms"), ms(percentile(times, 0.5)));
            put(&format!("p99_{short}_ms"), ms(percentile(times, 0.99)));
        }
        put("worker_idle_share", json!(self.idle_share));
        Value::Object(figures)
    }

    fn render(&self) -> String {
        let rate = |count: u64| format!("{:.2}", count as f64 / self.seconds);
        let mut lines = vec![
            centred(" Serving Benchmark Result ", '='),
            row("Successful requests:", &self.successful.to_string()),
            row("Failed requests:", &self.failed.to_string()),
            row("Maximum request concurrency:", &self.concurrency.to_string()),
            row("Benchmark duration (s):", &format!("{:.2}", self.seconds)),
            row("Total input tokens:", &self.input_tokens.to_string()),
            row("Total generated tokens:", &self.output_tokens.to_string()),
            row("Request throughput (req/s):", &rate(self.successful as u64)),
            row("Output token throughput (tok/s):", &rate(self.output_tokens)),
            row(
                "Total token throughput (tok/s):",
                &rate(self.input_tokens + self.output_tokens),
            ),
        ];
        for (title, short, times) in [
            ("Time to First Token", "TTFT", &self.ttft),
            ("Time per Output Token (excl. 1st token)", "TPOT", &self.tpot),
            ("Inter-token Latency", "ITL", &self.itl),
        ] {
            lines.push(centred(title, '-'));
            lines.push(row(&format!("Mean {short} (ms):"), &milliseconds(mean(times))));
            lines.push(row(
                &format!("Median {short} (ms):"),
                &milliseconds(percentile(times, 0.5)),
            ));
            lines.push(row(
                &format!("P99 {short} (ms):"),
                &milliseconds(percentile(times, 0.99)),
            ));
        }
        lines.push(centred("Workers", '-'));
        let idle = self
            .idle_share
            .map_or("not told".to_owned(), |share| format!("{:.1}", share * 100.0));
        lines.push(row("Idle between steps (%):", &idle));
        lines.push("=".repeat(WIDTH));
        lines.extend(
            self.first_error
                .iter()
                .map(|error| format!("first failure: {error}")),
        );
        lines.join("\n") + "\n"
    }
}

const WIDTH: usize = 50;

fn centred(title: &str, fill: char) -> String {
    let left = (WIDTH.saturating_sub(title.len())) / 2;
    let right = WIDTH.saturating_sub(title.len() + left);
    let side = |count: usize| fill.to_string().repeat(count);
    format!("{}{title}{}", side(left), side(right))
}

fn row(name: &str, value: &str) -> String {
    format!("{name:<40}{value:<10}")
}

fn milliseconds(time: Duration) -> String {
    format!("{:.2}", time.as_secs_f64() * 1e3)
}

fn mean(times: &[Duration]) -> Duration {
    let count = u32::try_from(times.len()).unwrap_or(u32::MAX).max(1);
    times.iter().sum::<Duration>().div(count)
}

/// Of sorted times, the one below which the share `q` of them lies; zero if there are none.
pub fn percentile(sorted: &[Duration], q: f64) -> Duration {
    let at = (sorted.len().saturating_sub(1)) as f64 * q;
    sorted.get(at.round() as usize).copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_of_few_and_many() {
        let ms = Duration::from_millis;
        assert_eq!(percentile(&[], 0.5), Duration::ZERO);
        assert_eq!(percentile(&[ms(3)], 0.99), ms(3));
        let many: Vec<Duration> = (0..=100).map(ms).collect();
        assert_eq!(
            (percentile(&many, 0.5), percentile(&many, 0.99)),
            (ms(50), ms(99))
        );
    }

    #[test]
    fn the_table_has_the_familiar_lines() {
        let lines = [
            centred(" Serving Benchmark Result ", '='),
            centred("Time to First Token", '-'),
        ];
        assert_eq!(lines[0], "============ Serving Benchmark Result ============");
        assert_eq!(lines[1], "---------------Time to First Token----------------");
        assert_eq!(
            row("Mean TTFT (ms):", "1.25"),
            format!("{:<40}1.25      ", "Mean TTFT (ms):")
        );
    }
}
