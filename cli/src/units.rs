//! Numbers as people read them.

/// `1234567` as `1,234,567`.
pub fn thousands(value: u64) -> String {
    let digits = value.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Bytes in GB (10^9), two decimals.
pub fn gb(bytes: f64) -> String {
    format!("{:.2}", bytes / 1e9)
}

/// Bytes in GiB (2^30), two decimals.
pub fn gib(bytes: f64) -> String {
    format!("{:.2}", bytes / f64::from(1 << 30))
}

#[cfg(test)]
mod tests {
    use super::thousands;

    #[test]
    fn groups_of_three() {
        for (value, text) in [(0, "0"), (999, "999"), (1000, "1,000"), (1_234_567, "1,234,567")] {
            assert_eq!(thousands(value), text);
        }
    }
}
