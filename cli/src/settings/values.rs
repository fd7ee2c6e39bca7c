//! How values are written: times, sizes and counts with their units.

use std::time::Duration;

/// `30`, `30s`, `500ms`, `2m`: a plain number is seconds.
pub fn duration(text: &str) -> Result<Duration, String> {
    let wrong = || "it must be a time such as 30, 30s, 500ms or 2m".to_owned();
    let digits = text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let scale = match unit {
        "" | "s" => 1.0,
        "ms" => 1e-3,
        "m" | "min" => 60.0,
        "h" => 3600.0,
        _ => return Err(wrong()),
    };
    let number: f64 = number.trim().parse().map_err(|_| wrong())?;
    Duration::try_from_secs_f64(number * scale).map_err(|_| wrong())
}

/// `4096`, `512MiB`, `4G` (10^9), `4GiB` (2^30).
pub fn bytes(text: &str) -> Result<u64, String> {
    scaled(
        text,
        &[
            ("KiB", 1 << 10),
            ("MiB", 1 << 20),
            ("GiB", 1 << 30),
            ("TiB", 1 << 40),
            ("KB", 1_000),
            ("MB", 1_000_000),
            ("GB", 1_000_000_000),
            ("TB", 1_000_000_000_000),
            ("K", 1_000),
            ("M", 1_000_000),
            ("G", 1_000_000_000),
            ("B", 1),
        ],
    )
    .ok_or_else(|| "it must be a number of bytes such as 4096, 512MiB or 4GB".into())
}

/// `32768`, `32k` (32,000) or `32K` (32,768), as vLLM reads `--max-model-len`.
pub fn tokens(text: &str) -> Result<u32, String> {
    scaled(
        text,
        &[("k", 1_000), ("K", 1 << 10), ("m", 1_000_000), ("M", 1 << 20)],
    )
    .and_then(|count| u32::try_from(count).ok())
    .filter(|&count| count > 0)
    .ok_or_else(|| "it must be a number of tokens such as 32768, 32k (32,000) or 32K (32,768)".into())
}

/// A number above 0 and at most 1.
pub fn fraction(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value <= 1.0 => Ok(value),
        _ => Err("it must be a number above 0 and at most 1".into()),
    }
}

/// A number above 0.
pub fn rate(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(value) if value > 0.0 && value.is_finite() => Ok(value),
        _ => Err("it must be a number above 0".into()),
    }
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let found = units
        .iter()
        .find_map(|(unit, scale)| Some((text.strip_suffix(unit)?, *scale)));
    let (number, scale) = found.unwrap_or((text, 1));
    let number = number.trim();
    if let Ok(whole) = number.parse::<u64>() {
        return whole.checked_mul(scale);
    }
    let value = number.parse::<f64>().ok()? * scale as f64;
    (scale > 1 && value >= 0.0 && value < u64::MAX as f64).then_some(value as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        for (text, ms) in [
            ("30", 30_000),
            ("30s", 30_000),
            ("500ms", 500),
            ("2m", 120_000),
            ("0.5", 500),
            ("0", 0),
        ] {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "-1", "ms", "3 weeks", "NaN", "1e300", "inf"] {
            assert!(duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes() {
        for (text, count) in [
            ("4096", 4096),
            ("512MiB", 512 << 20),
            ("4G", 4_000_000_000),
            ("1.5KB", 1500),
            ("7B", 7),
        ] {
            assert_eq!(bytes(text), Ok(count), "{text}");
        }
        for text in ["", "-1", "1.5", "GiB", "99999999999GiB", "4XB", "NaNK"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn token_counts_as_vllm_reads_them() {
        for (text, count) in [
            ("32768", 32_768),
            ("32k", 32_000),
            ("32K", 32_768),
            ("1M", 1 << 20),
        ] {
            assert_eq!(tokens(text), Ok(count), "{text}");
        }
        for text in ["0", "-5", "5000000000", "auto", "1e400k"] {
            assert!(tokens(text).is_err(), "{text}");
        }
    }
}
