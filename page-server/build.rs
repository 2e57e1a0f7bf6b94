//! Compiles `src/proto/wire.proto` without needing a `protoc` binary.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=src/proto/wire.proto");
    let descriptors = protox::compile(["src/proto/wire.proto"], ["src/proto"])?;
    prost_build::Config::new().bytes(["."]).compile_fds(descriptors)?;
    Ok(())
}
