//! What of QEMU's section is not in [`NvmeState`].

use super::configuration::{self, HEADER_BYTES};
use super::section::{Command, HostBehavior, IdNs, IdNsInd, IdNsNvm, LbaFormat};
use crate::Error;
use crate::state::NvmeState;

/// What QEMU says and a controller of ours neither needs nor shows; it goes back as it came. In fields that are modelled in part,
/// the modelled part is 0 here.
///
/// | field | why [`NvmeState`] does not model it |
/// | --- | --- |
/// | `configuration` | identity and capability layout of QEMU's device, and bits that only its guests can write (I/O decoding, cache line size, reset and extended tag control); without the bits that both have |
/// | `cap`, `vs` | what QEMU's controller says that it can do; without MQES and CQR, which are configuration of ours |
/// | `qs_created` | that I/O queues existed: QEMU then refuses Number of Queues though they are gone; ours looks at the queues |
/// | `page_bits` | the page size of an earlier enabling, which nobody uses |
/// | `max_q_ents` | written and read by nobody |
/// | `cq_pending_excess` | how far QEMU's count of queues for the interrupt pin is from the queues: a reset, or a head doorbell written twice, makes it wrong |
/// | `host_timestamp`, `timestamp_set_qemu_clock_ms`, `starttime_ms` | QEMU keeps times as differences of its virtual clock; ours are running numbers. Used only as long as they say what the state says |
/// | `temperature` | a constant of QEMU's; ours is another |
/// | `parked` | parked Asynchronous Event Requests whole. Which of them are parked the state says; the identifier here is the key by which the rest of a request is found, and of one that is no longer parked nothing is used |
/// | `id_ns`, `id_ns_nvm`, `id_ns_ind` | Identify data of QEMU's namespace; without sizes and the format in use |
/// | `nlbaf` | how many of the formats listed there are usable |
/// | `host_behavior` | Host Behavior Support that only QEMU has a use for; without ACRE |
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QemuResidue {
    pub(super) configuration: [u8; HEADER_BYTES],
    pub(super) cap: u64,
    pub(super) vs: u32,
    pub(super) qs_created: bool,
    pub(super) page_bits: u16,
    pub(super) max_q_ents: u32,
    pub(super) cq_pending_excess: i32,
    pub(super) host_timestamp: u64,
    pub(super) timestamp_set_qemu_clock_ms: u64,
    pub(super) starttime_ms: u64,
    pub(super) temperature: u16,
    pub(super) parked: Vec<Command>,
    pub(super) id_ns: Box<IdNs>,
    pub(super) id_ns_nvm: Box<IdNsNvm>,
    pub(super) id_ns_ind: Box<IdNsInd>,
    pub(super) nlbaf: u32,
    pub(super) host_behavior: Box<HostBehavior>,
}

/// CAP of QEMU's controller without MQES and CQR: 7.5 seconds to become ready, the NVM command set and I/O command sets, pages up to 64 KiB.
const CAP: u64 = 0x0040_0820_0f00_0000;
/// VS: 1.4.
const VS: u32 = 0x0001_0400;
/// 50 degrees Celsius.
const TEMPERATURE_KELVIN: u16 = 323;
/// The formats of QEMU's namespaces: bytes of metadata and log2 of the block size.
const FORMATS: [(u16, u8); 8] = [(0, 9), (8, 9), (16, 9), (64, 9), (0, 12), (8, 12), (16, 12), (64, 12)];
/// Bytes that QEMU prefers to deallocate at once.
const DISCARD_BYTES: u32 = 4096;

impl QemuResidue {
    /// What QEMU would say for a controller that was never QEMU's and has this `state`.
    ///
    /// # Errors
    /// [`Error::BeyondQemu`] if the configuration space is not that of a controller of ours.
    pub fn new(state: &NvmeState) -> Result<Self, Error> {
        let block_shift = state.namespaces.get(0).map_or(9, |namespace| namespace.shape.block_shift);
        let discard_blocks = (DISCARD_BYTES >> block_shift.min(12)).max(1);
        let mut lbaf = [LbaFormat::default(); 64];
        for (place, (ms, ds)) in lbaf.iter_mut().zip(FORMATS) {
            *place = LbaFormat { ms, ds, rp: 0 };
        }
        let id_ns = IdNs {
            nsze: 0,
            ncap: 0,
            nuse: 0,
            // Deallocated blocks are reported, and the preferences for deallocation are valid.
            nsfeat: 0x34,
            nlbaf: 0,
            flbas: 0,
            mc: 3,
            dpc: 0x1f,
            dps: 0,
            nmic: 0,
            rescap: 0,
            fpi: 0,
            // Deallocated blocks read 0, and Write Zeroes can deallocate.
            dlfeat: 9,
            nawun: 0,
            nawupf: 0,
            nacwu: 0,
            nabsn: 0,
            nabo: 0,
            nabspf: 0,
            noiob: 0,
            nvmcap: [0; 16],
            npwg: 0,
            npwa: 0,
            npdg: (discard_blocks - 1) as u16,
            npda: (discard_blocks - 1) as u16,
            nows: 0,
            mssrl: 0,
            mcl: 0,
            msrc: 0,
            rsvd81: [0; 18],
            nsattr: 0,
            nvmsetid: 0,
            endgid: 0,
            nguid: [0; 16],
            eui64: 0,
            lbaf,
            vs: [0; 3712],
        };
        let id_ns_nvm = IdNsNvm {
            lbstm: 0,
            pic: 0,
            rsvd9: [0; 3],
            elbaf: [0; 64],
            npdgl: discard_blocks,
            nprg: 0,
            npra: 0,
            nors: 0,
            npdal: discard_blocks,
            rsvd288: [0; 3808],
        };
        let id_ns_ind = IdNsInd {
            nsfeat: 0,
            nmic: 0,
            rescap: 0,
            fpi: 0,
            anagrpid: 0,
            nsattr: 0,
            rsvd9: 0,
            nvmsetid: 0,
            endgrpid: 0,
            nstat: 0,
            rsvd15: [0; 4081],
        };
        let host_behavior = HostBehavior { acre: 0, etdas: 0, lbafee: 0, rsvd3: 0, cdfe: 0, rsvd6: [0; 506] };
        Ok(Self {
            configuration: configuration::of_a_new_device(&state.pci.config.bytes)?,
            cap: CAP,
            vs: VS,
            qs_created: false,
            page_bits: 0,
            max_q_ents: 0,
            cq_pending_excess: 0,
            host_timestamp: 0,
            timestamp_set_qemu_clock_ms: 0,
            starttime_ms: 0,
            temperature: TEMPERATURE_KELVIN,
            parked: Vec::new(),
            id_ns: Box::new(id_ns),
            id_ns_nvm: Box::new(id_ns_nvm),
            id_ns_ind: Box::new(id_ns_ind),
            nlbaf: FORMATS.len() as u32,
            host_behavior: Box::new(host_behavior),
        })
    }
}
