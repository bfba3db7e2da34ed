//! The section of QEMU 11.1's NVMe controller, field by field as it lies on the wire.
//!
//! Names are those of QEMU's description, so that an error means the same to both sides; what the description calls `parent_obj` is
//! `pci_device` and `msix` here, and `features.temp_thresh_hi` is a field of a struct `features`, which changes no byte. Numbers are
//! big-endian whatever they were in QEMU's memory; runs of bytes are as they were.
//!
//! A field that can have one value only, or a range that no relation to other fields narrows, is checked while it is read. What
//! remains to be checked is in `split`.

use vmstate::{Slots, VmState};

use super::QemuDevice;

/// Bytes of configuration space.
pub(super) const CONFIG_BYTES: usize = 4096;
/// Events that QEMU queues before it drops them (the property `aer_max_queued`).
const MAX_QUEUED_EVENTS: usize = 64;
/// Queue slots, the admin queue's included.
const MAX_SLOTS: usize = 65536;

fn zero<const N: usize>(bytes: &[u8; N]) -> Result<(), &'static str> {
    if *bytes == [0; N] { Ok(()) } else { Err("it is reserved and not 0") }
}

/// A paused NVMe controller of QEMU 11.1. Plain and untrusted: [`QemuSection::split`] and the checks of
/// [`Controller::load`](crate::Controller::load) turn it into a device.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme", version = 1, context = "QemuDevice")]
pub struct QemuSection {
    pub(super) pci_device: Box<PciDevice>,
    /// Table entries as in the BAR, then a pending bit for each.
    #[vmstate(len_from = "QemuDevice::msix_bytes", max = 2048 * 16 + 2048 / 8)]
    pub(super) msix: Vec<u8>,
    pub(super) bar: Box<Bar>,
    /// A completion queue was created since the controller was enabled.
    pub(super) qs_created: bool,
    pub(super) page_size: u32,
    pub(super) page_bits: u16,
    pub(super) max_prp_ents: u16,
    pub(super) max_q_ents: u32,
    pub(super) outstanding_aers: u8,
    /// Vectors that hold the interrupt pin: those of queues with entries that the guest has still to take.
    #[vmstate(max = 0)]
    pub(super) irq_status: u32,
    pub(super) cq_pending: i32,
    pub(super) host_timestamp: u64,
    pub(super) timestamp_set_qemu_clock_ms: u64,
    pub(super) starttime_ms: u64,
    pub(super) temperature: u16,
    /// Warnings that QEMU's management injected; this controller has none of them.
    #[vmstate(max = 0)]
    pub(super) smart_critical_warning: u8,
    #[vmstate(equal = "QemuDevice::msix_qsize")]
    pub(super) conf_msix_qsize: u32,
    #[vmstate(equal = "QemuDevice::max_ioqpairs")]
    pub(super) conf_ioqpairs: u32,
    pub(super) dbbuf_dbs: u64,
    pub(super) dbbuf_eis: u64,
    pub(super) dbbuf_enabled: bool,
    pub(super) aer_mask: u8,
    #[vmstate(len = "outstanding_aers", max = 255)]
    pub(super) aer_reqs: Slots<Request>,
    #[vmstate(list, max = MAX_QUEUED_EVENTS)]
    pub(super) aer_queue: Vec<AsyncEvent>,
    pub(super) aer_queued: i32,
    pub(super) namespace: Namespace,
    #[vmstate(len_from = "QemuDevice::slots", max = MAX_SLOTS)]
    pub(super) sq: Slots<SubmissionQueue>,
    #[vmstate(len_from = "QemuDevice::slots", max = MAX_SLOTS)]
    pub(super) cq: Slots<CompletionQueue>,
    pub(super) features: Features,
    #[vmstate(max = 1)]
    pub(super) dn: u32,
    pub(super) atomic: Atomic,
}

#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "PCIDevice", version = 2)]
pub(super) struct PciDevice {
    #[vmstate(min = 2, max = 2)]
    pub version_id: i32,
    pub config: [u8; CONFIG_BYTES],
    /// Levels of the interrupt pins.
    #[vmstate(check = "zero")]
    pub irq_state: [u8; 16],
}

/// The registers below the doorbells. Those of features that are not taken over are 0: boot partitions, the controller memory buffer,
/// the persistent memory region.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme-bar", version = 1)]
pub(super) struct Bar {
    pub cap: u64,
    pub vs: u32,
    pub intms: u32,
    pub intmc: u32,
    pub cc: u32,
    #[vmstate(check = "zero")]
    pub rsvd24: [u8; 4],
    pub csts: u32,
    #[vmstate(max = 0)]
    pub nssr: u32,
    pub aqa: u32,
    pub asq: u64,
    pub acq: u64,
    #[vmstate(max = 0)]
    pub cmbloc: u32,
    #[vmstate(max = 0)]
    pub cmbsz: u32,
    #[vmstate(max = 0)]
    pub bpinfo: u32,
    #[vmstate(max = 0)]
    pub bprsel: u32,
    #[vmstate(max = 0)]
    pub bpmbl: u64,
    #[vmstate(max = 0)]
    pub cmbmsc: u64,
    #[vmstate(max = 0)]
    pub cmbsts: u32,
    #[vmstate(check = "zero")]
    pub rsvd92: [u8; 3492],
    #[vmstate(max = 0)]
    pub pmrcap: u32,
    #[vmstate(max = 0)]
    pub pmrctl: u32,
    #[vmstate(max = 0)]
    pub pmrsts: u32,
    #[vmstate(max = 0)]
    pub pmrebs: u32,
    #[vmstate(max = 0)]
    pub pmrswtp: u32,
    #[vmstate(max = 0)]
    pub pmrmscl: u32,
    #[vmstate(max = 0)]
    pub pmrmscu: u32,
    /// Reserved, whatever its name says.
    #[vmstate(check = "zero")]
    pub css: [u8; 484],
}

/// A command that QEMU has fetched and not completed.
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme-request", version = 1)]
pub(super) struct Request {
    #[vmstate(max = 0)]
    pub status: u16,
    pub cqe: Completion,
    pub cmd: Command,
}

/// The completion entry of a command that waits: nothing but its identifier is known yet.
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme-cqe", version = 1)]
pub(super) struct Completion {
    #[vmstate(max = 0)]
    pub result: u32,
    #[vmstate(max = 0)]
    pub dw1: u32,
    #[vmstate(max = 0)]
    pub sq_head: u16,
    #[vmstate(max = 0)]
    pub sq_id: u16,
    pub cid: u16,
    #[vmstate(max = 0)]
    pub status: u16,
}

#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme-request-cmd", version = 1)]
pub(super) struct Command {
    pub opcode: u8,
    pub flags: u8,
    pub cid: u16,
    pub nsid: u32,
    pub res1: u64,
    pub mptr: u64,
    pub dptr: DataPointer,
    pub cdw10: u32,
    pub cdw11: u32,
    pub cdw12: u32,
    pub cdw13: u32,
    pub cdw14: u32,
    pub cdw15: u32,
}

/// The data pointer in both of its forms, which are one and the same 16 bytes in QEMU's memory.
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme-request-cmd-dptr", version = 1)]
pub(super) struct DataPointer {
    pub prp1: u64,
    pub prp2: u64,
    pub sgl: Sgl,
}

#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme-request-cmd-dptr-sgl", version = 1)]
pub(super) struct Sgl {
    pub addr: u64,
    pub len: u32,
    pub rsvd: [u8; 3],
    /// Descriptor type.
    pub kind: u8,
}

#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme-async-event", version = 1)]
pub(super) struct AsyncEvent {
    pub result: AsyncEventResult,
}

#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme-async-event-result", version = 1)]
pub(super) struct AsyncEventResult {
    #[vmstate(max = 7)]
    pub event_type: u8,
    pub event_info: u8,
    pub log_page: u8,
    #[vmstate(max = 0)]
    pub resv: u8,
}

/// The namespace that the controller itself has; its identifier is 1.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme_ns", version = 1)]
pub(super) struct Namespace {
    /// The volatile write cache is on.
    pub tmp: bool,
    pub id_ns: Box<IdNs>,
    pub id_ns_nvm: Box<IdNsNvm>,
    pub id_ns_ind: Box<IdNsInd>,
    /// The format in use: an entry of `id_ns.lbaf`.
    pub lbaf: LbaFormat,
    #[vmstate(min = 1, max = 64)]
    pub nlbaf: u32,
    /// Command set: NVM.
    #[vmstate(max = 0)]
    pub csi: u8,
    /// No format is in progress.
    #[vmstate(max = 0)]
    pub status: u16,
    /// Protection information format: that of 16 bits, which nothing uses.
    #[vmstate(max = 0)]
    pub pif: u8,
    pub zns: Zns,
    pub features: NamespaceFeatures,
    pub atomic: Atomic,
}

/// Identify Namespace.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme_id_ns", version = 1)]
pub(super) struct IdNs {
    pub nsze: u64,
    pub ncap: u64,
    pub nuse: u64,
    pub nsfeat: u8,
    pub nlbaf: u8,
    pub flbas: u8,
    pub mc: u8,
    pub dpc: u8,
    /// No protection information.
    #[vmstate(max = 0)]
    pub dps: u8,
    pub nmic: u8,
    pub rescap: u8,
    pub fpi: u8,
    pub dlfeat: u8,
    pub nawun: u16,
    pub nawupf: u16,
    pub nacwu: u16,
    pub nabsn: u16,
    pub nabo: u16,
    pub nabspf: u16,
    pub noiob: u16,
    pub nvmcap: [u8; 16],
    pub npwg: u16,
    pub npwa: u16,
    pub npdg: u16,
    pub npda: u16,
    pub nows: u16,
    pub mssrl: u16,
    pub mcl: u32,
    pub msrc: u8,
    pub rsvd81: [u8; 18],
    pub nsattr: u8,
    pub nvmsetid: u16,
    pub endgid: u16,
    pub nguid: [u8; 16],
    pub eui64: u64,
    pub lbaf: [LbaFormat; 64],
    pub vs: [u8; 3712],
}

#[derive(VmState, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme_lbaf", version = 1)]
pub(super) struct LbaFormat {
    pub ms: u16,
    pub ds: u8,
    pub rp: u8,
}

/// Identify Namespace of the NVM command set.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme_id_ns_nvm", version = 1)]
pub(super) struct IdNsNvm {
    pub lbstm: u64,
    pub pic: u8,
    pub rsvd9: [u8; 3],
    pub elbaf: [u32; 64],
    pub npdgl: u32,
    pub nprg: u32,
    pub npra: u32,
    pub nors: u32,
    pub npdal: u32,
    pub rsvd288: [u8; 3808],
}

/// Identify Namespace that does not depend on the command set.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme_id_ns_ind", version = 1)]
pub(super) struct IdNsInd {
    pub nsfeat: u8,
    pub nmic: u8,
    pub rescap: u8,
    pub fpi: u8,
    pub anagrpid: u32,
    pub nsattr: u8,
    pub rsvd9: u8,
    pub nvmsetid: u16,
    pub endgrpid: u16,
    pub nstat: u8,
    pub rsvd15: [u8; 4081],
}

/// Of zoned namespaces only.
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme-zns", version = 1)]
pub(super) struct Zns {
    #[vmstate(max = 0)]
    pub zrwas: u16,
    #[vmstate(max = 0)]
    pub zrwafg: u16,
    #[vmstate(max = 0)]
    pub numzrwa: u32,
}

#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme-ns-features", version = 1)]
pub(super) struct NamespaceFeatures {
    /// Time limit in units of 100 ms; bit 16 would report reads of deallocated blocks, which this controller does not.
    #[vmstate(max = 0xffff)]
    pub err_rec: u32,
}

/// Writes of several blocks that are atomic: none.
#[derive(VmState, Clone, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "nvme-atomic", version = 1)]
pub(super) struct Atomic {
    #[vmstate(max = 0)]
    pub atomic_max_write_size: u32,
    #[vmstate(max = 0)]
    pub atomic_boundary: u64,
    #[vmstate(max = 0)]
    pub atomic_nabo: u64,
    #[vmstate(check = "off")]
    pub atomic_writes: bool,
}

fn off(on: &bool) -> Result<(), &'static str> {
    if *on { Err("this controller promises no atomic writes") } else { Ok(()) }
}

#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme-sq", version = 1)]
pub(super) struct SubmissionQueue {
    pub sqid: u16,
    pub cqid: u16,
    pub head: u32,
    pub tail: u32,
    pub size: u32,
    pub dma_addr: u64,
}

#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme-cq", version = 1)]
pub(super) struct CompletionQueue {
    #[vmstate(max = 1)]
    pub phase: u8,
    pub cqid: u16,
    #[vmstate(max = 1)]
    pub irq_enabled: u16,
    pub head: u32,
    pub tail: u32,
    pub vector: u32,
    pub size: u32,
    pub dma_addr: u64,
    /// Completions that wait for room. QEMU does not say of which submission queue they are, so none can be taken over.
    #[vmstate(list, max = 0)]
    pub req_list: Vec<Request>,
}

#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme-features", version = 1)]
pub(super) struct Features {
    pub temp_thresh_hi: u16,
    pub temp_thresh_low: u16,
    pub async_config: u32,
    pub hbs: HostBehavior,
}

/// Host Behavior Support.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "nvme-hbs", version = 1)]
pub(super) struct HostBehavior {
    #[vmstate(max = 1)]
    pub acre: u8,
    pub etdas: u8,
    pub lbafee: u8,
    pub rsvd3: u8,
    pub cdfe: u16,
    pub rsvd6: [u8; 506],
}
