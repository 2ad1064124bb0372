//! A latency histogram that a fault thread writes without a lock and anyone may read.

use crate::control::Latency;
use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::Duration,
};

const SUB_BITS: u32 = 4;
const SUB: usize = 1 << SUB_BITS;
const BUCKETS: usize = (64 - SUB_BITS as usize + 1) * SUB;

/// Log-linear buckets of nanoseconds, 16 to a power of two: values are kept to within 1/16 (the principle of HDR
/// histograms, with atomic counters and no resizing, which the fault path needs).
pub struct Histogram {
    buckets: Box<[AtomicU64]>,
    sum: AtomicU64,
    max: AtomicU64,
}

impl std::fmt::Debug for Histogram {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Histogram").field(&self.latency()).finish()
    }
}

impl Default for Histogram {
    fn default() -> Self {
        Self {
            buckets: (0..BUCKETS).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
            max: AtomicU64::new(0),
        }
    }
}

fn bucket(ns: u64) -> usize {
    if ns < SUB as u64 {
        return ns as usize;
    }
    let shift = ns.ilog2() - SUB_BITS;
    (shift as usize + 1) * SUB + ((ns >> shift) as usize & (SUB - 1))
}

/// The largest value that falls into a bucket.
fn upper(bucket: usize) -> u64 {
    if bucket < SUB {
        return bucket as u64;
    }
    let shift = bucket / SUB - 1;
    let low = ((SUB + bucket % SUB) as u64) << shift;
    low + ((1 << shift) - 1)
}

impl Histogram {
    /// Adds a sample.
    pub fn record(&self, time: Duration) {
        let ns = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.buckets[bucket(ns)].fetch_add(1, Relaxed);
        self.sum.fetch_add(ns, Relaxed);
        self.max.fetch_max(ns, Relaxed);
    }

    /// The quantiles so far.
    #[must_use]
    pub fn latency(&self) -> Latency {
        let counts: Vec<u64> = self.buckets.iter().map(|b| b.load(Relaxed)).collect();
        let count: u64 = counts.iter().sum();
        let max = self.max.load(Relaxed);
        let at = |quantile: f64| {
            let rank = (count as f64 * quantile).ceil() as u64;
            let mut seen = 0;
            for (b, n) in counts.iter().enumerate() {
                seen += n;
                if seen >= rank.max(1) {
                    return upper(b).min(max) as f64 / 1e3;
                }
            }
            0.0
        };
        Latency { count, p50: at(0.5), p99: at(0.99), max: max as f64 / 1e3, sum: self.sum.load(Relaxed) as f64 / 1e3 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_bucket_holds_its_value_to_a_sixteenth(ns in any::<u64>()) {
            let top = upper(bucket(ns));
            prop_assert!(top >= ns);
            prop_assert!(top - ns <= ns / 16);
        }
    }

    #[test]
    fn quantiles_of_a_known_series() {
        let h = Histogram::default();
        assert_eq!(h.latency().p99, 0.0);
        for us in 1..=1000 {
            h.record(Duration::from_micros(us));
        }
        let l = h.latency();
        assert_eq!(l.count, 1000);
        assert!((480.0..540.0).contains(&l.p50), "{l:?}");
        assert!((980.0..=1000.0).contains(&l.p99), "{l:?}");
        assert_eq!(l.max, 1000.0);
    }
}
