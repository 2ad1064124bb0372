//! Latency histograms and event counters of the daemon.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;
use ramet_client::api::{LatencySummary, Phase, Timeline};

/// Longest latency that a histogram tells apart: one hour, in microseconds.
const HIGHEST_US: u64 = 3_600_000_000;

/// Locks, even after a panic elsewhere: what the daemon guards is never left half-changed.
pub(crate) fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Histograms by phase and counters by event.
#[derive(Debug, Default)]
pub struct Stats {
    phases: Mutex<BTreeMap<String, Histogram<u64>>>,
    events: Mutex<BTreeMap<&'static str, u64>>,
}

impl Stats {
    /// Records one latency.
    pub fn record(&self, phase: &str, us: u64) {
        let mut phases = lock(&self.phases);
        if !phases.contains_key(phase) {
            let Ok(histogram) = Histogram::new_with_bounds(1, HIGHEST_US, 3) else { return };
            phases.insert(phase.to_owned(), histogram);
        }
        if let Some(histogram) = phases.get_mut(phase) {
            histogram.saturating_record(us);
        }
    }

    /// Records every phase of a timeline as `PREFIX_PHASE`.
    pub fn record_timeline(&self, prefix: &str, timeline: &Timeline) {
        for phase in &timeline.phases {
            self.record(&format!("{prefix}_{}", phase.name), phase.duration_us);
        }
    }

    /// Counts an event.
    pub fn count(&self, event: &'static str) {
        *lock(&self.events).entry(event).or_default() += 1;
    }

    /// All histograms in short.
    pub fn summaries(&self) -> BTreeMap<String, LatencySummary> {
        lock(&self.phases).iter().map(|(name, h)| (name.clone(), summary(h))).collect()
    }

    /// All counters.
    pub fn events(&self) -> BTreeMap<String, u64> {
        lock(&self.events).iter().map(|(name, n)| ((*name).to_owned(), *n)).collect()
    }

    /// Visits every histogram.
    pub fn each(&self, mut visit: impl FnMut(&str, &Histogram<u64>)) {
        lock(&self.phases).iter().for_each(|(name, h)| visit(name, h));
    }
}

fn summary(h: &Histogram<u64>) -> LatencySummary {
    LatencySummary {
        count: h.len(),
        min_us: Some(h.min() as f64),
        mean_us: h.mean(),
        p50_us: h.value_at_quantile(0.5) as f64,
        p90_us: Some(h.value_at_quantile(0.9) as f64),
        p99_us: h.value_at_quantile(0.99) as f64,
        max_us: h.max() as f64,
    }
}

/// Whole microseconds.
pub(crate) fn us(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Measures phases one after another, from a common beginning.
#[derive(Debug, Clone)]
pub struct Clock {
    begin: Instant,
    last: Instant,
    timeline: Timeline,
}

impl Clock {
    /// Phases are told from `begin`; the first one begins now.
    #[must_use]
    pub fn new(begin: Instant) -> Self {
        Self { begin, last: Instant::now(), timeline: Timeline::default() }
    }

    /// Ends the running phase, and gives it its name.
    pub fn lap(&mut self, name: &str) {
        let now = Instant::now();
        self.span(name, self.last, now);
        self.last = now;
    }

    /// Adds a phase that was measured elsewhere, and lets the running phase begin at its end.
    pub fn span(&mut self, name: &str, from: Instant, to: Instant) {
        let to_us = |t: Instant| us(t.saturating_duration_since(self.begin));
        let (start_us, end_us) = (to_us(from), to_us(to));
        self.timeline.phases.push(Phase {
            name: name.to_owned(),
            start_us,
            duration_us: end_us.saturating_sub(start_us),
        });
        self.timeline.total_us = self.timeline.total_us.max(end_us);
        self.last = self.last.max(to);
    }

    /// Splits the running phase: its first part took this long.
    pub fn part(&mut self, name: &str, took_us: u64) {
        let to = (self.last + Duration::from_micros(took_us)).min(Instant::now());
        self.span(name, self.last, to);
    }

    /// Microseconds since the beginning.
    #[must_use]
    pub fn elapsed_us(&self) -> u64 {
        us(self.begin.elapsed())
    }

    /// What was measured.
    #[must_use]
    pub fn timeline(self) -> Timeline {
        self.timeline
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_tell_quantiles() {
        let stats = Stats::default();
        for us in 1..=1000 {
            stats.record("clone_load", us);
        }
        stats.record("clone_load", u64::MAX);
        let summary = &stats.summaries()["clone_load"];
        assert_eq!(summary.count, 1001);
        assert!((495.0..=505.0).contains(&summary.p50_us), "{summary:?}");
        assert!(summary.max_us >= 3.5e9, "values beyond the range count as the highest");
    }

    #[test]
    fn phases_follow_each_other() {
        let begin = Instant::now();
        let mut clock = Clock::new(begin);
        std::thread::sleep(Duration::from_millis(3));
        clock.part("remap", 1000);
        clock.lap("attach");
        clock.lap("load");
        let timeline = clock.timeline();
        let names: Vec<_> = timeline.phases.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(names, ["remap", "attach", "load"]);
        assert!(timeline.phase_us("remap").unwrap().abs_diff(1000) <= 1);
        for pair in timeline.phases.windows(2) {
            assert!(pair[1].start_us.abs_diff(pair[0].start_us + pair[0].duration_us) <= 2, "{timeline:?}");
        }
        assert!(timeline.total_us >= 3000);
    }
}
