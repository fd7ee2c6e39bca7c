//! The text of a key file: one key a line, `#` starts a comment, and after the key its own limits, if it has any:
//!
//! ```text
//! sk-team-a                                  # the limits that hold for all
//! sk-team-b  rpm=60 tpm=100000 concurrent=8  # its own
//! ```

use anyhow::Context as _;

use super::quota::KeyLimits;

/// A key with the limits that its line gives over `default`.
pub(super) fn parse(text: &str, default: KeyLimits) -> anyhow::Result<Vec<(&str, KeyLimits)>> {
    let mut keys = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let mut words = line.split('#').next().unwrap_or_default().split_whitespace();
        let Some(key) = words.next() else { continue };
        let mut limits = default;
        for word in words {
            set(&mut limits, word).with_context(|| format!("line {}", at + 1))?;
        }
        keys.push((key, limits));
    }
    Ok(keys)
}

fn set(limits: &mut KeyLimits, word: &str) -> anyhow::Result<()> {
    let (name, value) = word
        .split_once('=')
        .with_context(|| format!("{word:?} after the key: expected rpm=, tpm= or concurrent="))?;
    let place = match name {
        "rpm" => &mut limits.requests_per_minute,
        "tpm" => &mut limits.tokens_per_minute,
        "concurrent" => &mut limits.concurrent,
        _ => anyhow::bail!("{name:?} is not rpm, tpm or concurrent"),
    };
    let number: u32 = value
        .parse()
        .with_context(|| format!("{name} = {value:?}: not a number"))?;
    anyhow::ensure!(number > 0, "{name} = 0: leave the key out to lock it");
    *place = Some(number);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_stand_after_the_key() {
        let default = KeyLimits {
            concurrent: Some(3),
            ..Default::default()
        };
        let text = "# all\none\n\n two rpm=5 tpm=7 # b\nthree concurrent=1\n";
        let own = KeyLimits {
            requests_per_minute: Some(5),
            tokens_per_minute: Some(7),
            concurrent: Some(3),
        };
        let expected = [
            ("one", default),
            ("two", own),
            (
                "three",
                KeyLimits {
                    concurrent: Some(1),
                    ..default
                },
            ),
        ];
        assert_eq!(parse(text, default).unwrap(), expected);
        for bad in [
            "a b",
            "a rpm",
            "a rpm=",
            "a rpm=-1",
            "a rpm=0",
            "a rps=5",
            "ok\na tpm=x",
        ] {
            let error = format!("{:#}", parse(bad, default).unwrap_err());
            assert!(
                error.starts_with(&format!("line {}", bad.lines().count())),
                "{error}"
            );
        }
    }
}
