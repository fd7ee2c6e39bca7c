//! Embeds the demo model's files, each with its SHA-256, so that the binary serves a model on a machine with no
//! repository.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::{env, error::Error, fs};

use sha2::{Digest, Sha256};

/// What a checkpoint consists of; other files in the folder (README, recipe) are not needed to serve it.
const EXTENSIONS: [&str; 3] = ["json", "safetensors", "jinja"];

fn main() -> Result<(), Box<dyn Error>> {
    let folder = Path::new(&env::var("CARGO_MANIFEST_DIR")?).join("../models/demo");
    println!("cargo:rerun-if-changed={}", folder.display());
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_, std::io::Error>>()?;
    files.retain(|path| {
        path.extension()
            .is_some_and(|e| EXTENSIONS.iter().any(|known| e == *known))
    });
    files.sort();
    let mut code = String::from("pub const FILES: &[EmbeddedFile] = &[\n");
    for path in files {
        println!("cargo:rerun-if-changed={}", path.display());
        let path = path.canonicalize()?;
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .ok_or("a file name is not UTF-8")?;
        let digest: [u8; 32] = Sha256::digest(fs::read(&path)?).into();
        writeln!(
            code,
            "EmbeddedFile {{ name: {name:?}, sha256: {digest:?}, bytes: include_bytes!({path:?}) }},"
        )?;
    }
    code.push_str("];\n");
    fs::write(Path::new(&env::var("OUT_DIR")?).join("demo.rs"), code)?;
    Ok(())
}
