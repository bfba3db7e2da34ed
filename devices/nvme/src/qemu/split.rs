//! From QEMU's section to a state of ours and what is left over.

use nvme_spec::event::Event;
use nvme_spec::opcode::admin::ASYNC_EVENT_REQUEST;
use nvme_spec::regs::{AMS_ROUND_ROBIN, Cap, Cc, Csts};
use vmstate::Slots;

use super::residue::QemuResidue;
use super::section::{Command, IdNs, LbaFormat, QemuSection};
use super::{awaits_pin, configuration, pending_queues, refuse};
use crate::Error;
use crate::admin::MAX_PARKED;
use crate::command::features::TIMESTAMP_MASK;
use crate::event::MAX_QUEUED_EVENTS;
use crate::inventory::{NamespaceShape, Shape};
use crate::regs::{COMMAND_SETS, MPSMAX};
use crate::state::{
    CompletionQueueState, DoorbellBuffersState, EventsState, FeaturesState, NvmeState, RegistersState,
    SubmissionQueueState,
};

impl QemuSection {
    /// What `state`, that of an unused controller, becomes with this section, and what of the section is left. `clock_ms` is the virtual
    /// clock when the section was saved. The section does not say what an unused controller has to say: serial number, MDTS, the
    /// namespace's UUID and backend, and features that QEMU's guests cannot set.
    ///
    /// # Errors
    /// [`Error::QemuSection`]: a field contradicts another, or the controller that `state` comes from.
    pub fn split(self, mut state: NvmeState, clock_ms: u64) -> Result<(NvmeState, QemuResidue), Error> {
        self.check_shape(&state.shape)?;
        let cap = self.check_capabilities(&state.shape)?;
        let page_bits = self.check_page_size()?;
        state.registers = self.registers()?;
        state.events = self.events()?;
        self.namespace(&mut state)?;
        state.sq = self.submission_queues();
        state.cq = self.completion_queues(state.shape.vectors)?;
        (state.features.timestamp_ms, state.smart.power_on_seconds) = self.times(clock_ms)?;
        let configuration = configuration::split(&self.pci_device.config, &self.msix, &mut state.pci)?;
        self.features(&mut state.features);
        state.doorbell_buffers = DoorbellBuffersState {
            enabled: self.dbbuf_enabled,
            shadow: self.dbbuf_dbs,
            event_index: self.dbbuf_eis,
        };
        self.check_created(&state)?;
        if awaits_pin(&state)? {
            return refuse("irq_status", self.irq_status, "a queue waits for the interrupt pin");
        }
        let cq_pending_excess = self.cq_pending.wrapping_sub(pending_queues(&state));
        let mut id_ns = self.namespace.id_ns;
        (id_ns.nsze, id_ns.ncap, id_ns.nuse, id_ns.flbas, id_ns.nlbaf) = (0, 0, 0, 0, 0);
        let mut host_behavior = Box::new(self.features.hbs);
        host_behavior.acre = 0;
        let residue = QemuResidue {
            configuration,
            cap: cap.with_mqes(0).with_cqr(0).0,
            vs: self.bar.vs,
            qs_created: self.qs_created,
            page_bits,
            max_q_ents: self.max_q_ents,
            cq_pending_excess,
            host_timestamp: self.host_timestamp,
            timestamp_set_qemu_clock_ms: self.timestamp_set_qemu_clock_ms,
            starttime_ms: self.starttime_ms,
            temperature: self.temperature,
            parked: self.aer_reqs.into_iter().flatten().map(|request| request.cmd).collect(),
            id_ns,
            id_ns_nvm: self.namespace.id_ns_nvm,
            id_ns_ind: self.namespace.id_ns_ind,
            nlbaf: self.namespace.nlbaf,
            host_behavior,
        };
        Ok((state, residue))
    }

    /// Those that QEMU has; the others stay as after a reset.
    fn features(&self, features: &mut FeaturesState) {
        features.over_temperature_kelvin = self.features.temp_thresh_hi;
        features.under_temperature_kelvin = self.features.temp_thresh_low;
        features.write_cache = self.namespace.tmp;
        features.write_atomicity = self.dn;
        features.async_events = self.features.async_config;
        features.timestamp_set = self.host_timestamp != 0;
        features.command_retry = self.features.hbs.acre;
    }

    fn check_shape(&self, shape: &Shape) -> Result<(), Error> {
        let counts = [
            ("conf_ioqpairs", self.conf_ioqpairs, shape.queue_pairs),
            ("conf_msix_qsize", self.conf_msix_qsize, shape.vectors),
        ];
        for (field, there, here) in counts {
            if there != u32::from(here) {
                return refuse(field, there, "this controller is configured otherwise");
            }
        }
        Ok(())
    }

    /// What the guest was told and goes by must hold here.
    fn check_capabilities(&self, shape: &Shape) -> Result<Cap, Error> {
        let cap = Cap(self.bar.cap);
        let refuse = |reason| refuse("bar.cap", cap.0, reason);
        if cap.mqes() + 1 != u64::from(shape.queue_entries) {
            return refuse("CAP.MQES is another here");
        }
        if cap.cqr() != u64::from(shape.contiguous_queues) {
            return refuse("CAP.CQR is another here");
        }
        if cap.dstrd() != 0 || cap.mpsmin() != 0 || cap.mpsmax() > MPSMAX {
            return refuse("the doorbell stride or the page sizes are others here");
        }
        if cap.css() & !COMMAND_SETS != 0 || cap.ams() != 0 {
            return refuse("it has command sets or arbitration that are not here");
        }
        if cap.pmrs() != 0 || cap.cmbs() != 0 || cap.bps() != 0 {
            return refuse("it has a controller memory buffer, persistent memory or boot partitions");
        }
        Ok(cap)
    }

    /// QEMU says the page size three times; while the controller is ready it is that of CC.
    fn check_page_size(&self) -> Result<u16, Error> {
        let bits = self.page_bits;
        let page_bytes = match bits {
            0 => 0,
            12..=16 => 1u32 << bits,
            _ => return refuse("page_bits", bits, "there are no such pages"),
        };
        let ready = Csts(self.bar.csts).rdy() == 1;
        if ready && u32::from(bits) != 12 + Cc(self.bar.cc).mps() {
            return refuse("page_bits", bits, "it is not the page size of CC");
        }
        if self.page_size != page_bytes {
            return refuse("page_size", self.page_size, "it is not what page_bits says");
        }
        if u32::from(self.max_prp_ents) != page_bytes / 8 {
            return refuse("max_prp_ents", self.max_prp_ents, "it is not what fits on a page");
        }
        Ok(if ready { 0 } else { bits })
    }

    fn registers(&self) -> Result<RegistersState, Error> {
        let bar = &self.bar;
        if bar.intmc != bar.intms {
            return refuse("bar.intmc", bar.intmc, "it is not what INTMS is");
        }
        if Csts(bar.csts).nssro() == 1 {
            return refuse("bar.csts", bar.csts, "QEMU knows no subsystem reset");
        }
        if Cc(bar.cc).ams() != AMS_ROUND_ROBIN {
            return refuse("bar.cc", bar.cc, "QEMU knows no other arbitration than round robin");
        }
        Ok(RegistersState {
            cc: bar.cc,
            csts: bar.csts,
            aqa: bar.aqa,
            asq: bar.asq,
            acq: bar.acq,
            interrupt_mask: bar.intms,
        })
    }

    fn events(&self) -> Result<EventsState, Error> {
        if self.aer_reqs.len() > MAX_PARKED {
            return refuse(
                "outstanding_aers",
                self.outstanding_aers,
                "this controller takes fewer at a time",
            );
        }
        let mut parked = Vec::with_capacity(self.aer_reqs.len());
        for (index, request) in self.aer_reqs.iter().enumerate() {
            let at = |field: &str| format!("aer_reqs[{index}]{field}");
            let Some(request) = request else {
                return refuse(at(""), 0u8, "it is counted and not there");
            };
            let Command { opcode, cid, .. } = request.cmd;
            if opcode != ASYNC_EVENT_REQUEST {
                return refuse(at(".cmd.opcode"), opcode, "it is no Asynchronous Event Request");
            }
            if request.cqe.cid != cid {
                return refuse(at(".cqe.cid"), request.cqe.cid, "it is not the command's");
            }
            parked.push(cid);
        }
        if self.aer_queue.len() > MAX_QUEUED_EVENTS {
            return refuse("aer_queue", self.aer_queue.len() as u64, "this controller queues fewer");
        }
        if usize::try_from(self.aer_queued) != Ok(self.aer_queue.len()) {
            return refuse("aer_queued", self.aer_queued as u32, "it is not the length of aer_queue");
        }
        let event = |kind, information, log_page| Event { kind, information, log_page }.to_dword();
        let queued: Vec<_> = self
            .aer_queue
            .iter()
            .map(|queued| &queued.result)
            .map(|result| event(result.event_type, result.event_info, result.log_page))
            .collect();
        Ok(EventsState {
            parked_count: parked.len() as u8,
            parked,
            queued_count: queued.len() as u8,
            queued,
            masked: self.aer_mask,
            error_count: 0,
            entry_count: 0,
            entries: Vec::new(),
            warnings: None,
        })
    }

    /// Compares the namespace and takes over what its guest has set.
    fn namespace(&self, state: &mut NvmeState) -> Result<(), Error> {
        let count = state.namespaces.present().count();
        let (Some(here), 1) = (state.namespaces.get_mut(0), count) else {
            return refuse(
                "namespace",
                count as u64,
                "this controller does not have namespace 1 and no other",
            );
        };
        // At most 16 bits, as the field's maximum says.
        here.error_recovery = self.namespace.features.err_rec as u16;
        self.identify(&here.shape)
    }

    /// Compares size and format with those of the image.
    fn identify(&self, here: &NamespaceShape) -> Result<(), Error> {
        let there = &self.namespace;
        let at = |field: &str| format!("namespace.{field}");
        if here.read_only {
            return refuse("namespace", here.nsid, "its image is read only here");
        }
        if here.metadata.is_some() {
            return refuse(
                "namespace",
                here.nsid,
                "its blocks have metadata here, which lie otherwise in QEMU's images",
            );
        }
        for (field, blocks) in
            [("nsze", there.id_ns.nsze), ("ncap", there.id_ns.ncap), ("nuse", there.id_ns.nuse)]
        {
            if blocks != here.blocks {
                return refuse(at("id_ns.") + field, blocks, "it is not the number of blocks of the image");
            }
        }
        let Some((flbas, format)) = format_in_use(&there.id_ns, there.nlbaf, here.block_shift) else {
            return refuse(at("id_ns.lbaf"), here.block_shift, "there is no format with blocks as here");
        };
        if there.id_ns.flbas != flbas {
            return refuse(at("id_ns.flbas"), there.id_ns.flbas, "it is not the format with blocks as here");
        }
        let LbaFormat { ms, ds, rp } = there.lbaf;
        let parts = [
            ("ms", u64::from(ms), u64::from(format.ms)),
            ("ds", ds.into(), format.ds.into()),
            ("rp", rp.into(), format.rp.into()),
        ];
        for (field, there, of_flbas) in parts {
            if there != of_flbas {
                return refuse(at("lbaf.") + field, there, "it is not that of the format that FLBAS says");
            }
        }
        if there.id_ns.nlbaf != usable_formats(there.nlbaf, self.features.hbs.lbafee) {
            return refuse(at("id_ns.nlbaf"), there.id_ns.nlbaf, "it is not what nlbaf and LBAFEE say");
        }
        Ok(())
    }

    fn submission_queues(&self) -> Slots<SubmissionQueueState> {
        let queue = |queue: &super::section::SubmissionQueue| SubmissionQueueState {
            id: queue.sqid,
            cq_id: queue.cqid,
            priority: 0,
            size: queue.size,
            head: queue.head,
            tail: queue.tail,
            contiguous: true,
            page_count: 1,
            pages: vec![queue.dma_addr],
            aborted_count: 0,
            aborted: Vec::new(),
        };
        self.sq.iter().map(|slot| slot.map(queue)).collect()
    }

    fn completion_queues(&self, vectors: u16) -> Result<Slots<CompletionQueueState>, Error> {
        let mut queues = Slots::empty(self.cq.len());
        for (index, queue) in self.cq.present() {
            let vector = u16::try_from(queue.vector).ok().filter(|&vector| vector < vectors);
            let Some(vector) = vector else {
                return refuse(format!("cq[{index}].vector"), queue.vector, "there is no such vector");
            };
            let state = CompletionQueueState {
                id: queue.cqid,
                vector,
                interrupts: queue.irq_enabled == 1,
                size: queue.size,
                head: queue.head,
                tail: queue.tail,
                phase: queue.phase == 1,
                contiguous: true,
                page_count: 1,
                pages: vec![queue.dma_addr],
                backlog_count: 0,
                backlog: Vec::new(),
            };
            queues.put(index, state);
        }
        Ok(queues)
    }

    /// Timestamp in milliseconds and power-on time in seconds.
    fn times(&self, clock_ms: u64) -> Result<(u64, u64), Error> {
        for (field, moment) in [
            ("timestamp_set_qemu_clock_ms", self.timestamp_set_qemu_clock_ms),
            ("starttime_ms", self.starttime_ms),
        ] {
            // QEMU lets the difference wrap: a moment can lie before the clock's 0.
            if clock_ms.wrapping_sub(moment) > i64::MAX as u64 {
                return refuse(field, moment, "it is later than the virtual clock");
            }
        }
        let timestamp = timestamp_ms(self.host_timestamp, self.timestamp_set_qemu_clock_ms, clock_ms);
        Ok((timestamp, clock_ms.wrapping_sub(self.starttime_ms) / 1000))
    }

    fn check_created(&self, state: &NvmeState) -> Result<(), Error> {
        let ready = Csts(self.bar.csts).rdy() == 1;
        let exists = state.cq.present().any(|(index, _)| index > 0);
        if self.qs_created && !ready || !self.qs_created && exists {
            return refuse("qs_created", u8::from(self.qs_created), "the queues say otherwise");
        }
        Ok(())
    }
}

/// FLBAS and the format that it chooses: the first of `nlbaf` with such blocks and no metadata.
pub(super) fn format_in_use(id_ns: &IdNs, nlbaf: u32, block_shift: u8) -> Option<(u8, LbaFormat)> {
    let formats = id_ns.lbaf.iter().take(nlbaf as usize);
    let (index, format) =
        formats.enumerate().find(|(_, format)| (format.ds, format.ms) == (block_shift, 0))?;
    // Bits 3:0 of the index, then bits 5:4 in 6:5.
    Some(((index & 0xf | (index >> 4) << 5) as u8, *format))
}

/// NLBAF, 0's based: beyond 16 only for hosts that have said that they know of more.
pub(super) fn usable_formats(nlbaf: u32, lbafee: u8) -> u8 {
    let most = if lbafee == 0 { 16 } else { 64 };
    (nlbaf.min(most).saturating_sub(1)) as u8
}

/// QEMU's timestamp at `clock_ms`.
pub(super) fn timestamp_ms(host_timestamp: u64, set_ms: u64, clock_ms: u64) -> u64 {
    host_timestamp.wrapping_add(clock_ms.wrapping_sub(set_ms)) & TIMESTAMP_MASK
}

/// An error of [`Controller::load`](crate::Controller::load) with the section's name for the field.
pub(super) fn in_terms_of_the_section(error: Error) -> Error {
    const NAMES: [(&str, &str); 9] = [
        ("registers.", "bar."),
        ("doorbell_buffers.shadow", "dbbuf_dbs"),
        ("doorbell_buffers.event_index", "dbbuf_eis"),
        ("doorbell_buffers.enabled", "dbbuf_enabled"),
        ("features.async_events", "features.async_config"),
        ("events.parked_count", "outstanding_aers"),
        ("].cq_id", "].cqid"),
        ("].pages", "].dma_addr"),
        ("].interrupts", "].irq_enabled"),
    ];
    let Error::State { mut field, value, reason } = error else { return error };
    if let Some(queue) = field.strip_suffix("].id") {
        let id = if queue.starts_with("sq") { "sqid" } else { "cqid" };
        field = format!("{queue}].{id}");
    } else {
        for (ours, theirs) in NAMES {
            field = field.replace(ours, theirs);
        }
    }
    Error::QemuSection { field, value, reason }
}
