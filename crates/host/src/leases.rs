//! Leases: VMs that live as long as a connection. They are how clones die with their caller, and how a fork over several
//! hosts leaves nothing behind when the host that runs it dies in the middle.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{Arc, Mutex},
};

use ramet_client::api::{ErrorCode, VmState};

use crate::{
    daemon::Daemon,
    error::{ApiError, ApiResult, from_peer},
    stats::lock,
};

/// The leases that are open.
#[derive(Debug, Default)]
pub struct Leases {
    open: Mutex<BTreeMap<String, Arc<Remote>>>,
}

/// The leases on other hosts that hang on one of ours.
#[derive(Debug, Default)]
struct Remote(tokio::sync::Mutex<HashMap<String, ramet_client::Lease>>);

impl Leases {
    /// A new lease.
    pub fn begin(&self) -> String {
        let id = ramet_memory::VmId::random().to_string();
        lock(&self.open).insert(id.clone(), Arc::default());
        id
    }

    /// Whether it is open.
    #[must_use]
    pub fn is_open(&self, lease: &str) -> bool {
        lock(&self.open).contains_key(lease)
    }

    /// Refuses a lease that is not open.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`].
    pub fn check(&self, lease: Option<&str>) -> ApiResult<()> {
        match lease {
            Some(lease) if !self.is_open(lease) => {
                Err(ApiError::new(ErrorCode::NotFound, format!("No lease '{}'", crate::names::shown(lease)))
                    .remedy("a lease lives as long as its connection: open one by POST /v1/leases, and keep it open"))
            }
            _ => Ok(()),
        }
    }

    fn end(&self, lease: &str) -> Option<Arc<Remote>> {
        lock(&self.open).remove(lease)
    }
}

impl Daemon {
    /// The lease on another host that ends with this one of ours.
    ///
    /// # Errors
    /// When the lease is gone or the host can't be reached.
    pub async fn lease_on(&self, lease: &str, host: &str) -> ApiResult<String> {
        self.leases.check(Some(lease))?;
        let remote = lock(&self.leases.open).get(lease).cloned();
        let Some(remote) = remote else {
            return Err(ApiError::new(ErrorCode::NotFound, format!("Lease '{lease}' has ended")));
        };
        let mut hosts = remote.0.lock().await;
        if let Some(there) = hosts.get(host) {
            return Ok(there.id().to_owned());
        }
        let there = self.peers.client(host)?.lease().await.map_err(|e| from_peer(host, e))?;
        let id = there.id().to_owned();
        hosts.insert(host.to_owned(), there);
        Ok(id)
    }

    /// Ends a lease: its VMs are removed, here and on other hosts. Clones that a fork of this host is still making are left
    /// to it: it finds the lease gone, and undoes them.
    pub async fn end_lease(self: &Arc<Self>, lease: &str) {
        let remote = self.leases.end(lease);
        let vms: Vec<_> = self.store.read(|s| {
            let ours = s.vms.values().filter(|vm| vm.lease.as_deref() == Some(lease));
            ours.filter(|vm| vm.state != VmState::Starting).map(|vm| vm.id).collect()
        });
        let tasks: tokio::task::JoinSet<()> = vms
            .into_iter()
            .map(|vm| {
                let daemon = self.clone();
                async move { daemon.end_vm(vm).await }
            })
            .collect();
        // Dropping the connections ends the leases on the other hosts.
        drop(remote);
        tasks.join_all().await;
        // Clones that hang on this lease until another host commits its fork.
        self.drop_starting(lease).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_good_while_it_is_open() {
        let leases = Leases::default();
        leases.check(None).unwrap();
        let id = leases.begin();
        leases.check(Some(&id)).unwrap();
        assert!(leases.end(&id).is_some());
        let err = leases.check(Some(&id)).unwrap_err();
        assert_eq!(err.code(), ErrorCode::NotFound);
        assert!(err.body().remedy.as_ref().unwrap().contains("keep it open"));
        assert!(leases.end(&id).is_none());
    }
}
