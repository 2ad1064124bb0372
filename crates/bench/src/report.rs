//! What a bench prints: a table for people, one JSON object for programs.

use comfy_table::{Table, presets::UTF8_FULL_CONDENSED};
use serde::Serialize;

/// The result of one bench.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The bench's name.
    pub bench: &'static str,
    /// Where it ran.
    pub machine: Machine,
    /// What was measured.
    pub results: Vec<Measured>,
    /// The numbers to reach, met or not.
    pub goals: Vec<Goal>,
}

/// The machine of a bench.
#[derive(Debug, Serialize)]
pub struct Machine {
    /// The CPU's name.
    pub cpu: String,
    /// CPUs that this process may use.
    pub cpus: usize,
    /// Memory, in bytes.
    pub memory: u64,
    /// The kernel's release.
    pub kernel: String,
}

/// Samples of one quantity.
#[derive(Debug, Serialize)]
pub struct Measured {
    /// What was measured, and how.
    pub name: String,
    /// Half of the samples were at most this.
    pub median: f64,
    /// 99 in 100 were at most this.
    pub p99: f64,
    /// Number of samples.
    pub n: usize,
    /// The unit of `median` and `p99`.
    pub unit: &'static str,
}

/// A number to reach.
#[derive(Debug, Serialize)]
pub struct Goal {
    /// What it compares.
    pub name: String,
    /// What was measured.
    pub value: f64,
    /// What it should be.
    pub bound: f64,
    /// Whether it is.
    pub met: bool,
}

impl Machine {
    /// This machine.
    #[must_use]
    pub fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let field = |text: &str, name: &str| {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_default();
            line.split_once(':').map(|(_, v)| v.trim().to_owned()).unwrap_or_default()
        };
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let memory = memory.split(' ').next().and_then(|kib| kib.parse::<u64>().ok()).unwrap_or(0) * 1024;
        Self {
            cpu: field(&read("/proc/cpuinfo"), "model name"),
            cpus: std::thread::available_parallelism().map_or(1, usize::from),
            memory,
            kernel: read("/proc/sys/kernel/osrelease").trim().to_owned(),
        }
    }
}

impl Measured {
    /// The quantiles of samples; all zero when there are none.
    #[must_use]
    pub fn of(name: impl Into<String>, unit: &'static str, mut samples: Vec<f64>) -> Self {
        samples.sort_by(f64::total_cmp);
        let at = |q: f64| {
            let rank = (samples.len() as f64 * q).ceil() as usize;
            samples.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Self { name: name.into(), median: at(0.5), p99: at(0.99), n: samples.len(), unit }
    }
}

impl Goal {
    /// A value that should be at most `bound`.
    #[must_use]
    pub fn at_most(name: impl Into<String>, value: f64, bound: f64) -> Self {
        Self { name: name.into(), value, bound, met: value <= bound && value.is_finite() }
    }

    /// A value that should be at least `bound`.
    #[must_use]
    pub fn at_least(name: impl Into<String>, value: f64, bound: f64) -> Self {
        Self { name: name.into(), value, bound, met: value >= bound && value.is_finite() }
    }
}

impl Report {
    /// A report of this machine without results yet.
    #[must_use]
    pub fn new(bench: &'static str) -> Self {
        Self { bench, machine: Machine::here(), results: Vec::new(), goals: Vec::new() }
    }

    /// The report as one JSON object.
    ///
    /// # Errors
    /// When a number is not finite.
    pub fn json(&self) -> serde_json::Result<String> {
        serde_json::to_string_pretty(self)
    }

    /// The report as tables.
    #[must_use]
    pub fn table(&self) -> String {
        let mut results = Table::new();
        results.load_style(UTF8_FULL_CONDENSED).set_header(["measured", "median", "p99", "n", "unit"]);
        for r in &self.results {
            results.add_row([
                r.name.clone(),
                format!("{:.2}", r.median),
                format!("{:.2}", r.p99),
                r.n.to_string(),
                r.unit.to_owned(),
            ]);
        }
        let mut goals = Table::new();
        goals.load_style(UTF8_FULL_CONDENSED).set_header(["goal", "value", "bound", "met"]);
        for g in &self.goals {
            let met = if g.met { "yes" } else { "NO" };
            goals.add_row([g.name.clone(), format!("{:.3}", g.value), format!("{:.3}", g.bound), met.to_owned()]);
        }
        let Machine { cpu, cpus, memory, kernel } = &self.machine;
        let gib = *memory as f64 / f64::from(1 << 30);
        format!("{}: {cpus} CPUs ({cpu}), {gib:.0} GiB, Linux {kernel}\n{results}\n{goals}", self.bench)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_ranks() {
        let m = Measured::of("x", "us", (1..=100).rev().map(f64::from).collect());
        assert_eq!((m.median, m.p99, m.n), (50.0, 99.0, 100));
        assert_eq!(Measured::of("x", "us", vec![]).n, 0);
    }

    #[test]
    fn a_goal_without_a_number_is_not_met() {
        assert!(!Goal::at_most("x", f64::NAN, 1.0).met);
        assert!(Goal::at_least("x", 1.0, 1.0).met);
    }
}
