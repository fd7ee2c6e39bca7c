//! The documents against the tree: links and the files that a text names are there, and each raw output of a benchmark
//! is named by the text that its figures stand in.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use conclave_tests::data;

/// Every file of the repository, relative to its root; what is built or hidden is left out.
fn files() -> BTreeSet<PathBuf> {
    fn walk(folder: &Path, root: &Path, found: &mut BTreeSet<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display())) {
            let path = entry.expect("entry").path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let skipped = ["target", "node_modules", "__pycache__"];
            if name.starts_with('.') || path.is_symlink() || skipped.contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                walk(&path, root, found);
            } else {
                found.insert(path.strip_prefix(root).expect("below the root").to_path_buf());
            }
        }
    }
    let root = data::root();
    let mut found = BTreeSet::new();
    walk(&root, &root, &mut found);
    found
}

struct Document {
    path: PathBuf,
    text: String,
}

impl Document {
    fn folder(&self) -> &Path {
        self.path.parent().expect("a file is in a folder")
    }
}

fn documents(files: &BTreeSet<PathBuf>) -> Vec<Document> {
    let markdown = files
        .iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"));
    markdown
        .map(|path| Document {
            path: path.clone(),
            text: fs::read_to_string(data::root().join(path)).expect("a text"),
        })
        .collect()
}

/// `a/b/../c` as `a/c`.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                plain.pop();
            }
            Component::CurDir => {}
            part => plain.push(part),
        }
    }
    plain
}

/// The anchors that a page of this text has.
fn anchors(text: &str) -> BTreeSet<String> {
    let headings = text.lines().filter(|line| line.starts_with('#'));
    headings
        .map(|line| {
            let words = line.trim_start_matches('#').trim().to_lowercase();
            let kept = words
                .chars()
                .filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[test]
fn every_link_leads_somewhere() {
    let files = files();
    let mut broken = Vec::new();
    for document in documents(&files) {
        let links = document.text.split("](").skip(1);
        for link in links.filter_map(|rest| rest.split(')').next()) {
            if link.contains("://") || link.contains(char::is_whitespace) {
                continue;
            }
            let (path, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match path {
                "" => document.path.clone(),
                path => plain(&document.folder().join(path)),
            };
            let whole = data::root().join(&target);
            let there = match anchor {
                "" => whole.exists(),
                anchor => fs::read_to_string(&whole).is_ok_and(|text| anchors(&text).contains(anchor)),
            };
            if !there {
                broken.push(format!("{}: {link}", document.path.display()));
            }
        }
    }
    assert!(
        broken.is_empty(),
        "links that lead nowhere:\n{}",
        broken.join("\n")
    );
}

/// Names may leave out folders that the text named before: `a/b.rs` is any `…/a/b.rs`.
#[test]
fn every_source_file_that_is_named_is_there() {
    let files = files();
    let sources = [
        ".c",
        ".cu",
        ".cuh",
        ".md",
        ".proto",
        ".py",
        ".rs",
        ".safetensors",
        ".sh",
        ".txt",
    ];
    let mut gone = Vec::new();
    let mut count = 0;
    for document in documents(&files) {
        for name in document.text.split('`').skip(1).step_by(2) {
            let is_path = name.chars().all(|c| c.is_alphanumeric() || "/._-".contains(c));
            if !is_path || !name.contains('/') || !sources.iter().any(|end| name.ends_with(end)) {
                continue;
            }
            count += 1;
            if !files.iter().any(|file| file.ends_with(name)) {
                gone.push(format!("{}: {name}", document.path.display()));
            }
        }
    }
    assert!(gone.is_empty(), "files that are not there:\n{}", gone.join("\n"));
    assert!(count >= 100, "{count} names of files");
}

#[test]
fn every_raw_output_is_named_where_its_figures_stand() {
    let files = files();
    let texts: Vec<Document> = documents(&files);
    let raw = files.iter().filter_map(|path| {
        let name = path.strip_prefix("docs/benchmarks").ok()?;
        let output = path.extension()? == "txt" && name.components().count() == 2;
        output.then(|| format!("`{}`", name.display()))
    });
    let unnamed: Vec<String> = raw
        .filter(|name| !texts.iter().any(|document| document.text.contains(name)))
        .collect();
    assert!(unnamed.is_empty(), "no text names {}", unnamed.join(", "));
}
