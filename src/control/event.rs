//! Events: what happens to the machine, told to every client at once.

use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Value, json};

use super::operations::{AccessState, MigrationStatus};

/// Something that happened, in QEMU's words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// The guest was stopped.
    Stop,
    /// The guest runs again.
    Resume,
    /// The machine is about to end.
    Shutdown {
        /// Why.
        reason: ShutdownCause,
    },
    /// A migration reached a status. Only sent while the capability `events` is on.
    Migration {
        /// Which.
        status: MigrationStatus,
    },
    /// A guest was handed over, and the destination has not said whether it runs it: `x-ferry-status` tells what is known, and whether
    /// an operator has to decide. QEMU has no word for it.
    HandoverUnknown,
    /// A namespace of the host's changed at a command. QEMU has no word for it.
    Namespace {
        /// Serial number of its controller.
        controller: String,
        /// Namespace identifier.
        nsid: u32,
        /// What happened to it.
        change: NamespaceChange,
    },
    /// A controller gives access to a group of namespaces in another way since a command. QEMU has no word for it.
    Access {
        /// Serial number of the controller.
        controller: String,
        /// ANA group.
        group: u32,
        /// How.
        state: AccessState,
    },
}

/// What happened to a namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "change")]
pub enum NamespaceChange {
    /// It is there.
    Added,
    /// It is gone.
    Removed,
    /// It has grown.
    Resized {
        /// To so many bytes.
        #[serde(rename = "capacity-bytes")]
        capacity_bytes: u64,
    },
}

/// QEMU's `ShutdownCause`, as far as this machine knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum ShutdownCause {
    /// The command `quit`.
    HostQmpQuit,
    /// SIGINT or SIGTERM.
    HostSignal,
    /// Something failed in this process.
    HostError,
    /// The guest powered off.
    GuestShutdown,
    /// The guest reset itself, and a reset ends the machine.
    GuestReset,
    /// The guest panicked.
    GuestPanic,
}

impl ShutdownCause {
    fn by_guest(self) -> bool {
        matches!(self, Self::GuestShutdown | Self::GuestReset | Self::GuestPanic)
    }
}

impl Event {
    fn to_json(&self, at: SystemTime) -> Value {
        let since_epoch = at.duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut message = json!({
            "timestamp": { "seconds": since_epoch.as_secs(), "microseconds": since_epoch.subsec_micros() },
        });
        match self {
            Self::Stop => message["event"] = json!("STOP"),
            Self::Resume => message["event"] = json!("RESUME"),
            Self::Shutdown { reason } => {
                message["event"] = json!("SHUTDOWN");
                message["data"] = json!({ "guest": reason.by_guest(), "reason": reason });
            }
            Self::Migration { status } => {
                message["event"] = json!("MIGRATION");
                message["data"] = json!({ "status": status });
            }
            Self::HandoverUnknown => message["event"] = json!("X_FERRY_HANDOVER_UNKNOWN"),
            Self::Namespace { controller, nsid, change } => {
                message["event"] = json!("X_FERRY_NAMESPACE");
                message["data"] = json!(change);
                message["data"]["controller"] = json!(controller);
                message["data"]["nsid"] = json!(nsid);
            }
            Self::Access { controller, group, state } => {
                message["event"] = json!("X_FERRY_ANA");
                message["data"] = json!({ "controller": controller, "group": group, "state": state });
            }
        }
        message
    }
}

/// Carries events from wherever they happen to the clients of the control socket.
///
/// [`EventBus::emit`] never waits: a client that does not read loses its connection, not the machine its time.
#[derive(Debug, Default)]
pub struct EventBus {
    subscribers: Mutex<Vec<Subscriber>>,
    migration_events: AtomicBool,
}

/// A client that is told.
#[derive(Debug)]
pub(super) struct Subscriber {
    /// Its queue of lines to write.
    pub lines: SyncSender<String>,
    /// Its connection, to cut when the queue is full.
    pub stream: Arc<UnixStream>,
}

impl EventBus {
    /// A bus without subscribers.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells every subscriber, in the same order to each.
    pub fn emit(&self, event: Event) {
        if matches!(event, Event::Migration { .. }) && !self.migration_events() {
            return;
        }
        let mut subscribers = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        if subscribers.is_empty() {
            return;
        }
        let line = event.to_json(SystemTime::now()).to_string();
        subscribers.retain(|subscriber| match subscriber.lines.try_send(line.clone()) {
            Ok(()) => true,
            Err(TrySendError::Full(_)) => {
                log::warn!("control: a client does not read its events and is disconnected");
                // It fails only when the client has gone already.
                let _ = subscriber.stream.shutdown(Shutdown::Both);
                false
            }
            Err(TrySendError::Disconnected(_)) => false,
        });
    }

    /// Queues the answer that ends a client's handshake and adds the client, in one step: it hears every event that
    /// follows the answer, and none before. Says whether there was room for the answer.
    pub(super) fn subscribe(&self, subscriber: Subscriber, answer: String) -> bool {
        let mut subscribers = self.subscribers.lock().unwrap_or_else(PoisonError::into_inner);
        let queued = subscriber.lines.try_send(answer).is_ok();
        if queued {
            subscribers.push(subscriber);
        }
        queued
    }

    /// Forgets a client, so that its queue ends.
    pub(super) fn unsubscribe(&self, stream: &Arc<UnixStream>) {
        self.subscribers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .retain(|subscriber| !Arc::ptr_eq(&subscriber.stream, stream));
    }

    /// The migration capability `events`.
    pub fn migration_events(&self) -> bool {
        self.migration_events.load(Ordering::Relaxed)
    }

    /// Switches the migration capability `events`.
    pub fn set_migration_events(&self, on: bool) {
        self.migration_events.store(on, Ordering::Relaxed);
    }
}
