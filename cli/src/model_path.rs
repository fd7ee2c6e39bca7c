//! Finds the checkpoint: the directory given, what Hugging Face's tools downloaded under the name given, or the demo model
//! from the repository or from inside the binary.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::demo;
use crate::settings::ModelSettings;

/// Name under which the demo model is served.
pub const DEMO_NAME: &str = "conclave-demo";

/// A checkpoint's directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FoundModel {
    pub path: PathBuf,
    /// For people: the directory as given, or [`DEMO_NAME`].
    pub name: String,
    /// Other names it is served under: the directory's last part.
    pub short_name: Option<String>,
}

pub fn find(settings: &ModelSettings) -> Result<FoundModel> {
    find_at(settings.checkpoint.path())
}

/// The same by path; `None` is the demo model.
pub fn find_at(given: Option<&Path>) -> Result<FoundModel> {
    let Some(given) = given else {
        return Ok(FoundModel {
            path: repository_demo().map_or_else(demo::unpack, Ok)?,
            name: DEMO_NAME.into(),
            short_name: None,
        });
    };
    if !given.exists() {
        return downloaded(given).with_context(|| not_found(given));
    }
    let name = given.display().to_string();
    let last = given
        .canonicalize()
        .ok()
        .and_then(|path| Some(path.file_name()?.to_str()?.to_owned()));
    Ok(FoundModel {
        path: given.to_owned(),
        short_name: last.filter(|last| *last != name),
        name,
    })
}

/// `ORG/NAME`, as models are called on the hub.
fn hub_name(given: &Path) -> Option<(&str, &str)> {
    let (organisation, name) = given.to_str()?.split_once('/')?;
    let plain = |part: &str| !part.is_empty() && !part.starts_with('.') && !part.contains('/');
    (plain(organisation) && plain(name)).then_some((organisation, name))
}

/// The newest download of this name in Hugging Face's cache.
fn downloaded(given: &Path) -> Option<FoundModel> {
    let (organisation, name) = hub_name(given)?;
    let from = |variable: &str| std::env::var_os(variable).filter(|value| !value.is_empty());
    let home = || from("HOME").map(|home| Path::new(&home).join(".cache"));
    let cache = from("HF_HUB_CACHE").map(PathBuf::from).or_else(|| {
        let cache = || from("XDG_CACHE_HOME").map(PathBuf::from).or_else(home);
        let huggingface = from("HF_HOME").map(PathBuf::from);
        let huggingface = huggingface.or_else(|| Some(cache()?.join("huggingface")));
        Some(huggingface?.join("hub"))
    })?;
    let repository = cache.join(format!("models--{organisation}--{name}"));
    let commit = std::fs::read_to_string(repository.join("refs/main")).ok()?;
    let path = repository.join("snapshots").join(commit.trim());
    path.join("config.json").is_file().then(|| FoundModel {
        path,
        name: given.display().to_string(),
        short_name: Some(name.to_owned()),
    })
}

fn not_found(given: &Path) -> String {
    let shown = given.display();
    if let Some((_, name)) = hub_name(given) {
        let local = name.to_lowercase();
        return format!(
            "model {shown}: there is no such directory, it is not in Hugging Face's cache, and nothing is downloaded by \
             this program; run `hf download {shown} --local-dir ./{local}`, then give ./{local}"
        );
    }
    format!("model {shown}: there is no such directory; give the directory of a Hugging Face checkpoint")
}

/// `models/demo` in a parent of the executable or of the working directory.
fn repository_demo() -> Option<PathBuf> {
    let executable = std::env::current_exe().ok();
    let working = std::env::current_dir().ok();
    [executable, working]
        .iter()
        .flatten()
        .flat_map(|start| start.ancestors())
        .map(|parent| parent.join("models/demo"))
        .find(|demo| demo.join("config.json").is_file() && demo.join("model.safetensors").is_file())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::not_found;

    #[test]
    fn a_hub_name_is_answered_with_the_download_command() {
        let message = not_found(Path::new("MiniMaxAI/MiniMax-M2.7"));
        assert!(
            message.contains("hf download MiniMaxAI/MiniMax-M2.7 --local-dir ./minimax-m2.7"),
            "{message}"
        );
        assert!(!not_found(Path::new("./minimax-m2-7")).contains("hf download"));
        assert!(!not_found(Path::new("/models/x")).contains("hf download"));
    }
}
