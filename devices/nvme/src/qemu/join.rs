//! From a state of ours and what was left over to QEMU's section.

use nvme_spec::event::Event;
use nvme_spec::feature as id;
use nvme_spec::opcode::admin::ASYNC_EVENT_REQUEST;
use nvme_spec::regs::{AMS_ROUND_ROBIN, Cap, Cc, Csts};
use vmstate::Slots;

use super::limit::QemuLimit;
use super::residue::QemuResidue;
use super::section::{
    AsyncEvent, AsyncEventResult, Atomic, Bar, Command, Completion, CompletionQueue, Features, Namespace,
    NamespaceFeatures, PciDevice, QemuSection, Request, SubmissionQueue, Zns,
};
use super::split::{format_in_use, timestamp_ms, usable_formats};
use super::{QemuDevice, awaits_pin, configuration, pending_queues};
use crate::Error;
use crate::arbitration::DEFAULT_ARBITRATION;
use crate::state::{CompletionQueueState, NamespaceState, NvmeState, SubmissionQueueState};

impl QemuSection {
    /// The section of a QEMU `device` that goes on as `state` says when the virtual clock shows `clock_ms`.
    ///
    /// The SMART counters and the persistent events are not in it: QEMU begins them again. All else of `state` comes back from [`QemuSection::split`].
    ///
    /// # Errors
    /// [`Error::BeyondQemu`]: QEMU's controller cannot be in that state.
    pub fn join(
        state: &NvmeState,
        residue: &QemuResidue,
        device: &QemuDevice,
        clock_ms: u64,
    ) -> Result<Self, Error> {
        check_shape(state, device)?;
        check_features(state)?;
        check_queues(state)?;
        check_parts(state)?;
        let namespace = only_namespace(state)?;
        let (config, msix) = configuration::join(&state.pci, &residue.configuration)?;
        let ready = Csts(state.registers.csts).rdy() == 1;
        let page_bits = if ready { 12 + Cc(state.registers.cc).mps() as u16 } else { residue.page_bits };
        let page_size = 1u32.checked_shl(page_bits.into()).filter(|_| page_bits != 0).unwrap_or(0);
        let (host_timestamp, timestamp_set_qemu_clock_ms) = timestamp(state, residue, clock_ms)?;
        let created = residue.qs_created || state.cq.present().any(|(index, _)| index > 0);
        Ok(Self {
            pci_device: Box::new(PciDevice { version_id: 2, config, irq_state: [0; 16] }),
            msix,
            bar: Box::new(bar(state, residue)),
            qs_created: ready && created,
            page_size,
            page_bits,
            max_prp_ents: (page_size / 8) as u16,
            max_q_ents: residue.max_q_ents,
            outstanding_aers: state.events.parked.len() as u8,
            irq_status: 0,
            cq_pending: residue.cq_pending_excess.wrapping_add(pending_queues(state)),
            host_timestamp,
            timestamp_set_qemu_clock_ms,
            starttime_ms: start_time_ms(state, residue, clock_ms),
            temperature: residue.temperature,
            smart_critical_warning: 0,
            conf_msix_qsize: state.shape.vectors.into(),
            conf_ioqpairs: state.shape.queue_pairs.into(),
            dbbuf_dbs: state.doorbell_buffers.shadow,
            dbbuf_eis: state.doorbell_buffers.event_index,
            dbbuf_enabled: state.doorbell_buffers.enabled,
            aer_mask: state.events.masked,
            aer_reqs: parked(&state.events.parked, &residue.parked),
            aer_queue: state.events.queued.iter().map(|&dword| queued(dword)).collect(),
            aer_queued: state.events.queued.len() as i32,
            namespace: self::namespace(state, namespace, residue)?,
            sq: state.sq.iter().map(|slot| slot.map(submission_queue)).collect(),
            cq: state.cq.iter().map(|slot| slot.map(completion_queue)).collect(),
            features: Features {
                temp_thresh_hi: state.features.over_temperature_kelvin,
                temp_thresh_low: state.features.under_temperature_kelvin,
                async_config: state.features.async_events,
                hbs: super::section::HostBehavior {
                    acre: state.features.command_retry,
                    ..(*residue.host_behavior).clone()
                },
            },
            dn: state.features.write_atomicity,
            atomic: Atomic::default(),
        })
    }
}

fn beyond<T>(limit: QemuLimit) -> Result<T, Error> {
    Err(Error::BeyondQemu(limit))
}

fn check_shape(state: &NvmeState, device: &QemuDevice) -> Result<(), Error> {
    let shape = &state.shape;
    let properties = [
        ("I/O queue pairs (max_ioqpairs)", shape.queue_pairs, device.max_ioqpairs),
        ("MSI-X vectors (msix_qsize)", shape.vectors, device.msix_qsize),
    ];
    for (what, here, there) in properties {
        if here != there {
            return beyond(QemuLimit::Device { what, here, there });
        }
    }
    if !shape.contiguous_queues {
        return beyond(QemuLimit::Pieces);
    }
    let (count, most) = (state.events.parked.len(), usize::from(device.aerl) + 1);
    if count > most {
        return beyond(QemuLimit::ParkedRequests { count, most });
    }
    if !state.changed_namespaces.is_empty() {
        return beyond(QemuLimit::ChangedNamespaces { count: state.changed_namespaces.len() });
    }
    if state.events.error_count != 0 {
        return beyond(QemuLimit::ErrorLog { count: state.events.error_count });
    }
    if Csts(state.registers.csts).nssro() == 1 {
        return beyond(QemuLimit::SubsystemReset);
    }
    let ams = Cc(state.registers.cc).ams();
    if ams != AMS_ROUND_ROBIN {
        return beyond(QemuLimit::Arbitration { ams });
    }
    if awaits_pin(state)? {
        return beyond(QemuLimit::PinInterrupt { count: pending_queues(state) });
    }
    Ok(())
}

/// Features that QEMU's guests cannot set must be as after a reset.
fn check_features(state: &NvmeState) -> Result<(), Error> {
    let features = &state.features;
    let coalescing_disabled = features.coalescing_disabled.words().iter().any(|&word| word != 0);
    let set = [
        (id::ARBITRATION, "Arbitration", !matches!(features.arbitration, 0 | DEFAULT_ARBITRATION)),
        (id::INTERRUPT_COALESCING, "Interrupt Coalescing", features.interrupt_coalescing != 0),
        (id::INTERRUPT_VECTOR_CONFIGURATION, "Interrupt Vector Configuration", coalescing_disabled),
        (id::KEEP_ALIVE_TIMER, "Keep Alive Timer", features.keep_alive_ms != 0),
        (id::HOST_IDENTIFIER, "Host Identifier", features.host_identifier != [0; 16]),
    ];
    match set.into_iter().find(|&(_, _, set)| set) {
        Some((feature, name, _)) => beyond(QemuLimit::Feature { feature, name }),
        None => Ok(()),
    }
}

/// What later versions of ours have learned.
fn check_parts(state: &NvmeState) -> Result<(), Error> {
    let protected = state.namespaces.present().any(|(_, namespace)| namespace.write_protection.is_some());
    let parts = [
        ("a critical warning", state.events.warnings.is_some()),
        ("saved features", state.features.saved.is_some()),
        ("a workload hint or a sanitize configuration", state.features.more.is_some()),
        ("firmware that a guest brought", state.firmware.is_some()),
        ("a controller memory buffer in use", state.buffer.is_some()),
        ("a persistent memory region in use", state.region.is_some()),
        ("a format in progress", state.format.is_some()),
        ("a sanitize operation", state.sanitize.is_some()),
        ("self-tests", state.self_test.is_some()),
        ("a write protected namespace", protected),
        ("asymmetric access", state.access.is_some()),
        ("reservations", state.reservations.is_some()),
        ("reservation notifications", state.reservation_notices.is_some()),
    ];
    match parts.into_iter().find(|&(_, there)| there) {
        Some((what, _)) => beyond(QemuLimit::Part { what }),
        None => Ok(()),
    }
}

fn check_queues(state: &NvmeState) -> Result<(), Error> {
    for (_, queue) in state.sq.present() {
        let (id, priority) = (queue.id, queue.priority);
        if !queue.contiguous {
            return beyond(QemuLimit::QueueInPieces { id });
        }
        if priority != 0 {
            return beyond(QemuLimit::Priority { id, priority });
        }
        if !queue.aborted.is_empty() {
            return beyond(QemuLimit::Aborted { id, count: queue.aborted.len() });
        }
    }
    for (_, queue) in state.cq.present() {
        if !queue.contiguous {
            return beyond(QemuLimit::QueueInPieces { id: queue.id });
        }
        if !queue.backlog.is_empty() {
            return beyond(QemuLimit::Backlog { id: queue.id, count: queue.backlog.len() });
        }
    }
    Ok(())
}

fn only_namespace(state: &NvmeState) -> Result<&NamespaceState, Error> {
    let count = state.namespaces.present().count();
    match state.namespaces.get(0) {
        Some(namespace) if count == 1 && namespace.shape.read_only => beyond(QemuLimit::ReadOnly),
        Some(namespace) if count == 1 => match &namespace.uncorrectable {
            Some(marks) => beyond(QemuLimit::Uncorrectable { count: marks.runs.len() }),
            None => Ok(namespace),
        },
        _ => beyond(QemuLimit::Namespaces { count }),
    }
}

fn bar(state: &NvmeState, residue: &QemuResidue) -> Bar {
    let (shape, registers) = (&state.shape, &state.registers);
    let entries = u64::from(shape.queue_entries);
    let cap =
        Cap(residue.cap).with_mqes(entries.saturating_sub(1)).with_cqr(u64::from(shape.contiguous_queues));
    Bar {
        cap: cap.0,
        vs: residue.vs,
        intms: registers.interrupt_mask,
        intmc: registers.interrupt_mask,
        cc: registers.cc,
        rsvd24: [0; 4],
        csts: registers.csts,
        nssr: 0,
        aqa: registers.aqa,
        asq: registers.asq,
        acq: registers.acq,
        cmbloc: 0,
        cmbsz: 0,
        bpinfo: 0,
        bprsel: 0,
        bpmbl: 0,
        cmbmsc: 0,
        cmbsts: 0,
        rsvd92: [0; 3492],
        pmrcap: 0,
        pmrctl: 0,
        pmrsts: 0,
        pmrebs: 0,
        pmrswtp: 0,
        pmrmscl: 0,
        pmrmscu: 0,
        css: [0; 484],
    }
}

/// The two numbers of QEMU's timestamp: as they were if they still say what the state says, otherwise as if it were set now.
fn timestamp(state: &NvmeState, residue: &QemuResidue, clock_ms: u64) -> Result<(u64, u64), Error> {
    let (host, set_ms) = (residue.host_timestamp, residue.timestamp_set_qemu_clock_ms);
    let features = &state.features;
    let unchanged = features.timestamp_set == (host != 0)
        && features.timestamp_ms == timestamp_ms(host, set_ms, clock_ms);
    match (unchanged, features.timestamp_set, features.timestamp_ms) {
        (true, ..) => Ok((host, set_ms)),
        (false, false, since_reset_ms) => Ok((0, clock_ms.wrapping_sub(since_reset_ms))),
        (false, true, 0) => beyond(QemuLimit::ZeroTimestamp),
        (false, true, timestamp_ms) => Ok((timestamp_ms, clock_ms)),
    }
}

/// When QEMU's device was powered on. The state has whole seconds, which begin at different moments.
fn start_time_ms(state: &NvmeState, residue: &QemuResidue, clock_ms: u64) -> u64 {
    let seconds = state.smart.power_on_seconds;
    if (clock_ms.wrapping_sub(residue.starttime_ms) / 1000).abs_diff(seconds) <= 1 {
        residue.starttime_ms
    } else {
        clock_ms.wrapping_sub(seconds.wrapping_mul(1000))
    }
}

/// Parked requests with the commands that they came with; nothing keeps a guest from using an identifier twice.
fn parked(cids: &[u16], commands: &[Command]) -> Slots<Request> {
    let mut left: Vec<_> = commands.iter().collect();
    let request = |&cid: &u16| {
        let position = left.iter().position(|command| command.cid == cid);
        let cmd = position.map_or_else(
            || Command { opcode: ASYNC_EVENT_REQUEST, cid, ..Command::default() },
            |position| left.remove(position).clone(),
        );
        Some(Request { status: 0, cqe: Completion { cid, ..Completion::default() }, cmd })
    };
    cids.iter().map(request).collect()
}

fn queued(dword: u32) -> AsyncEvent {
    let Event { kind, information, log_page } = Event::from_dword(dword);
    AsyncEvent { result: AsyncEventResult { event_type: kind, event_info: information, log_page, resv: 0 } }
}

fn namespace(
    state: &NvmeState,
    namespace: &NamespaceState,
    residue: &QemuResidue,
) -> Result<Namespace, Error> {
    let shape = &namespace.shape;
    if let Some(metadata) = &shape.metadata {
        return beyond(QemuLimit::Metadata { bytes: metadata.bytes });
    }
    let Some((flbas, lbaf)) = format_in_use(&residue.id_ns, residue.nlbaf, shape.block_shift) else {
        return beyond(QemuLimit::BlockSize { block_shift: shape.block_shift });
    };
    let mut id_ns = residue.id_ns.clone();
    (id_ns.nsze, id_ns.ncap, id_ns.nuse) = (shape.blocks, shape.blocks, shape.blocks);
    id_ns.flbas = flbas;
    id_ns.nlbaf = usable_formats(residue.nlbaf, residue.host_behavior.lbafee);
    Ok(Namespace {
        tmp: state.features.write_cache,
        id_ns,
        id_ns_nvm: residue.id_ns_nvm.clone(),
        id_ns_ind: residue.id_ns_ind.clone(),
        lbaf,
        nlbaf: residue.nlbaf,
        csi: 0,
        status: 0,
        pif: 0,
        zns: Zns::default(),
        features: NamespaceFeatures { err_rec: namespace.error_recovery.into() },
        atomic: Atomic::default(),
    })
}

fn submission_queue(queue: &SubmissionQueueState) -> SubmissionQueue {
    SubmissionQueue {
        sqid: queue.id,
        cqid: queue.cq_id,
        head: queue.head,
        tail: queue.tail,
        size: queue.size,
        dma_addr: queue.pages.first().copied().unwrap_or(0),
    }
}

fn completion_queue(queue: &CompletionQueueState) -> CompletionQueue {
    CompletionQueue {
        phase: u8::from(queue.phase),
        cqid: queue.id,
        irq_enabled: u16::from(queue.interrupts),
        head: queue.head,
        tail: queue.tail,
        vector: queue.vector.into(),
        size: queue.size,
        dma_addr: queue.pages.first().copied().unwrap_or(0),
        req_list: Vec::new(),
    }
}
