//! What each figure is called, with its line of help, and the buckets of those that are distributions.

use tonic::Code;

use super::Metrics;

/// vLLM's bounds of time to first token, in seconds.
pub(super) const FIRST_TOKEN: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
];
/// vLLM's bounds of the time between tokens, in seconds.
pub(super) const BETWEEN_TOKENS: [f64; 17] = [
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0,
];
/// vLLM's bounds of whole requests and their phases, in seconds.
pub(super) const REQUEST: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
];
/// Bounds of token counts: 1-2-5 up to the longest context.
pub(super) const TOKENS: [f64; 18] = [
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1e3, 2e3, 5e3, 1e4, 2e4, 5e4, 1e5, 2e5, 5e5,
];

/// Bounds of work on grammars, in seconds: a mask should take tens of microseconds, compiling may take a second.
pub(super) const GRAMMAR: [f64; 15] = [
    10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 0.01, 0.02, 0.05, 0.1, 0.5, 1.0,
];

/// vLLM's bounds of `n`.
pub(super) const CHOICES: [f64; 5] = [1.0, 2.0, 5.0, 10.0, 20.0];

/// gRPC's name of a code, as its specification spells it, in small letters.
pub(super) fn of_code(code: Code) -> &'static str {
    match code {
        Code::Ok => "ok",
        Code::Cancelled => "cancelled",
        Code::Unknown => "unknown",
        Code::InvalidArgument => "invalid_argument",
        Code::DeadlineExceeded => "deadline_exceeded",
        Code::NotFound => "not_found",
        Code::AlreadyExists => "already_exists",
        Code::PermissionDenied => "permission_denied",
        Code::ResourceExhausted => "resource_exhausted",
        Code::FailedPrecondition => "failed_precondition",
        Code::Aborted => "aborted",
        Code::OutOfRange => "out_of_range",
        Code::Unimplemented => "unimplemented",
        Code::Internal => "internal",
        Code::Unavailable => "unavailable",
        Code::DataLoss => "data_loss",
        Code::Unauthenticated => "unauthenticated",
    }
}

impl Metrics {
    pub(super) fn register_vllm(&mut self) {
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
        // Names of vLLM's before, which the dashboard that comes with it still reads.
        r.register(
            "vllm:gpu_cache_usage_perc",
            "As vllm:kv_cache_usage_perc",
            self.kv_cache_usage.clone(),
        );
        r.register(
            "vllm:time_per_output_token_seconds",
            "As vllm:inter_token_latency_seconds",
            self.inter_token_latency.clone(),
        );
        r.register(
            "vllm:request_max_num_generation_tokens",
            "As vllm:request_generation_tokens",
            self.request_generation_tokens.clone(),
        );
    }

    pub(super) fn register_conclave(&mut self) {
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
}
