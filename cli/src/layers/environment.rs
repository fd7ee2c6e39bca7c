//! Settings in variables: `CONCLAVE_…`.

use std::collections::BTreeMap;

use figment::providers::Serialized;
use figment::value::{Dict, Map, Value};
use figment::{Metadata, Profile, Provider};

use super::keys::Keys;
use super::{LayerError, PREFIX};

/// What the layer of variables is called among figment's.
pub(super) const NAME: &str = "environment";

/// The variables that are settings.
pub(super) fn layer(environment: &BTreeMap<String, String>, keys: &Keys) -> Result<Environment, LayerError> {
    let mut dict = Dict::new();
    for (variable, value) in environment {
        let Some(key) = variable.strip_prefix(PREFIX) else {
            continue;
        };
        if is_service_link(variable, value, environment) {
            continue;
        }
        let key = key.to_ascii_lowercase();
        if !keys.known(&key) {
            return Err(LayerError::UnknownKey {
                origin: NAME.into(),
                key: variable.clone(),
                suggestion: keys
                    .closest(&key)
                    .map(|key| format!("{PREFIX}{}", key.to_ascii_uppercase())),
            });
        }
        if key != "config" {
            dict.insert(key, Value::from(value.as_str()));
        }
    }
    Ok(Environment(dict))
}

/// Kubernetes describes every service of a namespace to every container, in variables that begin with the service's
/// name: of one called `conclave-gateway`, CONCLAVE_GATEWAY_SERVICE_HOST, CONCLAVE_GATEWAY_PORT=tcp://…, and more.
fn is_service_link(variable: &str, value: &str, environment: &BTreeMap<String, String>) -> bool {
    let services = environment
        .keys()
        .filter_map(|key| key.strip_suffix("_SERVICE_HOST"));
    services
        .filter_map(|service| variable.strip_prefix(service))
        .any(|rest| {
            rest.starts_with("_SERVICE_")
                || rest == "_PORT" && value.contains("://")
                || rest
                    .strip_prefix("_PORT_")
                    .is_some_and(|port| port.starts_with(|c: char| c.is_ascii_digit()))
        })
}

pub(super) struct Environment(Dict);

impl Provider for Environment {
    fn metadata(&self) -> Metadata {
        Metadata::named(NAME)
    }

    fn data(&self) -> figment::error::Result<Map<Profile, Dict>> {
        Serialized::defaults(&self.0).data()
    }
}
