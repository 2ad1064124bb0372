//! Namespaces, links and their limits, by `ip` and `tc`.

use std::{path::PathBuf, process::Command, time::Duration};

use anyhow::{Context as _, Result, bail};

use crate::{
    Rate,
    record::{HostRecord, LabRecord, bridge_netns, is_netns_of},
};

/// Runs a command of iproute2.
fn run(program: &str, args: &str) -> Result<()> {
    let path = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"]
        .map(|dir| PathBuf::from(dir).join(program))
        .into_iter()
        .find(|p| p.is_file())
        .with_context(|| format!("There is no `{program}` on this machine: `apt-get install iproute2`"))?;
    let output = Command::new(path)
        .args(args.split_whitespace())
        .output()
        .with_context(|| format!("Can't start `{program} {args}`"))?;
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("`{program} {args}` failed: {}", stderr.trim());
    }
    Ok(())
}

/// The network of a lab.
pub(crate) fn create(record: &LabRecord) -> Result<()> {
    let bridge = bridge_netns(&record.name);
    run("ip", &format!("netns add {bridge}"))?;
    run("ip", &format!("-n {bridge} link add br0 type bridge"))?;
    run("ip", &format!("-n {bridge} link set br0 up"))?;
    for host in &record.hosts {
        let HostRecord { name, netns, address, .. } = host;
        run("ip", &format!("netns add {netns}"))?;
        run("ip", &format!("-n {netns} link set lo up"))?;
        run("ip", &format!("-n {bridge} link add {name} type veth peer name eth0 netns {netns}"))?;
        run("ip", &format!("-n {bridge} link set {name} master br0"))?;
        run("ip", &format!("-n {bridge} link set {name} up"))?;
        run("ip", &format!("-n {netns} addr add {address}/24 dev eth0"))?;
        run("ip", &format!("-n {netns} link set eth0 up"))?;
        limit(netns, "eth0", record.link, record.delay)?;
        limit(&bridge, name, record.link, None)?;
    }
    Ok(())
}

/// Limits what leaves by a device.
fn limit(netns: &str, device: &str, rate: Option<Rate>, delay: Option<Duration>) -> Result<()> {
    let discipline = match (rate, delay) {
        (None, None) => return Ok(()),
        (Some(rate), None) => {
            // Room for what arrives in 5 ms, and for a few of the largest packets.
            let burst = (rate.0 / 8 / 200).max(256 << 10);
            format!("tbf rate {}bit burst {burst} latency 50ms", rate.0)
        }
        (rate, Some(delay)) => {
            let rate = rate.map(|r| format!(" rate {}bit", r.0)).unwrap_or_default();
            format!("netem delay {}us{rate} limit 100000", delay.as_micros())
        }
    };
    run("tc", &format!("-n {netns} qdisc replace dev {device} root {discipline}")).with_context(|| {
        if delay.is_some() {
            "Can't delay a link: the kernel has to have sch_netem (`modprobe sch_netem`); leave the delay out without it"
        } else {
            "Can't limit a link: the kernel has to have sch_tbf (`modprobe sch_tbf`); leave the link's speed out without it"
        }
    })
}

/// Takes a host's link down or up again.
pub(crate) fn set_link(record: &LabRecord, host: &HostRecord, up: bool) -> Result<()> {
    let bridge = bridge_netns(&record.name);
    run("ip", &format!("-n {bridge} link set {} {}", host.name, if up { "up" } else { "down" }))
}

/// The namespaces that the lab of this name has.
pub(crate) fn namespaces(name: &str) -> Vec<String> {
    let entries = std::fs::read_dir("/run/netns").into_iter().flatten();
    entries.filter_map(|e| e.ok()?.file_name().into_string().ok()).filter(|netns| is_netns_of(netns, name)).collect()
}

/// Deletes a namespace, and with it its devices.
pub(crate) fn delete(netns: &str) -> Result<()> {
    run("ip", &format!("netns delete {netns}"))
}

/// Bytes received by a device, in the text of `/proc/PID/net/dev`.
pub(crate) fn received(table: &str, device: &str) -> Option<u64> {
    let line = table.lines().find_map(|l| l.trim().strip_prefix(device)?.strip_prefix(':'))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn received_bytes_are_those_of_the_device() {
        let table = "Inter-|   Receive\n face |bytes    packets\n    lo: 11 2 0\n  eth0: 4242 7 0 0\n eth01:9 1\n";
        assert_eq!(received(table, "eth0"), Some(4242));
        assert_eq!(received(table, "lo"), Some(11));
        assert_eq!(received(table, "eth1"), None);
    }
}
