//! What a config says of its quantisation. Informational (sizes, messages, `--quantization`): the loader decides the
//! format per module by the tensors it finds.

use serde_json::Value;

use crate::error::Result;
use crate::fields::Fields;
use crate::limits::{MAX_QUANT_GROUP, MAX_QUANT_PATTERNS};
use crate::model::{ModelSpec, tensor_name};
use crate::pattern;

#[derive(Clone, Debug, PartialEq)]
pub struct QuantSpec {
    pub format: QuantFormat,
    /// Modules left unquantised: names, parts of names, or `re:` patterns.
    pub not_converted: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QuantFormat {
    /// e4m3 with one F32 scale per `block` (rows, columns).
    Fp8Block { block: [usize; 2] },
    /// 4 bits, one scale per `group` inputs.
    Int4 {
        layout: Int4Layout,
        group: usize,
        zero_points: bool,
    },
}

/// How INT4 values lie in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Int4Layout {
    AwqGemm,
    Gptq,
    /// compressed-tensors `pack-quantized`.
    PackQuantized,
}

impl QuantSpec {
    /// The name vLLM's `--quantization` gives it.
    pub fn method(&self) -> &'static str {
        match self.format {
            QuantFormat::Fp8Block { .. } => "fp8",
            QuantFormat::Int4 { layout, .. } => match layout {
                Int4Layout::AwqGemm => "awq",
                Int4Layout::Gptq => "gptq",
                Int4Layout::PackQuantized => "compressed-tensors",
            },
        }
    }

    /// Whether a linear module of this name (without `.weight`) is quantised.
    pub fn covers(&self, module: &str) -> bool {
        !self.not_converted.iter().any(|p| pattern::matches(p, module))
    }
}

const SUPPORTED: &str = "supported: fp8 (e4m3, 128x128 blocks), awq (gemm), gptq (4 bits, no act order), compressed-tensors (pack-quantized, 4 bits)";

/// Reads `quantization_config`, if there is one, and checks that its groups divide the model's widths.
pub fn read(fields: &Fields<'_>, spec: &ModelSpec) -> Result<Option<QuantSpec>> {
    let Some(fields) = fields.object("quantization_config")? else {
        return Ok(None);
    };
    let quant = match fields.text("quant_method")? {
        Some("fp8") => fp8(&fields)?,
        Some("awq") => awq(&fields)?,
        Some("gptq") => gptq(&fields)?,
        Some("compressed-tensors") => compressed_tensors(&fields)?,
        _ => return Err(fields.error("quant_method", "not supported", SUPPORTED)),
    };
    check_groups(&fields, &quant, spec)?;
    Ok(Some(quant))
}

fn fp8(fields: &Fields<'_>) -> Result<QuantSpec> {
    if let Some(format) = fields.text("fmt")?
        && !matches!(format, "float8_e4m3fn" | "e4m3" | "e4m3fn")
    {
        return Err(fields.error("fmt", "not supported", SUPPORTED));
    }
    let side = |value: &Value| value.as_u64().filter(|&side| side == 128);
    match fields.get("weight_block_size").and_then(Value::as_array) {
        Some(block) if block.len() == 2 && block.iter().all(|value| side(value).is_some()) => {}
        _ => return Err(fields.error("weight_block_size", "not supported", SUPPORTED)),
    }
    Ok(QuantSpec {
        format: QuantFormat::Fp8Block { block: [128, 128] },
        not_converted: fields.texts("modules_to_not_convert", MAX_QUANT_PATTERNS)?,
    })
}

fn awq(fields: &Fields<'_>) -> Result<QuantSpec> {
    four_bits(fields, "bits")?;
    if fields
        .text("version")?
        .is_some_and(|v| !v.eq_ignore_ascii_case("gemm"))
    {
        return Err(fields.error("version", "not supported", SUPPORTED));
    }
    Ok(QuantSpec {
        format: QuantFormat::Int4 {
            layout: Int4Layout::AwqGemm,
            group: group(fields)?,
            zero_points: true,
        },
        not_converted: fields.texts("modules_to_not_convert", MAX_QUANT_PATTERNS)?,
    })
}

fn gptq(fields: &Fields<'_>) -> Result<QuantSpec> {
    four_bits(fields, "bits")?;
    if fields.flag("desc_act", false)? {
        return Err(fields.error("desc_act", "act order is not supported", SUPPORTED));
    }
    // GPTQModel's `dynamic`: a key `-:regex` leaves the modules it matches unquantised.
    let mut not_converted = fields.texts("modules_to_not_convert", MAX_QUANT_PATTERNS)?;
    if let Some(dynamic) = fields.object("dynamic")? {
        let excluded = dynamic.names().filter_map(|name| name.strip_prefix("-:"));
        not_converted.extend(excluded.map(|regex| format!("re:{regex}")));
    }
    if !fields.flag("lm_head", false)? {
        not_converted.push("lm_head".into());
    }
    Ok(QuantSpec {
        format: QuantFormat::Int4 {
            layout: Int4Layout::Gptq,
            group: group(fields)?,
            zero_points: true,
        },
        not_converted,
    })
}

fn compressed_tensors(fields: &Fields<'_>) -> Result<QuantSpec> {
    if fields.text("format")? != Some("pack-quantized") {
        return Err(fields.error("format", "not supported", SUPPORTED));
    }
    let groups = match fields.object("config_groups")? {
        Some(groups) => groups.objects()?,
        None => return Err(fields.error("config_groups", "one group is needed", SUPPORTED)),
    };
    let [only] = groups.as_slice() else {
        return Err(fields.error(
            "config_groups",
            "only one group of modules is supported",
            SUPPORTED,
        ));
    };
    let Some(weights) = only.object("weights")? else {
        return Err(only.error("weights", "a description of the weights is needed", SUPPORTED));
    };
    four_bits(&weights, "num_bits")?;
    weights.only("type", &Value::from("int"))?;
    weights.only("strategy", &Value::from("group"))?;
    Ok(QuantSpec {
        format: QuantFormat::Int4 {
            layout: Int4Layout::PackQuantized,
            group: group(&weights)?,
            zero_points: !weights.flag("symmetric", true)?,
        },
        not_converted: fields.texts("ignore", MAX_QUANT_PATTERNS)?,
    })
}

fn four_bits(fields: &Fields<'_>, name: &str) -> Result<()> {
    match fields.integer(name, 1..=64)? {
        Some(4) => Ok(()),
        _ => Err(fields.error(name, "not supported", SUPPORTED)),
    }
}

fn group(fields: &Fields<'_>) -> Result<usize> {
    let group = fields.required_integer("group_size", 8..=MAX_QUANT_GROUP)?;
    if !group.is_multiple_of(8) {
        return Err(fields.error(
            "group_size",
            "it must be a multiple of 8",
            "take it from the published config.json",
        ));
    }
    Ok(group)
}

/// INT4 groups must divide the inputs, and a word of eight values the outputs.
fn check_groups(fields: &Fields<'_>, quant: &QuantSpec, spec: &ModelSpec) -> Result<()> {
    let QuantFormat::Int4 { group, .. } = quant.format else {
        return Ok(());
    };
    let layer = &spec.layers[0];
    let mut widths = Vec::new();
    if quant.covers(&tensor_name(&spec.names.q, 0, 0)) {
        widths.push(("hidden_size", spec.hidden));
        widths.push(("num_attention_heads x head_dim", layer.attention.q_width()));
    }
    if quant.covers(&tensor_name(&spec.names.expert_gate, 0, 0)) {
        widths.push(("hidden_size", spec.hidden));
        widths.push(("intermediate_size", layer.moe.intermediate));
    }
    match widths.iter().find(|(_, width)| !width.is_multiple_of(group)) {
        None => Ok(()),
        Some((name, width)) => Err(fields.error(
            "quant_method",
            format!("groups of {group} do not divide {name} {width}"),
            "correct group_size or the width",
        )),
    }
}
