//! Undoing: what a transaction has done so far, and how each step is taken back.

use std::{future::Future, pin::Pin};

type Step = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The steps to take back, the newest first, should the rest fail.
#[derive(Default)]
#[must_use = "either `commit` or `run` it"]
pub struct Undo {
    steps: Vec<(String, Step)>,
}

impl Undo {
    /// Nothing done yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Something was done; `step` takes it back.
    pub fn push(&mut self, what: impl Into<String>, step: impl Future<Output = ()> + Send + 'static) {
        self.steps.push((what.into(), Box::pin(step)));
    }

    /// All has succeeded: nothing is taken back.
    pub fn commit(self) {
        drop(self);
    }

    /// Takes everything back, the newest step first.
    pub async fn run(self) {
        for (what, step) in self.steps.into_iter().rev() {
            tracing::info!(what, "undoing");
            step.await;
        }
    }
}

impl std::fmt::Debug for Undo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.steps.iter().map(|(what, _)| what)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    fn recorder() -> (Arc<Mutex<Vec<u32>>>, Undo) {
        let done = Arc::new(Mutex::new(Vec::new()));
        let mut undo = Undo::new();
        for n in [1, 2, 3] {
            let done = done.clone();
            undo.push(format!("step {n}"), async move { done.lock().unwrap().push(n) });
        }
        (done, undo)
    }

    #[tokio::test]
    async fn steps_are_taken_back_newest_first() {
        let (done, undo) = recorder();
        undo.run().await;
        assert_eq!(*done.lock().unwrap(), [3, 2, 1]);
    }

    #[tokio::test]
    async fn success_takes_nothing_back() {
        let (done, undo) = recorder();
        undo.commit();
        assert!(done.lock().unwrap().is_empty());
    }
}
