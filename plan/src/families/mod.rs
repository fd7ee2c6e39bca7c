//! Families of models: one file each turns a `config.json` into a [`ModelSpec`]. A new family is a new file and a
//! line in [`FAMILIES`], not a new worker.

pub mod minimax_m2;

use serde_json::Value;

use crate::error::Result;
use crate::fields::Fields;
use crate::model::ModelSpec;

/// What is supported: `architectures[0]`, `model_type`, the reader.
pub const FAMILIES: &[Family] = &[Family {
    architecture: "MiniMaxM2ForCausalLM",
    model_type: "minimax_m2",
    models: "MiniMax-M2, M2.5, M2.7",
    read: minimax_m2::read,
}];

#[derive(Clone, Copy, Debug)]
pub struct Family {
    pub architecture: &'static str,
    pub model_type: &'static str,
    /// Published models of this family, for messages.
    pub models: &'static str,
    read: fn(&Fields<'_>) -> Result<ModelSpec>,
}

/// Finds the family by `architectures` (or, without it, by `model_type`) and reads the config.
pub fn read(fields: &Fields<'_>) -> Result<ModelSpec> {
    let model_type = fields.text("model_type")?;
    let architecture = match fields.get("architectures") {
        None => None,
        Some(Value::Array(list)) => list.first().and_then(Value::as_str),
        Some(_) => return Err(fields.error("architectures", "it must be a list of names", supported())),
    };
    let (field, family) = match (architecture, model_type) {
        (Some(name), _) => ("architectures", FAMILIES.iter().find(|f| f.architecture == name)),
        (None, name) => ("model_type", FAMILIES.iter().find(|f| Some(f.model_type) == name)),
    };
    let Some(family) = family else {
        return Err(fields.error(field, "not supported", supported()));
    };
    (family.read)(fields)
}

fn supported() -> String {
    let list: Vec<String> = FAMILIES
        .iter()
        .map(|f| format!("{} ({})", f.architecture, f.models))
        .collect();
    format!("supported: {}", list.join(", "))
}
