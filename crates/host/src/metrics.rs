//! Counters and histograms for `GET /v1/stats`, and as Prometheus text for `GET /metrics`.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    time::Duration,
};

use ramet_client::api::{Counters, HostStats, LatencySummary, PagerInfo};
use ramet_disk::control::{DiskKind, DiskStatus};
use ramet_pager::control::{ImageReport, Latency, SourceReport, StatsReport, VmReport};

use crate::{daemon::Daemon, stats::Stats};

/// How long a pager may take to tell its counters.
const STATS_WAIT: Duration = Duration::from_secs(2);

fn latency(l: &Latency) -> LatencySummary {
    LatencySummary {
        count: l.count,
        min_us: None,
        mean_us: if l.count == 0 { 0.0 } else { l.sum / l.count as f64 },
        p50_us: l.p50,
        p90_us: None,
        p99_us: l.p99,
        max_us: l.max,
    }
}

fn values<const N: usize>(pairs: [(&str, u64); N]) -> BTreeMap<String, u64> {
    pairs.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

/// A VM's counters by name.
pub(crate) fn vm_counters(vm: &VmReport) -> Counters {
    Counters {
        values: values([
            ("missing_faults", vm.missing_faults),
            ("zero_pages", vm.zero_pages),
            ("local_pages", vm.local_pages),
            ("demand_pages", vm.demand_pages),
            ("prefetched_pages", vm.prefetched_pages),
            ("network_bytes", vm.network_bytes),
            ("write_faults", vm.write_faults),
            ("waiting_faults", vm.waiting),
            ("stalled", u64::from(vm.stalled.is_some())),
            ("private_bytes", vm.private_bytes),
            ("ram_pss_bytes", vm.ram_pss_bytes),
            ("vmm_pss_bytes", vm.vmm_pss_bytes),
        ]),
        latencies: [("local_fault", latency(&vm.local_fault_us)), ("remote_fault", latency(&vm.remote_fault_us))]
            .map(|(name, l)| (name.to_owned(), l))
            .into(),
    }
}

fn image_counters(image: &ImageReport) -> Counters {
    let sum = |of: fn(&ramet_pager::control::LayerReport) -> u64| image.layers.iter().map(of).sum();
    Counters {
        values: values([
            ("layers", image.layers.len() as u64),
            ("owned_pages", sum(|l| l.owned_pages)),
            ("stored_bytes", sum(|l| l.stored_bytes)),
            ("fetched_pages", sum(|l| l.fetched_pages)),
            ("complete", u64::from(image.complete)),
            ("broken", u64::from(image.broken.is_some())),
            ("vms", image.vms.len() as u64),
        ]),
        latencies: BTreeMap::new(),
    }
}

fn pager_counters(report: &StatsReport) -> Counters {
    let sum = |of: fn(&SourceReport) -> u64| report.sources.iter().map(of).sum();
    Counters {
        values: values([
            ("served_pages", report.served_pages),
            ("served_bytes", report.served_bytes),
            ("bad_peers", report.bad_peers),
            ("sources", report.sources.len() as u64),
            ("sources_connected", sum(|s| u64::from(s.connected))),
            ("received_pages", sum(|s| s.pages)),
            ("received_bytes", sum(|s| s.bytes)),
            ("bad_checksums", sum(|s| s.bad_checksums)),
            ("requests_in_flight", sum(|s| s.in_flight)),
        ]),
        latencies: BTreeMap::new(),
    }
}

/// Counters of frozen disks.
pub(crate) fn disk_counters<'a>(disks: impl IntoIterator<Item = &'a DiskStatus>) -> Counters {
    let disks: Vec<_> = disks.into_iter().collect();
    let sum = |of: fn(&DiskStatus) -> u64| disks.iter().map(|&d| of(d)).sum();
    Counters {
        values: values([
            ("frozen_disks", sum(|d| u64::from(d.kind == DiskKind::Frozen))),
            ("remote_disks", sum(|d| u64::from(d.kind == DiskKind::Remote))),
            ("fetched_bytes", sum(|d| d.fetched_bytes)),
            ("cached_bytes", sum(|d| d.cached_bytes)),
            ("golden_bytes", sum(|d| d.golden_bytes)),
            ("served_bytes", sum(|d| d.served_bytes)),
            ("passed_on_bytes", sum(|d| d.passed_on_bytes)),
            ("sources", sum(|d| d.sources.len() as u64)),
            ("requests", sum(|d| d.requests)),
            ("damaged_pages", sum(|d| d.damaged_pages)),
            ("waiting", sum(|d| d.waiting)),
            ("stalled", sum(|d| u64::from(d.stalled.is_some()))),
        ]),
        latencies: BTreeMap::new(),
    }
}

impl Daemon {
    /// `GET /v1/stats`.
    pub async fn host_stats(&self) -> HostStats {
        let mut pagers = Vec::new();
        for (pager, report) in self.pagers.stats(STATS_WAIT).await {
            let mut info = PagerInfo {
                family: pager.family,
                pid: pager.pid(),
                restarts: pager.restarts(),
                error: None,
                counters: Counters::default(),
                vms: BTreeMap::new(),
                images: BTreeMap::new(),
                disk: self.disk_server_status(pager.family).await.map(|status| disk_counters(&status.disks)),
            };
            match report {
                Ok(report) => {
                    info.counters = pager_counters(&report);
                    info.vms = report.vms.iter().map(|vm| (vm.vm.to_string(), vm_counters(vm))).collect();
                    info.images = report.images.iter().map(|i| (i.image.to_string(), image_counters(i))).collect();
                }
                Err(err) => info.error = Some(err.to_string()),
            }
            pagers.push(info);
        }
        HostStats {
            host: self.config.name.clone(),
            phases: self.stats.summaries(),
            events: self.stats.events(),
            pagers,
        }
    }

    /// `GET /metrics`.
    pub async fn prometheus(&self) -> String {
        let stats = self.host_stats().await;
        let vms = self.store.read(|s| s.vms.values().map(|vm| (vm.id.to_string(), vm.name.clone())).collect());
        render(&stats, &self.stats, &vms)
    }
}

/// Text in Prometheus' format: each metric's lines together, under its type.
struct Text {
    out: String,
    typed: BTreeSet<String>,
}

impl Text {
    fn kind(&mut self, name: &str, kind: &str, help: &str) {
        if self.typed.insert(name.to_owned()) {
            let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
        }
    }
    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: impl std::fmt::Display) {
        let labels: Vec<_> = labels.iter().map(|(k, v)| format!("{k}=\"{}\"", escape(v))).collect();
        let labels = if labels.is_empty() { String::new() } else { format!("{{{}}}", labels.join(",")) };
        let _ = writeln!(self.out, "{name}{labels} {value}");
    }
}

/// Label values as Prometheus wants them.
fn escape(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

/// A set of things (VMs, images, pagers) with the same counters.
fn group(text: &mut Text, prefix: &str, things: &[(Vec<(&str, &str)>, &Counters)]) {
    let names: BTreeSet<_> = things.iter().flat_map(|(_, c)| c.values.keys()).collect();
    for name in names {
        let metric = format!("{prefix}_{name}");
        text.kind(&metric, "gauge", "As the pager reports it.");
        for (labels, counters) in things {
            if let Some(value) = counters.values.get(name) {
                text.sample(&metric, labels, value);
            }
        }
    }
    let names: BTreeSet<_> = things.iter().flat_map(|(_, c)| c.latencies.keys()).collect();
    for name in names {
        let metric = format!("{prefix}_{name}_seconds");
        text.kind(&metric, "summary", "Latency as the pager reports it.");
        for (labels, counters) in things {
            let Some(l) = counters.latencies.get(name) else { continue };
            for (quantile, us) in [("0.5", l.p50_us), ("0.99", l.p99_us), ("1", l.max_us)] {
                let mut labels = labels.clone();
                labels.push(("quantile", quantile));
                text.sample(&metric, &labels, us / 1e6);
            }
            text.sample(&format!("{metric}_sum"), labels, l.mean_us * l.count as f64 / 1e6);
            text.sample(&format!("{metric}_count"), labels, l.count);
        }
    }
}

fn render(host: &HostStats, phases: &Stats, names: &BTreeMap<String, String>) -> String {
    let mut text = Text { out: String::new(), typed: BTreeSet::new() };
    text.kind("ramet_events_total", "counter", "Events since the daemon started.");
    for (event, count) in &host.events {
        text.sample("ramet_events_total", &[("event", event)], count);
    }
    text.kind("ramet_phase_seconds", "summary", "Phases of checkpoints, clones and forks.");
    phases.each(|phase, h| {
        for (label, quantile) in [("0.5", 0.5), ("0.9", 0.9), ("0.99", 0.99), ("1", 1.0)] {
            let value = h.value_at_quantile(quantile) as f64 / 1e6;
            text.sample("ramet_phase_seconds", &[("phase", phase), ("quantile", label)], value);
        }
        let sum: f64 =
            h.iter_recorded().map(|v| v.value_iterated_to() as f64 * v.count_since_last_iteration() as f64).sum();
        text.sample("ramet_phase_seconds_sum", &[("phase", phase)], sum / 1e6);
        text.sample("ramet_phase_seconds_count", &[("phase", phase)], h.len());
    });
    text.kind("ramet_pager_up", "gauge", "Whether the family's pager answers.");
    let families: Vec<_> = host.pagers.iter().map(|p| (p, p.family.to_string())).collect();
    for (pager, family) in &families {
        text.sample("ramet_pager_up", &[("family", family)], u8::from(pager.error.is_none()));
    }
    text.kind("ramet_pager_restarts_total", "counter", "How often the family's pager was started again.");
    for (pager, family) in &families {
        text.sample("ramet_pager_restarts_total", &[("family", family)], pager.restarts);
    }
    let pagers: Vec<_> = families.iter().map(|(p, family)| (vec![("family", family.as_str())], &p.counters)).collect();
    group(&mut text, "ramet_pager", &pagers);
    let disks: Vec<_> =
        families.iter().filter_map(|(p, f)| Some((vec![("family", f.as_str())], p.disk.as_ref()?))).collect();
    group(&mut text, "ramet_disk", &disks);
    let vms: Vec<_> = host
        .pagers
        .iter()
        .flat_map(|p| &p.vms)
        .map(|(id, counters)| {
            let name = names.get(id).map_or("", String::as_str);
            (vec![("vm", id.as_str()), ("name", name)], counters)
        })
        .collect();
    group(&mut text, "ramet_vm", &vms);
    let images: Vec<_> =
        host.pagers.iter().flat_map(|p| &p.images).map(|(id, c)| (vec![("checkpoint", id.as_str())], c)).collect();
    group(&mut text, "ramet_image", &images);
    text.out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_has_each_metric_once_with_its_type_and_escaped_labels() {
        let phases = Stats::default();
        phases.record("clone_load", 2500);
        let counters = |n| Counters {
            values: values([("missing_faults", n)]),
            latencies: [("local_fault".to_owned(), LatencySummary { count: 2, mean_us: 10.0, ..Default::default() })]
                .into(),
        };
        let pager = |family: u128, vm: &str| PagerInfo {
            family: ramet_memory::FamilyId::from_u128(family),
            pid: Some(1),
            restarts: 3,
            error: None,
            counters: Counters { values: values([("served_pages", 9)]), latencies: BTreeMap::new() },
            vms: [(vm.to_owned(), counters(7))].into(),
            images: BTreeMap::new(),
            disk: Some(Counters { values: values([("fetched_bytes", 5)]), latencies: BTreeMap::new() }),
        };
        let host = HostStats {
            host: "h1".to_owned(),
            phases: phases.summaries(),
            events: [("forks".to_owned(), 4)].into(),
            pagers: vec![pager(1, "aa"), pager(2, "bb")],
        };
        let names = [("aa".to_owned(), "we\"b".to_owned())].into();
        let text = render(&host, &phases, &names);
        assert_eq!(text.matches("# TYPE ramet_vm_missing_faults gauge").count(), 1, "{text}");
        assert!(text.contains("ramet_vm_missing_faults{vm=\"aa\",name=\"we\\\"b\"} 7\n"), "{text}");
        assert_eq!(text.matches("\nramet_disk_fetched_bytes{family=").count(), 2, "{text}");
        assert!(text.contains("ramet_events_total{event=\"forks\"} 4\n"));
        assert!(text.contains("ramet_vm_local_fault_seconds_sum{vm=\"bb\",name=\"\"} 0.00002\n"), "{text}");
        assert!(text.contains("ramet_phase_seconds_count{phase=\"clone_load\"} 1\n"));
        // Lines of one metric stand together, as the format demands.
        let mut seen = BTreeSet::new();
        let mut last = String::new();
        for name in text.lines().filter(|l| !l.starts_with('#')).filter_map(|l| l.split(['{', ' ']).next()) {
            let name = name.trim_end_matches("_sum").trim_end_matches("_count").to_owned();
            if name != last {
                assert!(seen.insert(name.clone()), "{name} stands in two places");
                last = name;
            }
        }
    }
}
