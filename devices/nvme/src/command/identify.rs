//! Identify (Base 5.17, NVM 4.1.5).

use nvme_spec::identify::{self as spec, cns, descriptor};
use nvme_spec::regs::VERSION_2_0;
use nvme_spec::{IDENTIFY_SIZE_BYTES, NSID_BROADCAST, Status, SubmissionEntry};

use crate::admin::{Admin, Answer, MAX_PARKED, Pool};
use crate::ana::group_of;
use crate::command::access::identify_shared;
use crate::command::features::{DEFAULT_OVER_TEMPERATURE_KELVIN, KEEP_ALIVE_GRANULARITY_MS};
use crate::command::reservations::capabilities;
use crate::command::{copy, fused, limits, lists};
use crate::config::{MAX_NAMESPACES, padded};
use crate::event::ERROR_LOG_ENTRIES;
use crate::firmware;
use crate::metadata::{BlockFormat, FORMATS};
use crate::namespace::{self, Namespace};
use crate::persistent;

/// Critical temperature: 90 degrees Celsius.
const CRITICAL_TEMPERATURE_KELVIN: u16 = 363;
/// Model number.
const MODEL: &str = "ferry NVMe";

type Page = [u8; IDENTIFY_SIZE_BYTES];

impl Admin {
    /// Identify.
    pub fn identify(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let invalid = Status::INVALID_FIELD.do_not_retry();
        let structure = entry.cdw10 as u8;
        let first_controller = (entry.cdw10 >> 16) as u16;
        let command_set = (entry.cdw11 >> 24) as u8;
        let by_command_set = matches!(
            structure,
            cns::CSI_NAMESPACE
                | cns::CSI_CONTROLLER
                | cns::CSI_ACTIVE_NAMESPACES
                | cns::CSI_FORMAT_NAMESPACE
                | cns::CSI_ALLOCATED_NAMESPACES
                | cns::CSI_ALLOCATED_NAMESPACE
        );
        if by_command_set && command_set != spec::CSI_NVM {
            return Err(invalid);
        }
        lists::check_uuid_index(entry)?;
        let shared = pool.shared.subsystem.is_shared();
        let persistence = pool.shared.subsystem.keeps_reservations();
        let page = match structure {
            // "the controller returns an Identify Namespace data structure that specifies capabilities that are common across namespaces"
            cns::NAMESPACE if entry.nsid == NSID_BROADCAST && pool.shared.subsystem.is_managed() => {
                format_page(0)
            }
            cns::NAMESPACE => {
                // "ANA Inaccessible or ANA Persistent Loss: Capacity fields ... are cleared to 0h" (Base 8.1.4); in the ANA Change state
                // they are not. Which fields these are is not said. Linux takes NCAP 0h for a namespace that is gone, removes it, and
                // with it the way by which it would come back; its own target clears NUSE alone, and so does this.
                let lost = [Status::ACCESS_INACCESSIBLE, Status::ACCESS_PERSISTENT_LOSS].map(Err);
                let used = !lost.contains(&pool.shared.gate.check_access(entry.nsid));
                let page = |namespace: &Namespace| self.namespace_page(namespace, shared, persistence, used);
                self.page_of(entry.nsid, page)?
            }
            cns::ALLOCATED_NAMESPACE => allocated_page(pool, entry.nsid, |namespace| {
                self.namespace_page(namespace, shared, persistence, true)
            })?,
            cns::CONTROLLER => self.controller_identity(pool).to_bytes(),
            cns::ACTIVE_NAMESPACES | cns::CSI_ACTIVE_NAMESPACES => {
                namespace_list(entry.nsid, namespace::active(&self.namespaces).map(|active| active.nsid))?
            }
            cns::ALLOCATED_NAMESPACES | cns::CSI_ALLOCATED_NAMESPACES => {
                let contents = pool.shared.subsystem.contents();
                namespace_list(entry.nsid, contents.allocated().map(|allocated| allocated.namespace.nsid))?
            }
            cns::NAMESPACE_DESCRIPTORS => descriptors_page(namespace::find(&self.namespaces, entry.nsid)?),
            // Guards have 16 bits and there are no storage tags, so nothing in the extended formats.
            cns::CSI_NAMESPACE => self.page_of(entry.nsid, |_| zeroes())?,
            cns::CSI_ALLOCATED_NAMESPACE => allocated_page(pool, entry.nsid, |_| zeroes())?,
            cns::CSI_CONTROLLER => limits::controller().to_bytes(),
            cns::INDEPENDENT_NAMESPACE => self.page_of(entry.nsid, |namespace| {
                independent_page(namespace, shared, persistence, self.format_remaining(namespace))
            })?,
            cns::FORMAT_NAMESPACE | cns::CSI_FORMAT_NAMESPACE => {
                let format = entry.cdw11 as u16;
                if usize::from(format) >= FORMATS.len() {
                    return Err(invalid);
                }
                if structure == cns::FORMAT_NAMESPACE { format_page(format) } else { zeroes() }
            }
            cns::ATTACHED_CONTROLLERS => {
                let contents = pool.shared.subsystem.contents();
                controller_list(first_controller, contents.find(entry.nsid)?.attached.iter().copied())
            }
            cns::CONTROLLERS => controller_list(first_controller, pool.shared.subsystem.controllers()),
            cns::NAMESPACE_GRANULARITY if pool.shared.subsystem.is_managed() => lists::granularity(),
            cns::UUIDS => lists::uuids(),
            cns::COMMAND_SETS => {
                // Combination 0 is the NVM command set alone; there is no other.
                let mut page = zeroes();
                page[0] = 1 << spec::CSI_NVM;
                page
            }
            _ => return Err(invalid),
        };
        self.write_data(pool, entry, &page)?;
        Ok(Answer::Now(0))
    }

    /// A structure about one namespace; zeroes if the identifier is valid but inactive.
    fn page_of(&self, nsid: u32, page: impl FnOnce(&Namespace) -> Page) -> Result<Page, Status> {
        page_or_zeroes(namespace::find(&self.namespaces, nsid).map(|active| page(active)))
    }

    fn namespace_page(&self, namespace: &Namespace, shared: bool, persistence: bool, used: bool) -> Page {
        let mut structure = spec::IdentifyNamespace {
            nsze: namespace.blocks,
            ncap: namespace.blocks,
            nuse: if used { namespace.blocks } else { 0 },
            rescap: capabilities(persistence),
            nmic: if namespace.shared { spec::NMIC_SHARED } else { 0 },
            anagrpid: if shared { group_of(namespace.nsid) } else { 0 },
            flbas: namespace.format().flbas(),
            dps: namespace.format().dps(),
            fpi: spec::FPI_SUPPORTED | self.format_remaining(namespace),
            dlfeat: spec::DLFEAT_WRITE_ZEROES_DEALLOCATE,
            nvmcap: namespace.size_bytes(),
            nsattr: if namespace.read_only { spec::NSATTR_WRITE_PROTECTED } else { 0 },
            nguid: namespace.uuid,
            eui64: namespace.eui64(),
            ..spec::IdentifyNamespace::default()
        };
        formats(&mut structure);
        for (index, place) in structure.lbaf.iter_mut().enumerate().take(FORMATS.len()) {
            // "If the value reported is 0h, then the LBA format is not currently available": the image has not a whole number of them.
            let format = BlockFormat::new(index, false, 0, false);
            if format.is_none_or(|format| !namespace.can_have(&format)) {
                place.lba_data_size_log2 = 0;
            }
        }
        structure.to_bytes()
    }

    /// Identify Controller.
    pub(crate) fn controller_identity(&self, pool: &Pool) -> spec::IdentifyController {
        let config = &pool.shared.config;
        let mut subnqn = [0; 256];
        let nqn = format!("nqn.2014-08.org.nvmexpress:ferry:{}", pool.shared.subsystem.serial());
        subnqn[..nqn.len()].copy_from_slice(nqn.as_bytes());
        let managed = pool.shared.subsystem.is_managed();
        let (total_bytes, unallocated_bytes) = pool.shared.subsystem.capacity_bytes();
        let mut psd = [spec::PowerState::default(); 32];
        // 25 W, in units of 0.01 W.
        psd[0].maximum_power = 2500;
        let mut page = spec::IdentifyController {
            vid: crate::pci::VENDOR_ID,
            ssvid: crate::pci::VENDOR_ID,
            sn: padded(pool.shared.subsystem.serial()),
            mn: padded(MODEL),
            fr: self.common.revision(),
            mdts: config.mdts,
            cntlid: pool.shared.controller_id,
            ver: VERSION_2_0,
            oaes: spec::OAES_NAMESPACE_ATTRIBUTE | spec::OAES_FIRMWARE_ACTIVATION,
            ctratt: spec::CTRATT_HOST_IDENTIFIER_128
                | spec::CTRATT_UUID_LIST
                | if managed { spec::CTRATT_NAMESPACE_GRANULARITY } else { 0 },
            cntrltype: 1,
            oacs: spec::OACS_FORMAT
                | spec::OACS_FIRMWARE
                | spec::OACS_SELF_TEST
                | spec::OACS_DOORBELL_BUFFER_CONFIG
                | if managed { spec::OACS_NAMESPACE_MANAGEMENT } else { 0 },
            acl: 3,
            aerl: (MAX_PARKED - 1) as u8,
            // Bits 3:1: the number of slots.
            frmw: (firmware::SLOTS as u8) << 1
                | spec::FRMW_FIRST_SLOT_READ_ONLY
                | spec::FRMW_ACTIVATION_WITHOUT_RESET,
            // Activation takes no time that could be told in units of 100 ms.
            mtfa: 1,
            fwug: (firmware::GRANULARITY_BYTES / 4096) as u8,
            lpa: spec::LPA_COMMANDS_SUPPORTED
                | spec::LPA_EXTENDED_DATA
                | spec::LPA_PERSISTENT_EVENT
                | spec::LPA_SUPPORTED_PAGES,
            elpe: (ERROR_LOG_ENTRIES - 1) as u8,
            wctemp: DEFAULT_OVER_TEMPERATURE_KELVIN,
            cctemp: CRITICAL_TEMPERATURE_KELVIN,
            tnvmcap: total_bytes,
            unvmcap: unallocated_bytes,
            kas: (KEEP_ALIVE_GRANULARITY_MS / 100) as u16,
            sqes: 0x66,
            cqes: 0x44,
            nn: MAX_NAMESPACES,
            oncs: spec::ONCS_DATASET_MANAGEMENT
                | spec::ONCS_WRITE_ZEROES
                | spec::ONCS_FEATURE_SELECT
                | spec::ONCS_TIMESTAMP
                | spec::ONCS_COMPARE
                | spec::ONCS_WRITE_UNCORRECTABLE
                | spec::ONCS_VERIFY
                | spec::ONCS_COPY
                | spec::ONCS_RESERVATIONS,
            pels: (persistent::LOG_BYTES / (64 << 10)) as u32,
            // As long as it takes to read a GiB in a second; one test at a time.
            edstt: (total_bytes / (60 << 30) + 1).min(0xffff) as u16,
            dsto: 1,
            // Format NVM is about one namespace, and takes the broadcast identifier; erasure is not cryptographic.
            fna: 0,
            sanicap: super::sanitize::CAPABILITIES,
            cdfs: copy::DESCRIPTOR_FORMATS,
            fuses: spec::FUSES_COMPARE_AND_WRITE,
            acwu: fused::atomic_compare_and_write_unit(config),
            nwpc: spec::NWPC_WRITE_PROTECT
                | spec::NWPC_UNTIL_POWER_CYCLE
                | if self.non_volatile.is_some() { spec::NWPC_PERMANENT } else { 0 },
            vwc: spec::VWC_PRESENT | spec::VWC_BROADCAST_FLUSH,
            sgls: crate::sgl::SUPPORT,
            mnan: MAX_NAMESPACES,
            subnqn,
            psd,
            ..spec::IdentifyController::default()
        };
        if pool.shared.subsystem.is_shared() {
            identify_shared(&mut page);
        }
        page
    }
}

/// A structure about one namespace; zeroes if the identifier is valid but not allocated.
fn allocated_page(pool: &Pool, nsid: u32, page: impl FnOnce(&Namespace) -> Page) -> Result<Page, Status> {
    page_or_zeroes(pool.shared.subsystem.contents().find(nsid).map(|allocated| page(&allocated.namespace)))
}

fn page_or_zeroes(page: Result<Page, Status>) -> Result<Page, Status> {
    match page {
        Err(status) if status.code() == Status::INVALID_FIELD => Ok(zeroes()),
        page => page,
    }
}

/// Those of `identifiers`, which are in order, above `after`, at most 1,024.
fn namespace_list(after: u32, identifiers: impl Iterator<Item = u32>) -> Result<Page, Status> {
    if after >= 0xffff_fffe {
        return Err(Status::INVALID_NAMESPACE.do_not_retry());
    }
    let mut page = zeroes();
    let found = identifiers.filter(|&nsid| nsid > after);
    for (place, nsid) in page.as_chunks_mut::<4>().0.iter_mut().zip(found) {
        *place = nsid.to_le_bytes();
    }
    Ok(page)
}

fn zeroes() -> Page {
    [0; IDENTIFY_SIZE_BYTES]
}

fn formats(structure: &mut spec::IdentifyNamespace) {
    structure.nlbaf = (FORMATS.len() - 1) as u8;
    structure.mc = spec::MC_EXTENDED | spec::MC_SEPARATE;
    structure.dpc = spec::DPC_ALL_TYPES | spec::DPC_FIRST_BYTES | spec::DPC_LAST_BYTES;
    for (place, format) in structure.lbaf.iter_mut().zip(FORMATS) {
        (place.lba_data_size_log2, place.metadata_bytes) = (format.shift, format.metadata_bytes);
    }
    limits::put_copy(structure);
}

/// CNS 09h: what a namespace of `format` would offer.
fn format_page(format: u16) -> Page {
    let mut structure = spec::IdentifyNamespace {
        flbas: format as u8,
        dlfeat: spec::DLFEAT_WRITE_ZEROES_DEALLOCATE,
        ..spec::IdentifyNamespace::default()
    };
    formats(&mut structure);
    structure.to_bytes()
}

fn independent_page(namespace: &Namespace, shared: bool, persistence: bool, remaining: u8) -> Page {
    spec::IdentifyIndependentNamespace {
        nmic: if namespace.shared { spec::NMIC_SHARED } else { 0 },
        rescap: capabilities(persistence),
        fpi: spec::FPI_SUPPORTED | remaining,
        anagrpid: if shared { group_of(namespace.nsid) } else { 0 },
        nsattr: if namespace.read_only { spec::NSATTR_WRITE_PROTECTED } else { 0 },
        nstat: u8::from(namespace.refusal.is_none()),
        ..spec::IdentifyIndependentNamespace::default()
    }
    .to_bytes()
}

/// CNS 03h: type, length, two reserved bytes, value; a zero type ends the list.
fn descriptors_page(namespace: &Namespace) -> Page {
    let eui64 = namespace.eui64();
    let list: [(u8, &[u8]); 4] = [
        (descriptor::EUI64, &eui64),
        (descriptor::NGUID, &namespace.uuid),
        (descriptor::UUID, &namespace.uuid),
        (descriptor::CSI, &[spec::CSI_NVM]),
    ];
    let mut page = zeroes();
    let mut position = 0;
    for (kind, value) in list {
        page[position] = kind;
        page[position + 1] = value.len() as u8;
        page[position + 4..position + 4 + value.len()].copy_from_slice(value);
        position += 4 + value.len();
    }
    page
}

/// A controller list (Base 4.4.1) of those of `controllers`, which are in order, from `first`: their number and they.
fn controller_list(first: u16, controllers: impl IntoIterator<Item = u16>) -> Page {
    let mut page = zeroes();
    let mut count = 0u16;
    let found = controllers.into_iter().filter(|&id| id >= first);
    for (place, id) in page.as_chunks_mut::<2>().0.iter_mut().skip(1).zip(found) {
        *place = id.to_le_bytes();
        count += 1;
    }
    page[..2].copy_from_slice(&count.to_le_bytes());
    page
}
