//! Links a flat image at 1 MiB, with nothing of the host's system in it.

fn main() {
    let dir = std::env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
    for argument in [
        "-nostdlib".to_owned(),
        "-nostartfiles".to_owned(),
        "-static".to_owned(),
        "-no-pie".to_owned(),
        "-Wl,--build-id=none".to_owned(),
        "-Wl,--oformat=binary".to_owned(),
        format!("-Wl,-T,{dir}/link.ld"),
    ] {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rerun-if-changed=link.ld");
    let flags = std::env::var("CARGO_ENCODED_RUSTFLAGS").unwrap_or_default();
    if !flags.contains("noimplicitfloat") {
        println!(
            "cargo:warning=built without the flags of tiny/.cargo/config.toml (is RUSTFLAGS set?): it may use SSE"
        );
    }
}
