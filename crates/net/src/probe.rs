//! Whether this machine has what networks need: tried out in a namespace that goes with the trial.

use std::fs::File;
use std::net::Ipv4Addr;

use crate::space::{TC, ip_batch, nft, on_a_thread};
use crate::{AddressPlan, Egress, Error, Result, TunnelOptions, rules, sys};

/// Something that networks need, and whether it is there.
#[derive(Debug)]
pub struct Trial {
    /// What was tried.
    pub what: &'static str,
    /// The kernel's module that brings it, if it is one.
    pub module: Option<&'static str>,
    /// What goes without it.
    pub without: &'static str,
    /// How it went.
    pub result: Result<()>,
}

/// Tries all that networks are made of, with the rules and devices that they get, in a network namespace of its own. Nothing
/// of the machine is changed but that the kernel may load modules. Needs root.
///
/// # Errors
/// When no network namespace can be made.
pub fn try_out() -> Result<Vec<Trial>> {
    on_a_thread(|| {
        sys::unshare_network().map_err(|source| Error::kernel("make a network namespace", source))?;
        Ok(trials())
    })
}

fn trials() -> Vec<Trial> {
    let trial = |what, module, without, result| Trial { what, module, without, result };
    let ip = |line: &str| ip_batch("try it out", &[line.to_owned()]);
    let plan = AddressPlan::default();
    let tunnel = TunnelOptions::new(Ipv4Addr::LOCALHOST);
    let filter = nft("try the filter of taps", &rules::filter(&[], &[]));
    let ways = nft("try ways out and published ports", &rules::routing(plan, &Egress::Nat, &[]));
    let guard = nft("try the guard of the tunnel", &rules::host("x", plan, Some(tunnel), None, &[]));
    let rate = ["qdisc", "replace", "dev", "lo", "root", "tbf", "rate", "1mbit", "burst", "32768", "latency", "50ms"];
    vec![
        trial(
            "bridge",
            Some("bridge"),
            "VMs get no network",
            ip("link add br0 type bridge stp_state 0 mcast_snooping 0"),
        ),
        trial("veth", Some("veth"), "VMs get no network", ip("link add v0 type veth peer name v1")),
        trial(
            "VXLAN",
            Some("vxlan"),
            "clones on other hosts get no network",
            ip("link add vx0 type vxlan id 1 local 127.0.0.1 dstport 4789 nolearning ttl 64"),
        ),
        trial("tap", Some("tun"), "VMs get no network", tap()),
        trial("nftables, bridge", Some("nft_meta_bridge"), "VMs get no network", filter),
        trial("nftables, NAT", Some("nft_nat"), "VMs get no network", ways.and(guard)),
        trial("tbf", Some("sch_tbf"), "`--rate` is refused", TC.run("limit a rate", &rate, "").map(drop)),
    ]
}

fn tap() -> Result<()> {
    let failed = |source| Error::kernel("make a tap", source);
    let tun = File::options().read(true).write(true).open("/dev/net/tun").map_err(failed)?;
    sys::attach_tap(&tun, "t0", true).map_err(failed)
}

#[cfg(test)]
mod tests {
    #[test]
    fn all_that_tests_of_networks_need_is_here_and_nothing_stays() {
        let links = || std::fs::read_to_string("/proc/net/dev").unwrap().lines().count();
        let before = links();
        for trial in super::try_out().unwrap() {
            trial.result.unwrap();
        }
        assert_eq!(links(), before);
    }
}
