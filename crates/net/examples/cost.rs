//! What one clone's network costs: `cargo run --release -p ramet-net --example cost`, as root.
//!
//! Makes one network in a network namespace of its own, and prints microseconds for each step.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::time::Instant;

use ramet_net::{AddressPlan, Egress, HostNet, HostNetOptions, NetworkSpec, TunnelOptions};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

const ROUNDS: u16 = 500;

struct Scratch(String);

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

fn print(step: &str, mut times: Vec<f64>) {
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!("{step:<28} median {:>8.0} us   p99 {:>8.0} us", at(0.5), at(0.99));
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let name = format!("rnt-cost-{}", std::process::id());
    let status = std::process::Command::new("ip").args(["netns", "add", &name]).status()?;
    if !status.success() {
        return Err(io::Error::other("run it as root, with iproute2").into());
    }
    let scratch = Scratch(name);
    let space = std::fs::File::open(format!("/run/netns/{}", scratch.0))?;
    // No other thread is started before, so all of this process's work is there.
    move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
    let directory = std::env::temp_dir().join(&scratch.0);
    let plan = AddressPlan::default();
    let tunnel = Some(TunnelOptions::new(Ipv4Addr::LOCALHOST));
    let start = Instant::now();
    let net = HostNet::open(HostNetOptions {
        state_dir: directory.clone(),
        tag: "cost".to_owned(),
        tunnel,
        secure: None,
        plan,
    })?;
    println!("{:<28} {:>8.1} ms", "open the host", start.elapsed().as_secs_f64() * 1e3);
    let start = Instant::now();
    let spec = NetworkSpec { name: "fam".to_owned(), vni: 7, egress: Egress::Nat, rate: None, mtu: 1450 };
    let network = net.ensure(&spec)?;
    println!("{:<28} {:>8.1} ms", "a family, once", start.elapsed().as_secs_f64() * 1e3);

    let mut times = [Vec::new(), Vec::new(), Vec::new(), Vec::new(), Vec::new()];
    let micros = |start: Instant| start.elapsed().as_secs_f64() * 1e6;
    let mut taps = Vec::new();
    for index in 2..2 + ROUNDS {
        let member = plan.member(1, index).ok_or("no such member")?;
        let start = Instant::now();
        let tap = network.open_tap(&format!("tap{index}"))?;
        times[0].push(micros(start));
        let middle = Instant::now();
        network.admit(&tap.name, member)?;
        times[1].push(micros(middle));
        times[2].push(micros(start));
        taps.push((tap, member));
    }
    for (tap, member) in &taps {
        let start = Instant::now();
        network.expel(&tap.name, *member)?;
        times[3].push(micros(start));
    }
    for (tap, _) in taps {
        let start = Instant::now();
        drop(tap);
        times[4].push(micros(start));
    }
    let steps = ["open_tap", "admit", "open_tap + admit", "expel", "close the tap"];
    for (step, times) in steps.into_iter().zip(times) {
        print(step, times);
    }
    let remote: Vec<_> =
        (2..1002).filter_map(|index| Some((plan.member(2, index)?, Ipv4Addr::new(10, 0, 0, 2)))).collect();
    let start = Instant::now();
    network.set_remote(&remote)?;
    println!("{:<28} {:>8.1} ms", "set_remote, 1000 members", start.elapsed().as_secs_f64() * 1e3);
    net.remove("fam")?;
    net.close()?;
    std::fs::remove_dir_all(directory)?;
    Ok(())
}
