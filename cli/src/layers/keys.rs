//! The names that settings have.

use std::collections::BTreeMap;

use clap::Command;

use super::LayerError;

/// The names of all settings, per subcommand.
pub(super) struct Keys(BTreeMap<String, Vec<String>>);

impl Keys {
    pub(super) fn of(command: &Command) -> Keys {
        let names = |subcommand: &Command| {
            let settings = subcommand
                .get_arguments()
                .filter(|argument| argument.get_long().is_some());
            settings.map(|argument| argument.get_id().to_string()).collect()
        };
        Keys(
            command
                .get_subcommands()
                .map(|s| (s.get_name().to_owned(), names(s)))
                .collect(),
        )
    }

    pub(super) fn known(&self, key: &str) -> bool {
        self.0.values().any(|keys| keys.iter().any(|known| known == key))
    }

    pub(super) fn closest(&self, key: &str) -> Option<String> {
        closest(key, self.0.values().flatten().map(String::as_str))
    }

    /// Whether this is a subcommand's name.
    pub(super) fn is_subcommand(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    pub(super) fn check<'a>(
        &self,
        names: impl IntoIterator<Item = &'a String>,
        origin: &str,
    ) -> Result<(), LayerError> {
        for key in names {
            if !self.known(key) {
                return Err(LayerError::UnknownKey {
                    origin: origin.to_owned(),
                    key: key.clone(),
                    suggestion: self.closest(key),
                });
            }
        }
        Ok(())
    }
}

/// The most similar of these names, if any is.
pub(super) fn closest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let scored = known.map(|known| (strsim::jaro_winkler(known, name), known));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 > 0.8).then(|| best.1.to_owned())
}
