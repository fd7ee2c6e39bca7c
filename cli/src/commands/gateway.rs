//! `conclave gateway`: HTTP in front of routers, in this process.

use anyhow::Result;
use conclave_gateway::Gateway;

use crate::settings::GatewaySettings;
use crate::{parts, signals};

pub async fn run(settings: &GatewaySettings) -> Result<()> {
    let shutdown = signals::shutdown()?;
    let routers = settings.router.iter().map(|router| with_scheme(router)).collect();
    let config = parts::gateway(&settings.http, &settings.drain, routers)?;
    let scheme = if config.tls.is_some() { "https" } else { "http" };
    let gateway = Gateway::bind(config).await?;
    println!("conclave gateway");
    println!("  HTTP  {scheme}://{}", gateway.local_addr());
    gateway.serve(async move { shutdown.asked().await }).await
}

fn with_scheme(router: &str) -> String {
    if router.contains("://") {
        router.to_owned()
    } else {
        format!("http://{router}")
    }
}
