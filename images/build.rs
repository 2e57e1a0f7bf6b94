//! Compiles `proto/*.proto` into one Rust module. Needs no protoc.

use std::io::{Error, Result};
use std::path::Path;

fn main() -> Result<()> {
    let mut files: Vec<_> = std::fs::read_dir("proto")?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .filter(|path| path.extension().is_some_and(|extension| extension == "proto"))
        .collect();
    // The order of a directory is arbitrary, that of the generated code should not be.
    files.sort();
    println!("cargo::rerun-if-changed=proto");
    let descriptors = protox::compile(&files, [Path::new("proto")]).map_err(Error::other)?;
    prost_build::Config::new()
        // The files have no package; this is the name prost then gives to the one module.
        .default_package_filename("images")
        .compile_fds(descriptors)
}
