//! Talks to an agent by hand: `talk SOCKET ping [N]`, `talk SOCKET exec CMD...`, `talk SOCKET identity JSON`, or
//! `talk SOCKET freeze|thaw|release|shutdown`; prints how long things took.

use ramet_guest::host::{AgentClient, ExecRequest};
use ramet_guest::protocol::{Freeze, Release};
use std::time::{Duration, Instant};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let [socket, command, rest @ ..] = args.as_slice() else {
        return Err(
            "usage: talk SOCKET ping [N] | exec CMD... | identity JSON | freeze | thaw | release | shutdown".into()
        );
    };
    let begun = Instant::now();
    let client = AgentClient::connect(socket, Duration::from_secs(60)).await?;
    eprintln!("connected after {:.1} ms: {:?}", begun.elapsed().as_secs_f64() * 1e3, client.guest());
    if *command == "ping" {
        let count: usize = rest.first().map_or(Ok(100), |n| n.parse())?;
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            times.push(client.ping().await?.as_micros());
        }
        times.sort_unstable();
        let at = |part: usize| times.get((times.len() * part / 100).min(times.len().saturating_sub(1)));
        println!("ping, us: p50 {:?} p99 {:?}", at(50), at(99));
    } else if *command == "identity" {
        let identity = serde_json::from_str(rest.first().ok_or("an identity is missing")?)?;
        println!("{:#?}", client.identity(&identity).await?);
    } else if *command == "freeze" {
        let request = Freeze { hooks: true, freeze: true, sync: true, limit_ms: 10_000 };
        println!("{:#?}", client.freeze(&request).await?);
    } else if *command == "thaw" {
        println!("{:#?}", client.thaw().await?);
    } else if *command == "shutdown" {
        client.shutdown().await?;
    } else if *command == "release" {
        println!("{:#?}", client.release(&Release { hooks: true, signal: true, limit_ms: 10_000 }).await?);
    } else {
        let begun = Instant::now();
        let request = ExecRequest::new(rest.iter().copied()).limit(Duration::from_secs(600));
        let output = client.run(request, b"", 64 << 20).await?;
        print!("{}", String::from_utf8_lossy(&output.stdout));
        eprint!("{}", String::from_utf8_lossy(&output.stderr));
        eprintln!("exit code {} after {:.1} ms", output.code, begun.elapsed().as_secs_f64() * 1e3);
    }
    eprintln!("all after {:.1} ms", begun.elapsed().as_secs_f64() * 1e3);
    Ok(())
}
