//! Every command of ours that a document names: its flags are flags of that command.

use std::path::{Path, PathBuf};
use std::process::Command;

/// The documents with commands to be typed.
fn documents() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut found = vec![root.join("README.md")];
    for folder in [
        "docs",
        "docs/benchmarks",
        "docs/decisions",
        "deploy",
        "models/demo",
    ] {
        let entries = std::fs::read_dir(root.join(folder)).expect("a folder of the repository");
        let paths = entries.map(|entry| entry.expect("entry").path());
        found.extend(paths.filter(|path| path.extension().is_some_and(|extension| extension == "md")));
    }
    found
}

/// Commands between backticks, and those in indented lines, put together where a line ends in a backslash.
fn commands(text: &str) -> Vec<String> {
    let mut found: Vec<String> = text.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    let mut begun = String::new();
    for line in text.lines().filter_map(|line| line.strip_prefix("    ")) {
        begun.push_str(line.trim());
        match begun.strip_suffix('\\') {
            Some(rest) => begun = rest.to_owned(),
            None => found.push(std::mem::take(&mut begun)),
        }
    }
    found
}

/// The words after the program's name, where the line begins with it and leaves nothing open.
fn arguments(line: &str) -> Option<Vec<String>> {
    let line = line.strip_prefix("target/release/").unwrap_or(line);
    let rest = line.strip_prefix("conclave ")?;
    let rest = rest.split(" #").next()?.trim_end_matches('&');
    if rest.contains(['…', '|', '<', '[', '(']) || !rest.starts_with(|c: char| c.is_ascii_lowercase()) {
        return None;
    }
    let mut words = vec![String::new()];
    let mut quote = None;
    for c in rest.trim().chars() {
        match (quote, c) {
            (Some(open), c) if c == open => quote = None,
            (None, '"' | '\'') => quote = Some(c),
            (None, ' ') => words.push(String::new()),
            (_, c) => words.last_mut()?.push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    Some(words)
}

#[test]
fn every_command_has_the_flags_that_documents_give_it() {
    let mut wrong = Vec::new();
    let mut count = 0;
    for path in documents() {
        let text = std::fs::read_to_string(&path).expect("a text");
        for words in commands(&text).iter().filter_map(|line| arguments(line)) {
            count += 1;
            let output = Command::new(env!("CARGO_BIN_EXE_conclave"))
                .args(&words)
                .arg("--help")
                .output()
                .expect("conclave runs");
            if !output.status.success() {
                let said = String::from_utf8_lossy(&output.stderr);
                wrong.push(format!("{}: {}: {said}", path.display(), words.join(" ")));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(count >= 40, "{count} commands");
}
