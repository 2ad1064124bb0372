//! What goes around a checkpoint: everything stands still before it, and a clone goes to work after it. Each request has
//! a thread of its own, so that the host gets its other answers meanwhile; but only one works at a time.

use crate::freezer::Freezer;
use crate::hooks::{self, Run};
use crate::names;
use crate::netlink::NewLinks;
use crate::network::{self, Card};
use crate::paths::Paths;
use crate::subscribers::Subscribers;
use crate::threads::{Priority, helper};
use ramet_guest::protocol::{
    Freeze, FreezeAck, GuestId, HookResult, Identity, MAX_PAYLOAD, Release, ReleaseAck, ThawAck,
};
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of an answer for its hooks.
const HOOKS: usize = MAX_PAYLOAD - 2048;
/// Most bytes of an error's text.
const ERROR: usize = 1024;
/// No request takes longer, whatever it says.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// The state of this machine between checkpoint and release.
#[derive(Debug)]
pub(crate) struct Control {
    pub(crate) paths: Paths,
    freezer: Freezer,
    subscribers: Arc<Subscribers>,
    who: Mutex<Option<GuestId>>,
    /// Whose names are still to be written to files.
    unwritten: Mutex<Option<Identity>>,
    /// Its interfaces.
    cards: Mutex<Vec<Card>>,
    /// A thread waits for interfaces.
    watches: AtomicBool,
    /// Held by the request that works.
    working: Mutex<()>,
    /// Number of requests that end a freeze.
    thaws: AtomicU64,
}

/// A request, from when it came.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ticket {
    deadline: Instant,
    thaws: u64,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Control {
    pub(crate) fn new(paths: Paths, freezer: Freezer, subscribers: Arc<Subscribers>) -> Self {
        // An agent that was started again knows who it is from the file.
        let known = std::fs::read(paths.id()).ok().and_then(|json| serde_json::from_slice(&json).ok());
        Self {
            paths,
            freezer,
            subscribers,
            who: Mutex::new(known),
            unwritten: Mutex::default(),
            cards: Mutex::default(),
            watches: AtomicBool::new(false),
            working: Mutex::default(),
            thaws: AtomicU64::new(0),
        }
    }

    /// The machine that this one was told to be.
    pub(crate) fn who(&self) -> Option<GuestId> {
        lock(&self.who).clone()
    }

    /// The machine is this one now.
    pub(crate) fn become_machine(&self, id: GuestId) {
        *lock(&self.who) = Some(id);
    }

    /// The interfaces that have the addresses of this machine, held.
    pub(crate) fn cards(&self) -> MutexGuard<'_, Vec<Card>> {
        lock(&self.cards)
    }

    /// From now on an interface of this machine that goes away and comes again gets its addresses back.
    pub(crate) fn watch_cards(self: &Arc<Self>) {
        if lock(&self.cards).is_empty() || self.watches.swap(true, Ordering::AcqRel) {
            return;
        }
        let control = Arc::clone(self);
        let watch = move || -> std::io::Result<()> {
            let links = NewLinks::open()?;
            loop {
                links.wait()?;
                if let Err(error) = network::restore(&control.paths, &mut control.cards()) {
                    eprintln!("ramet-agent: an interface that came again has no addresses: {error}");
                }
            }
        };
        let started = helper(move || {
            if let Err(error) = watch() {
                eprintln!("ramet-agent: interfaces are not watched: {error}");
            }
        });
        if let Err(error) = started {
            eprintln!("ramet-agent: interfaces are not watched: {error}");
        }
    }

    /// The names of this identity are written to files when the machine is released.
    pub(crate) fn write_later(&self, identity: &Identity) {
        *lock(&self.unwritten) = Some(Identity { entropy: String::new(), ..identity.clone() });
    }

    /// To be taken when the request comes, before its thread is started.
    pub(crate) fn ticket(&self, limit_ms: u64) -> Ticket {
        let deadline = Instant::now() + Duration::from_millis(limit_ms).min(LONGEST);
        Ticket { deadline, thaws: self.thaws.load(Ordering::Acquire) }
    }

    /// Ends the freezes that are under way.
    pub(crate) fn call_off(&self) {
        self.thaws.fetch_add(1, Ordering::AcqRel);
    }

    pub(crate) fn freeze(&self, request: &Freeze, ticket: Ticket) -> FreezeAck {
        let _working = lock(&self.working);
        let is_cancelled = || self.thaws.load(Ordering::Acquire) != ticket.thaws;
        let mut ack = FreezeAck::default();
        let result = self.try_freeze(request, ticket.deadline, &is_cancelled, &mut ack);
        ack.ok = result.is_ok();
        ack.error = result.err().map(|error| clip(&error));
        hooks::fit(&mut ack.hooks, HOOKS);
        ack
    }

    fn try_freeze(
        &self,
        request: &Freeze,
        deadline: Instant,
        is_cancelled: &dyn Fn() -> bool,
        ack: &mut FreezeAck,
    ) -> Result<(), String> {
        let check = || {
            if is_cancelled() {
                Err("the freeze is no longer wanted".to_owned())
            } else if Instant::now() >= deadline {
                Err("the time for the freeze is over".to_owned())
            } else {
                Ok(())
            }
        };
        if request.hooks {
            ack.hooks = self.hooks("checkpoint", Run { deadline, is_cancelled, stop_at_failure: true })?;
            failed(&ack.hooks)?;
        }
        if request.sync {
            check()?;
            rustix::fs::sync();
        }
        if request.freeze {
            check()?;
            self.freezer.freeze(deadline, is_cancelled)?;
            ack.frozen = true;
            // From here on nothing is asked for: but what has just been called off must not stay.
            if is_cancelled() {
                self.freezer.thaw()?;
                ack.frozen = false;
            }
        }
        if is_cancelled() { check() } else { Ok(()) }
    }

    pub(crate) fn thaw(&self) -> ThawAck {
        let _working = lock(&self.working);
        let error = self.freezer.thaw().err().map(|error| clip(&error));
        ThawAck { ok: error.is_none(), error }
    }

    /// Lets all run that is frozen, also while a request works: so that it can end.
    pub(crate) fn thaw_to_end(&self) {
        self.call_off();
        if let Err(error) = self.freezer.thaw() {
            eprintln!("ramet-agent: {error}");
        }
    }

    pub(crate) fn release(&self, request: &Release, ticket: Ticket) -> ReleaseAck {
        let _working = lock(&self.working);
        let mut errors = Vec::new();
        let mut ack = ReleaseAck::default();
        let unwritten = lock(&self.unwritten).take();
        if let Some(identity) = unwritten {
            // Its servers may answer before the last file has its name.
            let _modest = Priority::modest();
            let mut step = |what: &str, result: io::Result<network::Remark>| {
                errors.extend(result.err().map(|error| format!("{what}: {error}")));
            };
            if let Some(id) = self.who() {
                names::write_id(&self.paths, &id, &mut step);
            }
            names::write(&self.paths, &identity, &mut step);
        }
        if request.hooks {
            let run = Run { deadline: ticket.deadline, is_cancelled: &|| false, stop_at_failure: false };
            match self.hooks("clone", run) {
                Ok(hooks) => {
                    errors.extend(failed(&hooks).err());
                    ack.hooks = hooks;
                }
                Err(error) => errors.push(error),
            }
        }
        if request.signal {
            match self.who() {
                Some(id) => ack.signalled = self.subscribers.tell(id.clone_number, id.generation),
                None => errors.push("this machine has not been told yet who it is".to_owned()),
            }
        }
        match self.freezer.thaw() {
            Ok(()) => ack.thawed = true,
            Err(error) => errors.push(error),
        }
        ack.ok = errors.is_empty();
        ack.error = (!ack.ok).then(|| clip(&errors.join("; ")));
        hooks::fit(&mut ack.hooks, HOOKS);
        ack
    }

    fn hooks(&self, hook: &str, run: Run<'_>) -> Result<Vec<HookResult>, String> {
        let dir = self.paths.at(&format!("etc/ramet/{hook}.d"));
        let env = hooks::environment(self.who().as_ref(), hook);
        hooks::run_all(&dir, &env, run).map_err(|error| format!("cannot run the hooks in {}: {error}", dir.display()))
    }
}

fn failed(hooks: &[HookResult]) -> Result<(), String> {
    let failed: Vec<&str> = hooks.iter().filter(|hook| !hook.ok).map(|hook| hook.name.as_str()).collect();
    if failed.is_empty() { Ok(()) } else { Err(format!("hooks failed: {}", failed.join(", "))) }
}

/// The beginning of a text.
pub(crate) fn clip(text: &str) -> String {
    text.chars().take(ERROR / 4).collect()
}
