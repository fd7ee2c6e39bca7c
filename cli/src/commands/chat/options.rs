//! What `/set` changes.

use anyhow::{Context, Result, bail};

use crate::settings::ChatSettings;

/// For completion.
pub const NAMES: [&str; 9] = [
    "temperature",
    "top_p",
    "top_k",
    "max_tokens",
    "seed",
    "stop",
    "model",
    "thinking",
    "figures",
];

/// Unset values are the server's business.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Options {
    pub model: Option<String>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<i32>,
    pub max_tokens: Option<u32>,
    pub seed: Option<u64>,
    pub stop: Option<String>,
    hides_thinking: bool,
    hides_figures: bool,
}

impl Options {
    pub fn new(settings: &ChatSettings, model: Option<String>) -> Options {
        Options {
            model,
            temperature: settings.temperature,
            max_tokens: settings.max_tokens,
            seed: settings.seed,
            ..Options::default()
        }
    }

    pub fn model_name(&self) -> &str {
        self.model.as_deref().unwrap_or("the server's model")
    }

    pub fn shows_thinking(&self) -> bool {
        !self.hides_thinking
    }

    pub fn shows_figures(&self) -> bool {
        !self.hides_figures
    }

    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        match name {
            "temperature" => self.temperature = number(name, value)?,
            "top_p" => self.top_p = number(name, value)?,
            "top_k" => self.top_k = number(name, value)?,
            "max_tokens" => self.max_tokens = number(name, value)?,
            "seed" => self.seed = number(name, value)?,
            "stop" => self.stop = unless_default(value).map(str::to_owned),
            "model" => self.model = unless_default(value).map(str::to_owned),
            "thinking" => self.hides_thinking = hidden(name, value)?,
            "figures" => self.hides_figures = hidden(name, value)?,
            _ => bail!("{name} is no setting; there are {}", NAMES.join(", ")),
        }
        Ok(())
    }

    pub fn describe(&self) -> String {
        fn shown<T: ToString>(value: &Option<T>) -> String {
            value.as_ref().map_or("default".to_owned(), T::to_string)
        }
        let visible = |hidden| if hidden { "hide" } else { "show" }.to_owned();
        let values = [
            shown(&self.temperature),
            shown(&self.top_p),
            shown(&self.top_k),
            shown(&self.max_tokens),
            shown(&self.seed),
            shown(&self.stop),
            shown(&self.model),
            visible(self.hides_thinking),
            visible(self.hides_figures),
        ];
        let lines = NAMES.iter().zip(values);
        let lines: Vec<String> = lines.map(|(name, value)| format!("{name:<12} {value}")).collect();
        lines.join("\n")
    }
}

fn unless_default(value: &str) -> Option<&str> {
    (value != "default").then_some(value)
}

fn number<T: std::str::FromStr>(name: &str, value: &str) -> Result<Option<T>>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    let read = unless_default(value).map(str::parse).transpose();
    read.with_context(|| format!("{name} is {value:?}: give a number, or `default`"))
}

fn hidden(name: &str, value: &str) -> Result<bool> {
    match value {
        "show" | "on" | "default" => Ok(false),
        "hide" | "off" => Ok(true),
        _ => bail!("{name} is {value:?}: give `show` or `hide`"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_set_and_unset_by_name() {
        let mut options = Options::default();
        options.set("temperature", "0.5").expect("a number");
        options.set("top_k", "-1").expect("a number");
        options.set("thinking", "hide").expect("a word");
        assert_eq!((options.temperature, options.top_k), (Some(0.5), Some(-1)));
        assert!(!options.shows_thinking());
        assert!(
            options.describe().contains("temperature  0.5"),
            "{}",
            options.describe()
        );
        options.set("temperature", "default").expect("unset");
        assert_eq!(options.temperature, None);
        for (name, value) in [
            ("temperature", "warm"),
            ("max_tokens", "-3"),
            ("thinking", "maybe"),
            ("x", "1"),
        ] {
            let error = options.set(name, value).expect_err("refused").to_string();
            assert!(error.contains(name), "{error}");
        }
    }
}
