//! What Prometheus may scrape. vLLM's names where vLLM has the figure, `conclave:` for the rest.
//!
//! The registry appends `_total` to counters, as vLLM's own client library does.

mod names;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

use conclave_router_core::WorkerSnapshot;
use conclave_router_core::api::ClusterState;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tonic::Code;

use crate::sequencer::Inspection;
use names::{BETWEEN_TOKENS, CHOICES, FIRST_TOKEN, GRAMMAR, REQUEST, TOKENS};

type Seconds = Counter<f64, AtomicU64>;
type Ratio = Gauge<f64, AtomicU64>;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Finished {
    finished_reason: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Worker {
    worker: String,
    /// Empty outside of the current epoch.
    rank: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Refused {
    reason: &'static str,
}

/// All figures of one router.
pub struct Metrics {
    registry: Registry,
    running: Gauge,
    waiting: Gauge,
    kv_cache_usage: Ratio,
    prefix_cache_queries: Counter,
    prefix_cache_hits: Counter,
    prompt_tokens: Counter,
    generation_tokens: Counter,
    preemptions: Counter,
    success: Family<Finished, Counter>,
    refused: Family<Refused, Counter>,
    pub grammar_compile_time: Histogram,
    pub grammar_mask_time: Histogram,
    pub time_to_first_token: Histogram,
    pub inter_token_latency: Histogram,
    pub request_latency: Histogram,
    pub queue_time: Histogram,
    pub prefill_time: Histogram,
    pub decode_time: Histogram,
    pub time_per_output_token: Histogram,
    pub request_max_tokens: Histogram,
    pub request_n: Histogram,
    pub request_prompt_tokens: Histogram,
    pub request_generation_tokens: Histogram,
    workers: Gauge,
    epoch: Gauge,
    failed_epochs: Counter,
    pub workers_lost: Counter,
    state: Family<State, Gauge>,
    busy: Family<Worker, Seconds>,
    idle: Family<Worker, Seconds>,
    pages: Family<Worker, Gauge>,
    pages_referenced: Family<Worker, Gauge>,
    slots: Family<Worker, Gauge>,
    steps: Counter,
    pub slow_readers: Counter,
    /// Held while the core's figures are taken over and written.
    scrape: Mutex<()>,
}

impl Metrics {
    /// `model_name` becomes a label of every figure, as in vLLM.
    pub fn new(model_name: &str) -> Metrics {
        let labels = [
            ("model_name".into(), model_name.to_owned().into()),
            ("engine".into(), "0".into()),
        ];
        let mut metrics = Metrics {
            registry: Registry::with_labels(labels.into_iter()),
            running: Gauge::default(),
            waiting: Gauge::default(),
            kv_cache_usage: Ratio::default(),
            prefix_cache_queries: Counter::default(),
            prefix_cache_hits: Counter::default(),
            prompt_tokens: Counter::default(),
            generation_tokens: Counter::default(),
            preemptions: Counter::default(),
            success: Family::default(),
            refused: Family::default(),
            grammar_compile_time: Histogram::new(GRAMMAR),
            grammar_mask_time: Histogram::new(GRAMMAR),
            time_to_first_token: Histogram::new(FIRST_TOKEN),
            inter_token_latency: Histogram::new(BETWEEN_TOKENS),
            request_latency: Histogram::new(REQUEST),
            queue_time: Histogram::new(REQUEST),
            prefill_time: Histogram::new(REQUEST),
            decode_time: Histogram::new(REQUEST),
            time_per_output_token: Histogram::new(BETWEEN_TOKENS),
            request_max_tokens: Histogram::new(TOKENS),
            request_n: Histogram::new(CHOICES),
            request_prompt_tokens: Histogram::new(TOKENS),
            request_generation_tokens: Histogram::new(TOKENS),
            workers: Gauge::default(),
            epoch: Gauge::default(),
            failed_epochs: Counter::default(),
            workers_lost: Counter::default(),
            state: Family::default(),
            busy: Family::default(),
            idle: Family::default(),
            pages: Family::default(),
            pages_referenced: Family::default(),
            slots: Family::default(),
            steps: Counter::default(),
            scrape: Mutex::new(()),
            slow_readers: Counter::default(),
        };
        metrics.register_vllm();
        metrics.register_conclave();
        metrics
    }

    /// The text that Prometheus reads.
    fn text(&self) -> String {
        let mut text = String::new();
        if encode(&mut text, &self.registry).is_err() {
            tracing::error!("the metrics could not be written");
        }
        text
    }

    /// Takes over the core's figures; whoever scrapes at the same time waits.
    pub fn text_with(&self, inspection: &Inspection) -> String {
        let _one_at_a_time = self.scrape.lock().unwrap_or_else(PoisonError::into_inner);
        let core = &inspection.core;
        self.running.set(gauge(core.running));
        self.waiting.set(gauge(core.waiting));
        let sum = |of: fn(&WorkerSnapshot) -> u32| core.workers.iter().map(|w| u64::from(of(w))).sum::<u64>();
        let total = sum(|worker| worker.pages_total);
        self.kv_cache_usage
            .set(sum(WorkerSnapshot::pages_used) as f64 / (total.max(1)) as f64);
        let totals = [
            (&self.prefix_cache_queries, core.prefix_queries),
            (&self.prefix_cache_hits, core.prefix_hits),
            (&self.prompt_tokens, core.prompt_tokens),
            (&self.generation_tokens, core.generated_tokens),
            (&self.preemptions, core.preemptions),
            (&self.steps, core.steps),
            (&self.failed_epochs, core.failed_epochs),
        ];
        for (counter, total) in totals {
            counter.inner().store(total, Ordering::Relaxed);
        }
        self.workers.set(gauge(core.workers.len()));
        self.epoch.set(i64::try_from(core.epoch.0).unwrap_or(i64::MAX));
        self.state(core.state);
        self.per_worker(inspection);
        self.text()
    }

    /// Ids are drawn at random, so the figures of workers that are gone are forgotten.
    fn per_worker(&self, inspection: &Inspection) {
        self.busy.clear();
        self.idle.clear();
        self.pages.clear();
        self.pages_referenced.clear();
        self.slots.clear();
        for figures in &inspection.core.workers {
            let label = Worker {
                worker: inspection
                    .worker_ids
                    .get(&figures.worker)
                    .map_or_else(|| figures.worker.0.to_string(), ToString::to_string),
                rank: figures.rank.map_or_else(String::new, |rank| rank.to_string()),
            };
            let seconds = |micros: u64| (micros as f64 / 1e6).to_bits();
            let busy = self.busy.get_or_create_owned(&label);
            busy.inner().store(seconds(figures.busy_us), Ordering::Relaxed);
            let idle = self.idle.get_or_create_owned(&label);
            idle.inner().store(seconds(figures.idle_us), Ordering::Relaxed);
            let pages = self.pages.get_or_create_owned(&label);
            pages.set(figures.pages_total.into());
            let referenced = self.pages_referenced.get_or_create_owned(&label);
            referenced.set(figures.pages_used().into());
            self.slots.get_or_create_owned(&label).set(gauge(figures.running));
        }
    }

    fn state(&self, state: ClusterState) {
        let name = match state {
            ClusterState::Starting => "starting",
            ClusterState::Forming { .. } => "forming",
            ClusterState::Serving { .. } => "serving",
            ClusterState::Parked => "parked",
        };
        for known in ["starting", "forming", "serving", "parked"] {
            let gauge = self.state.get_or_create_owned(&State { state: known });
            gauge.set((known == name).into());
        }
    }

    pub fn finished(&self, finished_reason: &'static str) {
        self.success.get_or_create(&Finished { finished_reason }).inc();
    }

    pub fn refused(&self, code: Code) {
        let reason = names::of_code(code);
        self.refused.get_or_create(&Refused { reason }).inc();
    }
}

fn gauge(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
