//! Runs the fault bench alone.
fn main() -> anyhow::Result<()> {
    println!("{}", ramet_bench::fault::run(std::env::args().any(|a| a == "--quick"))?.table());
    Ok(())
}
