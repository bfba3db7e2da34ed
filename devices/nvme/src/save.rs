//! From a paused controller to plain state. Only reads.

pub(crate) mod admin;
pub(crate) mod reservations;

use std::sync::atomic::Ordering;
use std::time::Instant;

use vmstate::{Bitmap, Slots};

use crate::admin::{Admin, Pool};
use crate::config::MAX_NAMESPACES;
use crate::controller::Controller;
use crate::inventory::{NamespaceShape, Shape};
use crate::queue::{CompletionQueue, Ended, Location, Ring, SubmissionQueue};
use crate::shared::{Shared, lock};
use crate::state::{
    BufferState, CompletionQueueState, DoorbellBuffersState, EndedState, EventsState, FeaturesState,
    NamespaceState, NvmeState, RegionState, RegistersState, SmartState, SubmissionQueueState,
};

impl Controller {
    /// The state of the controller, which is paused ([`Controller::pause`]) and stays so. Saved twice it is the same.
    #[must_use]
    pub fn save(&self) -> NvmeState {
        let admin = lock(&self.admin);
        let pool = &self.pool;
        let shared = &pool.shared;
        let queue_ids = u32::from(shared.config.queue_pairs) + 1;
        let mut sq = Slots::empty(queue_ids as usize);
        let mut cq = Slots::empty(queue_ids as usize);
        if let Some(queues) = &admin.queues {
            sq.put(0, sq_state(shared, &queues.sq));
            cq.put(0, cq_state(shared, &queues.cq));
        }
        for index in 0..pool.workers.len() {
            let worker = pool.worker(index);
            for queue in worker.sqs.iter().flatten() {
                sq.put(usize::from(queue.id), sq_state(shared, queue));
            }
            for queue in worker.cqs.iter().flatten() {
                cq.put(usize::from(queue.id), cq_state(shared, queue));
            }
        }
        NvmeState {
            shape: Shape::of(&shared.config),
            registers: registers_state(shared),
            features: features_state(shared, &admin),
            events: events_state(shared, &admin),
            doorbell_buffers: admin.buffers.map_or_else(DoorbellBuffersState::default, |buffers| {
                DoorbellBuffersState {
                    enabled: true,
                    shadow: buffers.shadow,
                    event_index: buffers.event_index,
                }
            }),
            smart: smart_state(pool, &admin, now(&admin)),
            changed_count: admin.changed_namespaces.len() as u16,
            changed_namespaces: admin.changed_namespaces.clone(),
            sq_count: queue_ids,
            sq,
            cq_count: queue_ids,
            cq,
            namespace_count: MAX_NAMESPACES,
            namespaces: namespaces_state(&admin),
            pci: shared.endpoint.save(),
            firmware: admin::firmware_state(&admin),
            format: admin::format_state(&admin),
            sanitize: admin::sanitize_state(&admin, shared.controller_id),
            self_test: admin::self_test_state(&admin),
            buffer: buffer_state(shared),
            region: region_state(shared),
            persistent_events: admin::persistent_events_state(&admin),
            allocations: shared.subsystem.to_state(shared.controller_id),
            reservations: reservations::reservations_state(shared),
            access: reservations::access_state(shared),
            reservation_notices: reservations::notices_state(shared, &admin.features.host_identifier),
        }
    }
}

fn buffer_state(shared: &Shared) -> Option<BufferState> {
    let control = shared.registers().spaces.buffer();
    (control != 0).then_some(BufferState { control })
}

fn region_state(shared: &Shared) -> Option<RegionState> {
    let registers = shared.registers();
    let (enabled, error) = (shared.region.control() != 0, shared.region.error());
    let memory_space = registers.spaces.region();
    let is_first = registers.spaces.region_is_first();
    (enabled || memory_space != 0 || error != 0).then_some(RegionState {
        enabled,
        memory_space,
        is_first,
        error,
    })
}

fn registers_state(shared: &Shared) -> RegistersState {
    let registers = shared.registers();
    RegistersState {
        cc: registers.cc.0,
        csts: registers.csts.0,
        aqa: registers.aqa.0,
        asq: registers.asq,
        acq: registers.acq,
        interrupt_mask: registers.interrupt_mask,
    }
}

fn features_state(shared: &Shared, admin: &Admin) -> FeaturesState {
    let features = &admin.features;
    let mut coalescing_disabled = Bitmap::new(features.coalescing_disabled.len());
    for (vector, &disabled) in features.coalescing_disabled.iter().enumerate() {
        coalescing_disabled.set(vector, disabled);
    }
    FeaturesState {
        arbitration: features.arbitration,
        over_temperature_kelvin: features.over_temperature_kelvin,
        under_temperature_kelvin: features.under_temperature_kelvin,
        write_cache: shared.write_cache.load(Ordering::Acquire),
        interrupt_coalescing: features.interrupt_coalescing,
        vector_count: shared.config.vectors,
        coalescing_disabled,
        write_atomicity: features.write_atomicity,
        async_events: features.async_events,
        keep_alive_ms: features.keep_alive_ms,
        timestamp_ms: features.timestamp.milliseconds_at(now(admin)),
        timestamp_set: features.timestamp.set,
        command_retry: features.command_retry,
        host_identifier: features.host_identifier,
        saved: admin::saved_features_state(admin),
        more: admin::more_features_state(features),
    }
}

fn events_state(shared: &Shared, admin: &Admin) -> EventsState {
    let events = shared.events();
    EventsState {
        parked_count: admin.parked.len() as u8,
        parked: admin.parked.clone(),
        queued_count: events.queued.len() as u8,
        queued: events.queued.iter().map(|event| event.to_dword()).collect(),
        masked: events.masked,
        error_count: events.error_count,
        entry_count: events.errors.len() as u8,
        entries: events.errors.iter().map(|entry| entry.to_bytes()).collect(),
        warnings: admin::warnings_state(shared),
    }
}

/// What the controller has counted until `now`.
pub(crate) fn smart_state(pool: &Pool, admin: &Admin, now: Instant) -> SmartState {
    let mut counters = admin.counters_before;
    for index in 0..pool.workers.len() {
        counters.add(&pool.worker(index).counters);
    }
    counters.to_state(&admin.health, now)
}

fn namespaces_state(admin: &Admin) -> Slots<NamespaceState> {
    let state = |(index, namespace): (usize, &Option<std::sync::Arc<_>>)| {
        namespace.as_ref().map(|namespace| NamespaceState {
            shape: NamespaceShape::of(namespace),
            error_recovery: admin.features.error_recovery.get(index).copied().unwrap_or(0),
            write_protection: admin::write_protection_state(namespace),
            uncorrectable: namespace.uncorrectable.save(),
        })
    };
    admin.namespaces.iter().enumerate().map(state).collect()
}

fn sq_state(shared: &Shared, queue: &SubmissionQueue) -> SubmissionQueueState {
    let (contiguous, pages) = pages(&queue.ring);
    let rung = shared.doorbells.tail(queue.id);
    // A shadow is in guest memory and travels there.
    let tail = if queue.shadow.is_some() || rung >= queue.ring.entries { queue.tail } else { rung };
    // A guest that has moved its tail back has taken aborted commands with it.
    let waiting = queue.ring.distance(queue.head, tail);
    let waits = |&position: &u16| queue.ring.distance(queue.head, position.into()) < waiting;
    let aborted: Vec<_> = queue.aborted.iter().copied().filter(waits).collect();
    SubmissionQueueState {
        id: queue.id,
        cq_id: queue.cq_id,
        priority: queue.priority,
        size: queue.ring.entries,
        head: queue.head,
        tail,
        contiguous,
        page_count: pages.len() as u32,
        pages,
        aborted_count: aborted.len() as u32,
        aborted,
    }
}

fn cq_state(shared: &Shared, queue: &CompletionQueue) -> CompletionQueueState {
    let (contiguous, pages) = pages(&queue.ring);
    let head = match queue.shadow {
        Some(_) => queue.head,
        None => queue.head_after(shared.doorbells.head(queue.id)).unwrap_or(queue.head),
    };
    let ended = |ended: &Ended| EndedState {
        sq_id: ended.sq_id,
        cid: ended.cid,
        status: ended.status.0,
        dw0: ended.dw0,
        dw1: ended.dw1,
    };
    let backlog: Vec<_> = queue.backlog.iter().map(ended).collect();
    CompletionQueueState {
        id: queue.id,
        vector: queue.vector,
        interrupts: queue.interrupts,
        size: queue.ring.entries,
        head,
        tail: queue.tail,
        phase: queue.phase,
        contiguous,
        page_count: pages.len() as u32,
        pages,
        backlog_count: backlog.len() as u32,
        backlog,
    }
}

fn pages(ring: &Ring) -> (bool, Vec<u64>) {
    match &ring.location {
        Location::Contiguous(base) => (true, vec![*base]),
        Location::Pages(pages) => (false, pages.to_vec()),
    }
}

/// The time that is saved: while paused, that of the pause.
fn now(admin: &Admin) -> Instant {
    admin.paused_at.unwrap_or_else(Instant::now)
}
