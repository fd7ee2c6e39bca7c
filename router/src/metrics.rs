//! What Prometheus may scrape. vLLM's names where vLLM has the figure, `conclave:` for the rest.
//!
//! The registry appends `_total` to counters, as vLLM's own client library does.

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

use crate::sequencer::Inspection;

type Seconds = Counter<f64, AtomicU64>;
type Ratio = Gauge<f64, AtomicU64>;

/// vLLM's bounds of time to first token, in seconds.
const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's bounds of the time between tokens, in seconds.
const BETWEEN_TOKENS: [f64; 17] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
];
/// vLLM's bounds of whole requests and their phases, in seconds.
const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// Bounds of token counts: 1-2-5 up to the longest context.
const TOKENS: [f64; 18] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5,
];

/// Bounds of work on grammars, in seconds: a mask should take tens of microseconds, compiling may take a second.
const GRAMMAR: [f64; 15] = [
    10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0,
];

/// vLLM's bounds of `n`.
const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

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

    fn register_vllm(&mut self) {
        let r = &mut self.registry;
        r.register(
            "vllm:num_requests_running",
            "Sequences that hold a slot",
            self.running.clone(),
        );
        r.register(
            "vllm:num_requests_waiting",
            "Sequences that wait for a slot",
            self.waiting.clone(),
        );
        r.register(
            "vllm:kv_cache_usage_perc",
            "KV pages in use, 1 is all",
            self.kv_cache_usage.clone(),
        );
        r.register(
            "vllm:prefix_cache_queries",
            "Prompt tokens looked up in the prefix cache",
            self.prefix_cache_queries.clone(),
        );
        r.register(
            "vllm:prefix_cache_hits",
            "Prompt tokens found in the prefix cache",
            self.prefix_cache_hits.clone(),
        );
        r.register(
            "vllm:prompt_tokens",
            "Prompt tokens computed",
            self.prompt_tokens.clone(),
        );
        r.register(
            "vllm:generation_tokens",
            "Tokens delivered",
            self.generation_tokens.clone(),
        );
        r.register(
            "vllm:num_preemptions",
            "Sequences that made room for others",
            self.preemptions.clone(),
        );
        r.register(
            "vllm:request_success",
            "Finished sequences by reason",
            self.success.clone(),
        );
        r.register(
            "vllm:time_to_first_token_seconds",
            "From the request's arrival to its first token",
            self.time_to_first_token.clone(),
        );
        r.register(
            "vllm:inter_token_latency_seconds",
            "Between tokens of one sequence",
            self.inter_token_latency.clone(),
        );
        r.register(
            "vllm:e2e_request_latency_seconds",
            "From a request's arrival to its end",
            self.request_latency.clone(),
        );
        r.register(
            "vllm:request_queue_time_seconds",
            "From a request's arrival to its first slot",
            self.queue_time.clone(),
        );
        r.register(
            "vllm:request_prefill_time_seconds",
            "From a sequence's first slot to its first token",
            self.prefill_time.clone(),
        );
        r.register(
            "vllm:request_decode_time_seconds",
            "From a sequence's first token to its last",
            self.decode_time.clone(),
        );
        r.register(
            "vllm:request_time_per_output_token_seconds",
            "Mean time between a sequence's tokens",
            self.time_per_output_token.clone(),
        );
        r.register(
            "vllm:request_params_max_tokens",
            "Tokens a request may generate",
            self.request_max_tokens.clone(),
        );
        r.register(
            "vllm:request_params_n",
            "Choices of a request",
            self.request_n.clone(),
        );
        r.register(
            "vllm:request_prompt_tokens",
            "Prompt tokens of a request",
            self.request_prompt_tokens.clone(),
        );
        r.register(
            "vllm:request_generation_tokens",
            "Tokens of a sequence",
            self.request_generation_tokens.clone(),
        );
    }

    fn register_conclave(&mut self) {
        let r = &mut self.registry;
        r.register("conclave:workers", "Attached workers", self.workers.clone());
        r.register(
            "conclave:grammar_compile_seconds",
            "Compiling what an output is held to",
            self.grammar_compile_time.clone(),
        );
        r.register(
            "conclave:grammar_mask_seconds",
            "Finding the tokens that may come next, for one sequence and step",
            self.grammar_mask_time.clone(),
        );
        r.register(
            "conclave:workers_lost",
            "Workers lost since the start",
            self.workers_lost.clone(),
        );
        r.register(
            "conclave:epoch",
            "Number of the current epoch",
            self.epoch.clone(),
        );
        r.register(
            "conclave:failed_epochs",
            "Epochs that ended by a loss or a failure",
            self.failed_epochs.clone(),
        );
        r.register(
            "conclave:cluster_state",
            "1 for the state the cluster is in",
            self.state.clone(),
        );
        r.register(
            "conclave:worker_busy_seconds",
            "Time the device of a worker ran steps",
            self.busy.clone(),
        );
        r.register(
            "conclave:worker_idle_seconds",
            "Time the device of a worker stood still between steps",
            self.idle.clone(),
        );
        r.register(
            "conclave:steps",
            "Steps that all ranks have completed",
            self.steps.clone(),
        );
        r.register("conclave:kv_pages", "KV pages of a worker", self.pages.clone());
        r.register(
            "conclave:kv_pages_referenced",
            "KV pages of a worker that running sequences hold",
            self.pages_referenced.clone(),
        );
        r.register(
            "conclave:worker_slots_used",
            "Slots of a worker that running sequences hold",
            self.slots.clone(),
        );
        r.register(
            "conclave:requests_refused",
            "Requests refused by reason",
            self.refused.clone(),
        );
        r.register(
            "conclave:slow_readers",
            "Streams ended because their client did not read",
            self.slow_readers.clone(),
        );
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

    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Refused { reason }).inc();
    }
}

fn gauge(n: usize) -> i64 {
    i64::try_from(n).unwrap_or(i64::MAX)
}
