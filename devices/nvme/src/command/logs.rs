//! Get Log Page (Base 5.16).

use nvme_spec::log::{self, id};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, event};

use crate::admin::{Admin, Answer, Pool};
use crate::command::admin::is_supported;
use crate::command::features;
use crate::command::lists::check_uuid_index;
use crate::command::reservations::is_reservation;
use crate::event::ERROR_LOG_ENTRIES;

/// The pages that exist.
const PAGES: [u8; 12] = [
    id::SUPPORTED_PAGES,
    id::ERROR_INFORMATION,
    id::SMART,
    id::FIRMWARE_SLOT,
    id::CHANGED_NAMESPACES,
    id::COMMANDS_SUPPORTED,
    id::DEVICE_SELF_TEST,
    id::PERSISTENT_EVENT,
    id::FEATURES_SUPPORTED,
    id::MANAGEMENT_SUPPORTED,
    id::SANITIZE_STATUS,
    id::RESERVATION_NOTIFICATION,
];

/// CDW10 bit 15: Retain Asynchronous Event.
const RETAIN: u32 = 1 << 15;
/// CDW14 bit 23: the offset is an index, which no page here supports.
const OFFSET_IS_INDEX: u32 = 1 << 23;
/// Features Supported and Effects bit 20: scope namespace; bit 21: scope controller.
const SCOPE_NAMESPACE: u32 = 1 << 20;
const SCOPE_CONTROLLER: u32 = 1 << 21;

impl Admin {
    /// Get Log Page. What is asked for beyond the end of a page reads as zeroes.
    pub fn get_log_page(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let invalid = Status::INVALID_FIELD.do_not_retry();
        let page = entry.cdw10 as u8;
        let dwords = u64::from(entry.cdw11 as u16) << 16 | u64::from(entry.cdw10 >> 16);
        let length_bytes = (dwords + 1) * 4;
        let offset = u64::from(entry.cdw12) | u64::from(entry.cdw13) << 32;
        // Without a limit by MDTS no answer needs more than the largest page; the bound keeps a guest from making us hold GiBs.
        if length_bytes > pool.shared.config.max_transfer_bytes().min(1 << 20) || !offset.is_multiple_of(4) {
            return Err(invalid);
        }
        if entry.cdw14 & OFFSET_IS_INDEX != 0 {
            return Err(invalid);
        }
        check_uuid_index(entry)?;
        let log = match page {
            id::SUPPORTED_PAGES => supported_pages(pool),
            id::ERROR_INFORMATION => error_log(pool, self.common.sanitize().running.is_some()),
            id::SMART => self.smart_log(pool, entry.nsid)?,
            id::FIRMWARE_SLOT => self.firmware_log(),
            id::CHANGED_NAMESPACES => self.changed_namespaces_log(),
            id::PERSISTENT_EVENT => match self.persistent_event_log(pool, entry)? {
                Some(log) => log,
                None => return Ok(Answer::Now(0)),
            },
            id::DEVICE_SELF_TEST => self.self_test_log(),
            id::SANITIZE_STATUS => self.sanitize_status().to_bytes().to_vec(),
            id::RESERVATION_NOTIFICATION => reservation_log(pool),
            id::ANA => self.access_log(pool, entry)?,
            id::COMMANDS_SUPPORTED => commands_log(pool, (entry.cdw14 >> 24) as u8)?,
            id::FEATURES_SUPPORTED => dword_table(256, feature_effects),
            // The management interface is not there: no command of it is supported.
            id::MANAGEMENT_SUPPORTED => vec![0; 4096],
            _ => return Err(Status::INVALID_LOG_PAGE.do_not_retry()),
        };
        let log = usize::try_from(offset).ok().and_then(|offset| log.get(offset..)).ok_or(invalid)?;
        let mut data = vec![0; length_bytes as usize];
        let available = log.len().min(data.len());
        data[..available].copy_from_slice(&log[..available]);
        self.write_data(pool, entry, &data)?;
        if entry.cdw10 & RETAIN == 0 {
            self.log_was_read(pool, page);
        }
        Ok(Answer::Now(0))
    }

    /// Reading a log page clears its event (Base 5.2).
    fn log_was_read(&mut self, pool: &Pool, page: u8) {
        match page {
            id::ERROR_INFORMATION => pool.shared.events().unmask(event::ERROR),
            id::SMART => pool.shared.events().unmask(event::SMART),
            id::SANITIZE_STATUS => pool.shared.events().unmask(event::COMMAND_SPECIFIC),
            id::ANA => pool.shared.events().unmask(event::NOTICE),
            id::RESERVATION_NOTIFICATION => take_reservation_notice(pool),
            id::FIRMWARE_SLOT => pool.shared.events().unmask(event::NOTICE),
            id::CHANGED_NAMESPACES => {
                self.changed_namespaces.clear();
                pool.shared.events().unmask(event::NOTICE);
            }
            _ => {}
        }
    }

    fn smart_log(&self, pool: &Pool, nsid: u32) -> Result<Vec<u8>, Status> {
        // Identify Controller LPA bit 0 is 0: there is one log for all namespaces.
        if !matches!(nsid, 0 | NSID_BROADCAST) {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        Ok(self.smart(pool).to_bytes().to_vec())
    }

    /// The SMART / Health Information log.
    pub(crate) fn smart(&self, pool: &Pool) -> log::SmartLog {
        let mut counters = self.counters_before;
        for index in 0..pool.workers.len() {
            counters.add(&pool.worker(index).counters);
        }
        let errors = pool.shared.events().error_count;
        counters.log(&self.health, errors)
    }

    fn firmware_log(&self) -> Vec<u8> {
        let firmware = self.common.lock().firmware.clone();
        let revisions = firmware.revisions.map(Option::unwrap_or_default);
        log::FirmwareSlotLog { active: firmware.active | firmware.next << 4, revisions }.to_bytes().to_vec()
    }

    fn changed_namespaces_log(&self) -> Vec<u8> {
        let mut page: Vec<u8> = self.changed_namespaces.iter().flat_map(|nsid| nsid.to_le_bytes()).collect();
        page.resize(log::CHANGED_NAMESPACES_MAX * 4, 0);
        page
    }
}

fn supported_pages(pool: &Pool) -> Vec<u8> {
    // Access is the same everywhere if there is one controller only.
    let shared = pool.shared.subsystem.is_shared();
    let is_supported = |page| PAGES.contains(&page) || shared && page == id::ANA;
    dword_table(256, |page| if is_supported(page) { log::PAGE_SUPPORTED } else { 0 })
}

fn reservation_log(pool: &Pool) -> Vec<u8> {
    let shared = &pool.shared;
    shared.subsystem.reservations.read_notice(shared.controller_id, true).0.to_bytes().to_vec()
}

/// The page was read: the next one takes its place, and is told of.
fn take_reservation_notice(pool: &Pool) {
    let shared = &pool.shared;
    let (_, more) = shared.subsystem.reservations.read_notice(shared.controller_id, false);
    let mut events = shared.events();
    events.unmask(event::COMMAND_SPECIFIC);
    if more {
        events.queue(event::Event::RESERVATION_LOG_AVAILABLE);
    }
}

/// While a sanitize operation is in progress it names no block (NVM, figure "Sanitize Operations - Admin Commands Allowed").
fn error_log(pool: &Pool, sanitizing: bool) -> Vec<u8> {
    let events = pool.shared.events();
    let shown =
        |entry: &log::ErrorEntry| log::ErrorEntry { lba: if sanitizing { 0 } else { entry.lba }, ..*entry };
    let mut page: Vec<u8> = events.errors.iter().flat_map(|entry| shown(entry).to_bytes()).collect();
    page.resize(ERROR_LOG_ENTRIES * log::ErrorEntry::SIZE_BYTES, 0);
    page
}

/// Commands Supported and Effects: 256 dwords for admin commands, 256 for I/O commands of the command set, reserved.
fn commands_log(pool: &Pool, command_set: u8) -> Result<Vec<u8>, Status> {
    if command_set != nvme_spec::identify::CSI_NVM {
        return Err(Status::INVALID_FIELD.do_not_retry());
    }
    let mut page =
        dword_table(256, |opcode| if is_supported(pool, opcode) { admin_effects(opcode) } else { 0 });
    page.extend(dword_table(256, |opcode| match opcode {
        nvm::READ | nvm::FLUSH | nvm::COMPARE | nvm::VERIFY => log::EFFECT_SUPPORTED,
        nvm::WRITE | nvm::WRITE_ZEROES | nvm::DATASET_MANAGEMENT | nvm::WRITE_UNCORRECTABLE | nvm::COPY => {
            log::EFFECT_SUPPORTED | log::EFFECT_CONTENT_CHANGE
        }
        opcode if is_reservation(opcode) => log::EFFECT_SUPPORTED,
        _ => 0,
    }));
    page.resize(4096, 0);
    Ok(page)
}

/// What a supported admin command does beyond its answer.
fn admin_effects(opcode: u8) -> u32 {
    log::EFFECT_SUPPORTED
        | match opcode {
            admin::FORMAT_NVM => {
                log::EFFECT_CONTENT_CHANGE
                    | log::EFFECT_NAMESPACE_CAPABILITY
                    | log::EFFECT_EXCLUSIVE_IN_NAMESPACE
            }
            admin::SANITIZE => log::EFFECT_CONTENT_CHANGE | log::EFFECT_EXCLUSIVE,
            admin::NAMESPACE_MANAGEMENT | admin::NAMESPACE_ATTACHMENT => {
                log::EFFECT_NAMESPACE_CAPABILITY | log::EFFECT_NAMESPACE_INVENTORY
            }
            admin::FIRMWARE_COMMIT => log::EFFECT_CONTROLLER_CAPABILITY,
            admin::IDENTIFY | admin::GET_LOG_PAGE | admin::SET_FEATURES | admin::GET_FEATURES => {
                log::EFFECT_UUID_SELECTION
            }
            _ => 0,
        }
}

fn feature_effects(feature: u8) -> u32 {
    match features::is_changeable(feature) {
        None => 0,
        Some(_) if features::is_namespace_specific(feature) => log::EFFECT_SUPPORTED | SCOPE_NAMESPACE,
        Some(_) => log::EFFECT_SUPPORTED | SCOPE_CONTROLLER,
    }
}

/// A table of little-endian dwords, one for each value of a byte.
fn dword_table(count: usize, value: impl Fn(u8) -> u32) -> Vec<u8> {
    (0..count).flat_map(|index| value(index as u8).to_le_bytes()).collect()
}
