//! Logs to standard error, spans to an OpenTelemetry collector if one is given. Trace context crosses processes in
//! W3C form (`traceparent`).

use std::io::IsTerminal;
use std::time::Duration;

use anyhow::{Context, Result};
use opentelemetry::trace::TracerProvider as _;
use opentelemetry_otlp::WithExportConfig;
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::SdkTracerProvider;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::settings::{LogFormat, LogSettings};

/// One export to the collector may take so long; later spans wait in a bounded queue or are dropped.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// The last spans are sent for at most so long when the process ends.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(2);

/// Flushes spans when dropped.
#[derive(Debug)]
pub struct Telemetry {
    provider: Option<SdkTracerProvider>,
}

/// Starts logging, and exporting if asked for; `process` names this one (`conclave-router`). Needs a tokio runtime.
pub fn start(settings: &LogSettings, process: &'static str) -> Result<Telemetry> {
    let filter = EnvFilter::try_new(&settings.log).with_context(|| {
        format!(
            "--log is {:?}: give a level or targets with levels, e.g. info,conclave_router=debug",
            settings.log
        )
    })?;
    let terminal = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(terminal);
    let lines = match settings.log_format {
        LogFormat::Pretty => lines.boxed(),
        LogFormat::Json => lines.json().flatten_event(true).boxed(),
    };
    let provider = settings
        .otlp_endpoint
        .as_deref()
        .map(|endpoint| exporter(endpoint, process))
        .transpose()?;
    let spans = provider.as_ref().map(|provider| {
        opentelemetry::global::set_text_map_propagator(TraceContextPropagator::new());
        tracing_opentelemetry::layer().with_tracer(provider.tracer(process))
    });
    tracing_subscriber::registry()
        .with(filter)
        .with(lines)
        .with(spans)
        .try_init()
        .context("logging was started twice")?;
    Ok(Telemetry { provider })
}

fn exporter(endpoint: &str, process: &'static str) -> Result<SdkTracerProvider> {
    let exporter = opentelemetry_otlp::SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint)
        .with_timeout(EXPORT_TIMEOUT)
        .build()
        .with_context(|| {
            format!("--otlp-endpoint is {endpoint:?}: give an address such as http://localhost:4317")
        })?;
    let resource = Resource::builder().with_service_name(process);
    Ok(SdkTracerProvider::builder()
        .with_batch_exporter(exporter)
        .with_resource(resource.build())
        .build())
}

impl Drop for Telemetry {
    fn drop(&mut self) {
        if let Some(provider) = self.provider.take()
            && let Err(error) = provider.shutdown_with_timeout(FLUSH_TIMEOUT)
        {
            eprintln!("conclave: the last spans were not delivered: {error}");
        }
    }
}
