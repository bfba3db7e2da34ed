//! From plain state, which is not trusted, to a controller.
//!
//! Queues are made by the functions that serve the guest's own Create commands, with the same checks; pointers are set afterwards.
//! Nothing here touches guest memory.

pub(crate) mod admin;
mod memory;
pub(crate) mod reservations;

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use block::IoContext;
use bus::GuestMemory;
use nvme_spec::Status;
use nvme_spec::event::Event;
use nvme_spec::log::ErrorEntry;
use nvme_spec::regs::{Aqa, Cc, Csts};
use pci::MsixSink;

use crate::Error;
use crate::admin::{Admin, MAX_PARKED, Phase, Pool, check_configuration};
use crate::command::features::{ASYNC_EVENT_BITS, KEEP_ALIVE_GRANULARITY_MS, TIMESTAMP_MASK, Timestamp};
use crate::command::queues::entry_sizes_are_set;
use crate::config::{ControllerConfig, NamespaceConfig};
use crate::controller::Controller;
use crate::doorbell::Buffers;
use crate::inventory::{NamespaceShape, Shape};
use crate::queue::{Ended, Location, MAX_ABORTED, MAX_BACKLOG, QueuePlace};
use crate::shared::{Host, lock};
use crate::smart::Counters;
use crate::state::{
    CompletionQueueState, EventsState, FeaturesState, NvmeState, RegistersState, SubmissionQueueState,
};
use crate::window::Windows;

/// The bits of CSTS that a quiet controller can have set: RDY, CFS, SHST complete, NSSRO.
const CSTS_BITS: u32 = 0b1_1011;

fn refuse<T>(field: impl Into<String>, value: impl Into<u64>, reason: &'static str) -> Result<T, Error> {
    Err(Error::State { field: field.into(), value: value.into(), reason })
}

impl Controller {
    /// [`Controller::new`] and [`Controller::load`] in one.
    ///
    /// # Errors
    /// Those of both.
    pub fn restore(
        state: &NvmeState,
        config: ControllerConfig,
        memory: GuestMemory,
        namespaces: &[NamespaceConfig],
        contexts: Vec<IoContext>,
        sink: Arc<dyn MsixSink>,
        host: Arc<dyn Host>,
    ) -> Result<Self, Error> {
        let controller = Self::new(config, memory, namespaces, contexts, sink, host)?;
        controller.load(state)?;
        Ok(controller)
    }

    /// Takes over a saved state. The controller must be as [`Controller::new`] made it; it is paused afterwards, and
    /// [`Controller::resume`] starts it. Its images need not be acquired yet.
    ///
    /// # Errors
    /// [`Error::State`] and [`Error::PciState`]: the state is not that of such a controller, or not one that a guest can have
    /// brought about; [`Error::NotPristine`]. The controller is then not usable.
    pub fn load(&self, state: &NvmeState) -> Result<(), Error> {
        let pool = &self.pool;
        let mut admin = lock(&self.admin);
        let registers = pool.shared.registers().clone();
        if admin.phase != Phase::Disabled || registers.cc != Cc::default() || registers.wanted.any() {
            return Err(Error::NotPristine);
        }
        self.begin_pause();
        check_shape(state, &Shape::of(&pool.shared.config))?;
        pool.shared.subsystem.load(state.allocations.as_ref())?;
        admin.follow_subsystem(pool);
        check_namespaces(state, &admin)?;
        let phase = check_registers(&state.registers)?;
        check_features(&state.features, pool.shared.config.vectors)?;
        check_events(&state.events, phase)?;
        pool.shared.endpoint.restore(&state.pci).map_err(Error::PciState)?;
        let now = Instant::now();
        load_registers(pool, &state.registers);
        memory::load_buffer(pool, state.buffer.as_ref())?;
        memory::load_region(pool, state.region.as_ref())?;
        load_features(pool, &mut admin, state, now);
        load_events(pool, &mut admin, &state.events);
        load_smart(&mut admin, state, now);
        admin::load(pool, &mut admin, state, now)?;
        reservations::load(&pool.shared, state)?;
        for (index, saved) in state.namespaces.present() {
            if let (Some(saved), Some(Some(namespace))) = (&saved.uncorrectable, admin.namespaces.get(index))
            {
                let marks = &namespace.uncorrectable;
                marks.load(saved, namespace.blocks).or_else(|(first, reason)| {
                    refuse(format!("namespaces[{index}].uncorrectable.runs"), first, reason)
                })?;
            }
        }
        load_queues(pool, &mut admin, state)?;
        load_doorbell_buffers(pool, &mut admin, state)?;
        admin.phase = phase;
        admin.is_running = matches!(phase, Phase::Ready | Phase::Failed);
        let (id, smart) = (pool.shared.controller_id, state.smart.clone());
        // It was not powered on here.
        pool.shared.subsystem.note(id, smart, admin.is_running);
        admin.paused_at = Some(now);
        pool.shared.active.store(phase == Phase::Ready, Ordering::SeqCst);
        Ok(())
    }
}

fn check_shape(state: &NvmeState, here: &Shape) -> Result<(), Error> {
    let there = &state.shape;
    if there.serial != here.serial {
        return refuse("shape.serial", there.serial[0], "it is that of another controller");
    }
    let counts = [
        ("shape.queue_pairs", u64::from(there.queue_pairs), u64::from(here.queue_pairs)),
        ("shape.vectors", u64::from(there.vectors), u64::from(here.vectors)),
        ("shape.mdts", u64::from(there.mdts), u64::from(here.mdts)),
        ("shape.queue_entries", u64::from(there.queue_entries), u64::from(here.queue_entries)),
        ("shape.contiguous_queues", u64::from(there.contiguous_queues), u64::from(here.contiguous_queues)),
    ];
    for (field, there, here) in counts {
        if there != here {
            return refuse(field, there, "this controller is configured otherwise");
        }
    }
    let ids = usize::from(here.queue_pairs) + 1;
    if state.sq.len() != ids {
        return refuse(
            "sq_count",
            state.sq.len() as u64,
            "there is a slot for each queue pair and the admin queue",
        );
    }
    if state.cq.len() != ids {
        return refuse(
            "cq_count",
            state.cq.len() as u64,
            "there is a slot for each queue pair and the admin queue",
        );
    }
    Ok(())
}

fn check_namespaces(state: &NvmeState, admin: &Admin) -> Result<(), Error> {
    if state.namespaces.len() != admin.namespaces.len() {
        return refuse(
            "namespace_count",
            state.namespaces.len() as u64,
            "there is a slot for each possible identifier",
        );
    }
    for (index, (there, here)) in state.namespaces.iter().zip(admin.namespaces.iter()).enumerate() {
        let nsid = index as u64 + 1;
        match (there, here) {
            (None, None) => {}
            (Some(_), None) => return refuse(format!("namespaces[{index}]"), nsid, "it is missing here"),
            (None, Some(_)) => return refuse(format!("namespaces[{index}]"), nsid, "it is here only"),
            (Some(there), Some(here)) => {
                let here = NamespaceShape::of(here);
                if there.shape.nsid != here.nsid {
                    let reason = "it is not the identifier of its slot";
                    return refuse(format!("namespaces[{index}].nsid"), there.shape.nsid, reason);
                }
                // Spelling the differences out costs more than everything else here.
                if there.shape != here
                    && let Some(difference) = there.shape.differences(&here).into_iter().next()
                {
                    return Err(Error::Namespace { nsid: here.nsid, reason: difference });
                }
            }
        }
    }
    for &nsid in &state.changed_namespaces {
        if nsid == 0 || nsid as usize > admin.namespaces.len() {
            return refuse("changed_namespaces", nsid, "it is not a namespace identifier");
        }
    }
    Ok(())
}

/// Where a quiet controller with these registers is.
fn check_registers(state: &RegistersState) -> Result<Phase, Error> {
    let (cc, csts, aqa) = (Cc(state.cc), Csts(state.csts), Aqa(state.aqa));
    if csts.0 & !CSTS_BITS != 0 {
        return refuse("registers.csts", csts.0, "it has bits that a quiet controller has not");
    }
    if aqa != Aqa::default().with_asqs(aqa.asqs()).with_acqs(aqa.acqs()) {
        return refuse("registers.aqa", aqa.0, "it has reserved bits set");
    }
    for (field, value) in [("registers.asq", state.asq), ("registers.acq", state.acq)] {
        if value & 0xfff != 0 {
            return refuse(field, value, "it has reserved bits set");
        }
    }
    if csts.shst() == 3 {
        return refuse("registers.csts", csts.0, "its shutdown status is reserved");
    }
    if cc.en() == 0 {
        return match (csts.rdy(), csts.cfs()) {
            (0, _) => Ok(Phase::Disabled),
            _ => refuse("registers.csts", csts.0, "it is ready but CC.EN is 0"),
        };
    }
    // A shutdown that came before the enable was served ends so: not ready, and complete.
    if csts.rdy() == 0 && csts.cfs() == 0 && csts.shst() == 0 {
        return refuse("registers.csts", csts.0, "it is neither ready nor failed but CC.EN is 1");
    }
    if csts.rdy() == 1 && check_configuration(cc).is_err() {
        return refuse("registers.cc", cc.0, "it cannot be enabled with that");
    }
    Ok(match (csts.cfs(), csts.shst()) {
        (1, _) => Phase::Failed,
        (_, 0) => Phase::Ready,
        _ => Phase::Stopped,
    })
}

fn check_features(state: &FeaturesState, vectors: u16) -> Result<(), Error> {
    if state.vector_count != vectors || state.coalescing_disabled.len() != usize::from(vectors) {
        return refuse("features.vector_count", state.vector_count, "it is not the number of vectors");
    }
    if state.interrupt_coalescing > 0xffff {
        return refuse(
            "features.interrupt_coalescing",
            state.interrupt_coalescing,
            "it has reserved bits set",
        );
    }
    if state.write_atomicity > 1 {
        return refuse("features.write_atomicity", state.write_atomicity, "it has reserved bits set");
    }
    if state.async_events & !ASYNC_EVENT_BITS != 0 {
        return refuse("features.async_events", state.async_events, "it asks for events that do not exist");
    }
    if !state.keep_alive_ms.is_multiple_of(KEEP_ALIVE_GRANULARITY_MS) {
        return refuse("features.keep_alive_ms", state.keep_alive_ms, "it is not a whole number of seconds");
    }
    if state.timestamp_ms > TIMESTAMP_MASK {
        return refuse("features.timestamp_ms", state.timestamp_ms, "it has more than 48 bits");
    }
    if state.command_retry > 1 {
        return refuse("features.command_retry", state.command_retry, "it is neither 0 nor 1");
    }
    Ok(())
}

fn check_events(state: &EventsState, phase: Phase) -> Result<(), Error> {
    if phase == Phase::Disabled && !state.parked.is_empty() {
        return refuse("events.parked_count", state.parked_count, "a disabled controller has no commands");
    }
    for &dword in &state.queued {
        if Event::from_dword(dword).to_dword() != dword {
            return refuse("events.queued", dword, "it is not an asynchronous event");
        }
    }
    if state.error_count > u64::MAX / 2 {
        return refuse("events.error_count", state.error_count, "nobody counts so many errors");
    }
    for entry in &state.entries {
        let parsed = ErrorEntry::from_bytes(entry);
        let count = parsed.error_count;
        if parsed.to_bytes() != *entry {
            return refuse("events.entries", count, "the entry has reserved bytes set");
        }
        if count == 0 || count > state.error_count {
            return refuse("events.entries.error_count", count, "it is not between 1 and the errors counted");
        }
    }
    Ok(())
}

fn load_registers(pool: &Pool, state: &RegistersState) {
    let mut registers = pool.shared.registers();
    registers.cc = Cc(state.cc);
    registers.csts = Csts(state.csts);
    registers.aqa = Aqa(state.aqa);
    registers.asq = state.asq;
    registers.acq = state.acq;
    registers.interrupt_mask = state.interrupt_mask;
}

fn load_features(pool: &Pool, admin: &mut Admin, state: &NvmeState, now: Instant) {
    let (features, saved) = (&mut admin.features, &state.features);
    features.arbitration = saved.arbitration;
    features.over_temperature_kelvin = saved.over_temperature_kelvin;
    features.under_temperature_kelvin = saved.under_temperature_kelvin;
    features.interrupt_coalescing = saved.interrupt_coalescing;
    for (vector, place) in features.coalescing_disabled.iter_mut().enumerate() {
        *place = saved.coalescing_disabled.get(vector);
    }
    features.write_atomicity = saved.write_atomicity;
    features.async_events = saved.async_events;
    features.keep_alive_ms = saved.keep_alive_ms;
    features.timestamp = Timestamp { milliseconds: saved.timestamp_ms, at: now, set: saved.timestamp_set };
    features.command_retry = saved.command_retry;
    features.host_identifier = saved.host_identifier;
    for (index, namespace) in state.namespaces.present() {
        features.error_recovery[index] = namespace.error_recovery;
    }
    pool.shared.write_cache.store(saved.write_cache, Ordering::Release);
    admin.apply_features(&pool.shared);
    admin.refresh_critical_warning();
}

fn load_events(pool: &Pool, admin: &mut Admin, state: &EventsState) {
    admin.parked.clone_from(&state.parked);
    let mut events = pool.shared.events();
    events.queued = state.queued.iter().map(|&dword| Event::from_dword(dword)).collect();
    events.masked = state.masked;
    events.error_count = state.error_count;
    events.errors = state.entries.iter().map(ErrorEntry::from_bytes).collect();
}

fn load_smart(admin: &mut Admin, state: &NvmeState, now: Instant) {
    let smart = &state.smart;
    admin.counters_before = Counters::from_state(smart);
    admin.health.power_cycles = smart.power_cycles;
    admin.health.unsafe_shutdowns = smart.unsafe_shutdowns();
    admin.health.seconds_before = smart.power_on_seconds;
    admin.health.since = now;
    admin.changed_namespaces.clone_from(&state.changed_namespaces);
}

/// Makes the admin queues as an enable does and the others as Create commands do, then sets their pointers.
fn load_queues(pool: &Pool, admin: &mut Admin, state: &NvmeState) -> Result<(), Error> {
    let registers = &state.registers;
    let ready = Csts(registers.csts).rdy() == 1;
    if !ready {
        for (name, present) in
            [("sq", state.sq.present().next().is_some()), ("cq", state.cq.present().next().is_some())]
        {
            if present {
                return refuse(name, 1u8, "a controller that is not ready has no queues");
            }
        }
        return Ok(());
    }
    let windows = &pool.shared.windows;
    let asq = place_of_admin_queue(windows, state.sq.get(0).map(|sq| &sq.pages), registers.asq);
    let acq = place_of_admin_queue(windows, state.cq.get(0).map(|cq| &cq.pages), registers.acq);
    let opened = admin.open_admin_queues(pool, Cc(registers.cc), Aqa(registers.aqa), asq, acq);
    if let Err((register, reason)) = opened {
        let value = match register {
            "asq" => registers.asq,
            "acq" => registers.acq,
            _ => registers.aqa.into(),
        };
        return refuse(format!("registers.{register}"), value, reason);
    }
    let has_io_queues = state.cq.present().any(|(index, _)| index > 0);
    if has_io_queues && !entry_sizes_are_set(Cc(registers.cc)) {
        return refuse(
            "registers.cc",
            registers.cc,
            "there are I/O queues, but it has not their entry sizes",
        );
    }
    for (index, saved) in state.cq.present() {
        load_cq(pool, admin, index, saved, state)?;
    }
    for (index, saved) in state.sq.present() {
        load_sq(pool, admin, index, saved, state)?;
    }
    if state.sq.get(0).is_none() || state.cq.get(0).is_none() {
        return refuse("sq[0]", 0u8, "a ready controller has an admin queue pair");
    }
    for (index, saved) in state.cq.present() {
        load_backlog(pool, admin, index, saved)?;
    }
    Ok(())
}

fn load_cq(
    pool: &Pool,
    admin: &mut Admin,
    index: usize,
    saved: &CompletionQueueState,
    state: &NvmeState,
) -> Result<(), Error> {
    let at = |field: &str| format!("cq[{index}].{field}");
    if usize::from(saved.id) != index {
        return refuse(at("id"), saved.id, "it is not its slot");
    }
    if index == 0 {
        let entries = Aqa(state.registers.aqa).acqs() + 1;
        if saved.size != entries {
            return refuse(at("size"), saved.size, "it is not the size of AQA");
        }
        check_admin_pages(&pool.shared.windows, &at, saved.contiguous, &saved.pages, state.registers.acq)?;
        if saved.vector != 0 {
            return refuse(at("vector"), saved.vector, "the admin queue uses vector 0");
        }
        if !saved.interrupts {
            return refuse(at("interrupts"), 0u8, "those of the admin queue are always enabled");
        }
    } else {
        let place = place(&at, saved.id, saved.size, saved.contiguous, &saved.pages, admin.page_shift)?;
        admin
            .add_cq(pool, place, saved.vector, saved.interrupts)
            .or_else(|status| refuse(at(refused_field(status)), status.code().0, reason(status)))?;
    }
    for (field, value) in [("head", saved.head), ("tail", saved.tail)] {
        if value >= saved.size {
            return refuse(at(field), value, "it is beyond the queue");
        }
    }
    let worker = pool.shared.worker_of(saved.id);
    pool.shared.doorbells.open_cq(saved.id, saved.size, worker, saved.head);
    with_cq(pool, admin, saved.id, |cq| {
        cq.head = saved.head;
        cq.tail = saved.tail;
        cq.phase = saved.phase;
    });
    pool.shared.doorbells.set_posted(saved.id, saved.tail);
    Ok(())
}

fn load_sq(
    pool: &Pool,
    admin: &mut Admin,
    index: usize,
    saved: &SubmissionQueueState,
    state: &NvmeState,
) -> Result<(), Error> {
    let at = |field: &str| format!("sq[{index}].{field}");
    if usize::from(saved.id) != index {
        return refuse(at("id"), saved.id, "it is not its slot");
    }
    if saved.priority > 3 {
        return refuse(at("priority"), saved.priority, "there are four priorities");
    }
    if index == 0 {
        let entries = Aqa(state.registers.aqa).asqs() + 1;
        if saved.size != entries {
            return refuse(at("size"), saved.size, "it is not the size of AQA");
        }
        check_admin_pages(&pool.shared.windows, &at, saved.contiguous, &saved.pages, state.registers.asq)?;
        if saved.cq_id != 0 {
            return refuse(at("cq_id"), saved.cq_id, "the admin queue completes to queue 0");
        }
    } else {
        if saved.cq_id == 0 {
            return refuse(at("cq_id"), saved.cq_id, "only the admin queue completes to queue 0");
        }
        let place = place(&at, saved.id, saved.size, saved.contiguous, &saved.pages, admin.page_shift)?;
        admin
            .add_sq(pool, place, saved.cq_id, saved.priority)
            .or_else(|status| refuse(at(refused_field(status)), status.code().0, reason(status)))?;
    }
    for (field, value) in [("head", saved.head), ("tail", saved.tail)] {
        if value >= saved.size {
            return refuse(at(field), value, "it is beyond the queue");
        }
    }
    let waiting = (saved.tail + saved.size - saved.head) % saved.size;
    if saved.aborted.len() > MAX_ABORTED {
        return refuse(at("aborted_count"), saved.aborted_count, "no queue remembers so many");
    }
    for (count, &position) in saved.aborted.iter().enumerate() {
        let position = u32::from(position);
        let ahead = (position + saved.size - saved.head % saved.size) % saved.size;
        if position >= saved.size || ahead >= waiting || saved.aborted[..count].contains(&(position as u16)) {
            return refuse(at("aborted"), position, "it is not a command that waits, or it is there twice");
        }
    }
    let worker = pool.shared.worker_of(saved.cq_id);
    pool.shared.doorbells.open_sq(saved.id, saved.size, worker, saved.tail);
    let set = |queue: &mut crate::queue::SubmissionQueue| {
        queue.head = saved.head;
        queue.tail = saved.tail;
        queue.aborted.clone_from(&saved.aborted);
    };
    if index == 0 {
        admin.queues.iter_mut().for_each(|queues| set(&mut queues.sq));
    } else {
        pool.worker(worker).sq_mut(saved.id).into_iter().for_each(set);
    }
    Ok(())
}

/// The completions that found no room. Each belongs to a submission queue that uses this completion queue.
fn load_backlog(
    pool: &Pool,
    admin: &mut Admin,
    index: usize,
    saved: &CompletionQueueState,
) -> Result<(), Error> {
    // Parked requests can add to it whatever waits already.
    if index == 0 && saved.backlog.len() > MAX_BACKLOG - MAX_PARKED {
        return refuse("cq[0].backlog_count", saved.backlog_count, "the admin queue holds back fewer");
    }
    let mut backlog = VecDeque::with_capacity(saved.backlog.len());
    for ended in &saved.backlog {
        let field = || format!("cq[{index}].backlog.sq_id");
        let sq_index = if index == 0 {
            (ended.sq_id == 0).then_some(0)
        } else {
            let mut worker = pool.worker(pool.shared.worker_of(saved.id));
            let completes_here = worker.sq_mut(ended.sq_id).is_some_and(|queue| queue.cq_id == saved.id);
            completes_here.then(|| worker.sq_index(ended.sq_id)).flatten()
        };
        let Some(sq_index) = sq_index else {
            return refuse(field(), ended.sq_id, "it is not a queue that completes here");
        };
        if ended.status > 0x7fff {
            return refuse(format!("cq[{index}].backlog.status"), ended.status, "it has more than 15 bits");
        }
        let (sq_id, cid, status) = (ended.sq_id, ended.cid, Status(ended.status));
        backlog.push_back(Ended { sq_id, sq_index, cid, dw0: ended.dw0, dw1: ended.dw1, status });
    }
    with_cq(pool, admin, saved.id, |cq| cq.backlog = backlog);
    Ok(())
}

fn with_cq(pool: &Pool, admin: &mut Admin, id: u16, change: impl FnOnce(&mut crate::queue::CompletionQueue)) {
    if id == 0 {
        if let Some(queues) = admin.queues.as_mut() {
            change(&mut queues.cq);
        }
    } else if let Some(cq) = pool.worker(pool.shared.worker_of(id)).cq_mut(&pool.shared, id) {
        change(cq);
    }
}

fn place(
    at: &impl Fn(&str) -> String,
    id: u16,
    entries: u32,
    contiguous: bool,
    pages: &[u64],
    page_shift: u32,
) -> Result<QueuePlace, Error> {
    if !(2..=crate::config::MAX_QUEUE_ENTRIES).contains(&entries) {
        return refuse(at("size"), entries, "queues have 2 to 65536 entries");
    }
    let location = match (contiguous, pages) {
        (true, &[base]) => Location::Contiguous(base),
        (true, _) => {
            return refuse(at("page_count"), pages.len() as u64, "a contiguous queue has one address");
        }
        (false, pages) => Location::Pages(pages.into()),
    };
    Ok(QueuePlace { id, entries, location, page_shift })
}

/// Where an admin queue is: in the controller memory buffer, which the guest may have moved since, or where its register says.
fn place_of_admin_queue(windows: &Windows, pages: Option<&Vec<u64>>, register: u64) -> u64 {
    match pages.map(Vec::as_slice) {
        Some(&[base]) if windows.buffer_holds(base) => base,
        _ => register,
    }
}

fn check_admin_pages(
    windows: &Windows,
    at: &impl Fn(&str) -> String,
    contiguous: bool,
    pages: &[u64],
    register: u64,
) -> Result<(), Error> {
    match pages {
        &[base] if contiguous && (base == register || windows.buffer_holds(base)) => Ok(()),
        pages => refuse(
            at("pages"),
            pages.first().copied().unwrap_or(0),
            "it is not the address of ASQ or ACQ alone",
        ),
    }
}

/// The field of a saved queue that a Create command's refusal is about.
fn refused_field(status: Status) -> &'static str {
    match status.code() {
        Status::INVALID_QUEUE_SIZE => "size",
        Status::INVALID_INTERRUPT_VECTOR => "vector",
        Status::COMPLETION_QUEUE_INVALID => "cq_id",
        _ => "pages",
    }
}

/// What a Create command's refusal says about a saved queue.
fn reason(status: Status) -> &'static str {
    match status.code() {
        Status::INVALID_QUEUE_SIZE => "its size is above CAP.MQES",
        Status::INVALID_INTERRUPT_VECTOR => "its vector does not exist",
        Status::COMPLETION_QUEUE_INVALID => "its completion queue does not exist",
        Status::PRP_OFFSET_INVALID => "its memory is not page aligned",
        _ => "its memory is not inside RAM, has the wrong number of pages, or its form was not allowed",
    }
}

/// The shadows hold what the guest wrote; they are read on resume.
fn load_doorbell_buffers(pool: &Pool, admin: &mut Admin, state: &NvmeState) -> Result<(), Error> {
    let saved = &state.doorbell_buffers;
    let both =
        [("doorbell_buffers.shadow", saved.shadow), ("doorbell_buffers.event_index", saved.event_index)];
    if !saved.enabled {
        for (field, value) in both {
            if value != 0 {
                return refuse(field, value, "the buffers are not in use");
            }
        }
        return Ok(());
    }
    let buffers =
        Buffers { shadow: saved.shadow, event_index: saved.event_index, page_bytes: 1 << admin.page_shift };
    if Csts(state.registers.csts).rdy() == 0 {
        return refuse(
            "doorbell_buffers.enabled",
            1u8,
            "a controller that is not ready has no doorbell buffers",
        );
    }
    for (field, address) in both {
        if !buffers.page_lies_in(&pool.shared.memory, address) {
            return refuse(field, address, "the buffer is not page aligned or not inside RAM");
        }
    }
    admin.attach_buffers(pool, buffers);
    Ok(())
}
