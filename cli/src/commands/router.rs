//! `conclave router`: one router, in this process.

use anyhow::Result;
use conclave_router::Router;

use crate::settings::RouterSettings;
use crate::{model_path, parts, signals};

pub async fn run(settings: &RouterSettings) -> Result<()> {
    let shutdown = signals::shutdown()?;
    let found = model_path::find(&settings.model)?;
    let mut config = parts::router(
        &settings.model,
        &found,
        &settings.engine,
        &settings.cluster,
        &settings.drain,
    )?;
    config.listen = parts::socket_address("host", &settings.host, settings.grpc_port)?;
    config.cluster_listen =
        parts::socket_address("cluster_host", &settings.cluster_host, settings.cluster_port)?;
    config.cluster_token = parts::cluster_token(settings.cluster_token.as_ref())?;
    config.expected_workers = settings.expected_workers;
    let mut router = Router::start(config).await?;
    println!("conclave router for {}", found.name);
    println!("  gRPC     http://{}", router.client_address());
    println!("  workers  http://{}", router.cluster_address());
    tokio::select! {
        () = shutdown.asked() => Ok(router.shut_down().await?),
        error = router.failed() => Err(error.into()),
    }
}
