//! Admin commands, one at a time, and the event requests that wait beside them.

use alloc::vec::Vec;

use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyNamespace, NSATTR_WRITE_PROTECTED, cns};
use nvme_spec::opcode::admin;
use nvme_spec::{CompletionEntry, SubmissionEntry};

use super::controller::{ADMIN_TIMEOUT_MILLISECONDS, Controller};
use super::identity::Namespace;
use crate::clock::Deadline;
use crate::error::Error;
use crate::machine::Machine;
use crate::memory::PAGE_BYTES;

/// Command identifiers from here on are Asynchronous Event Requests.
const EVENT_CID: u16 = 0x8000;

impl Controller {
    /// Runs one admin command.
    ///
    /// # Errors
    ///
    /// When it fails or does not complete in time.
    pub fn command(
        &mut self,
        machine: &mut dyn Machine,
        entry: SubmissionEntry,
    ) -> Result<CompletionEntry, Error> {
        self.admin.push(&entry);
        self.admin.ring(&mut self.doorbells);
        let deadline = Deadline::new(machine, self.tsc_khz, ADMIN_TIMEOUT_MILLISECONDS);
        loop {
            match self.admin.pop()? {
                Some(completion) if completion.cid >= EVENT_CID => {
                    return Err(self.wrong("an event that nothing caused", completion.dw0.into()));
                }
                Some(completion) => {
                    self.admin.ring(&mut self.doorbells);
                    return if completion.status().is_success() {
                        Ok(completion)
                    } else {
                        Err(Error::Status {
                            place: self.admin.place(),
                            opcode: entry.opcode,
                            nsid: entry.nsid,
                            block: entry.cdw10_64(),
                            status: completion.status(),
                        })
                    };
                }
                None if deadline.is_over(machine) => return Err(self.admin.stalled(0)),
                None => {}
            }
        }
    }

    pub(super) fn identify(
        &mut self,
        machine: &mut dyn Machine,
        cns: u8,
        nsid: u32,
    ) -> Result<&[u8; PAGE_BYTES], Error> {
        let entry = SubmissionEntry {
            opcode: admin::IDENTIFY,
            nsid,
            prp1: self.scratch.address(),
            cdw10: cns.into(),
            ..SubmissionEntry::default()
        };
        self.command(machine, entry)?;
        Ok(self.scratch.bytes().first_chunk().expect("the scratch buffer is a page"))
    }

    pub(super) fn find_namespaces(&mut self, machine: &mut dyn Machine) -> Result<(), Error> {
        let mut active = Vec::new();
        loop {
            let after = active.last().copied().unwrap_or(0);
            let list = self.identify(machine, cns::ACTIVE_NAMESPACES, after)?;
            let entries = list.as_chunks::<4>().0;
            let found: Vec<u32> = entries
                .iter()
                .map(|entry| u32::from_le_bytes(*entry))
                .take_while(|nsid| *nsid != 0)
                .collect();
            let full = found.len() == entries.len();
            for nsid in found {
                // Base 5.17.2.3: identifiers greater than the one given, in increasing order.
                if active.last().is_some_and(|last| *last >= nsid) || nsid <= after {
                    return Err(self.wrong("the active namespace list is not in order", nsid.into()));
                }
                active.push(nsid);
            }
            if !full {
                break;
            }
        }
        for nsid in active {
            let data = IdentifyNamespace::from_bytes(self.identify(machine, cns::NAMESPACE, nsid)?);
            // NVM figure 97: bits 6:5 are the upper half of the format's number.
            let format = usize::from(data.flbas & 0xf | data.flbas >> 1 & 0x30);
            let format = data.lbaf[format];
            // Metadata that are protection information and nothing else are the controller's (PRACT).
            let protection = data.dps & 7;
            let metadata_bytes = if protection == 0 { 0 } else { 8 };
            let supported = (9..=16).contains(&format.lba_data_size_log2)
                && format.metadata_bytes == metadata_bytes
                && protection <= 3;
            if data.nsze == 0 || !supported {
                return Err(
                    self.wrong("a namespace has no size or a format that is not supported", nsid.into())
                );
            }
            self.namespaces.push(Namespace {
                nsid,
                blocks: data.nsze,
                block_bytes: 1 << format.lba_data_size_log2,
                read_only: data.nsattr & NSATTR_WRITE_PROTECTED != 0,
                protection,
            });
        }
        Ok(())
    }

    /// Parks `count` Asynchronous Event Requests with the controller.
    ///
    /// # Errors
    ///
    /// When it takes fewer.
    pub fn park_events(&mut self, count: u16) -> Result<(), Error> {
        let most = u16::from(self.identity.controller.aerl) + 1;
        if count > most {
            return Err(self.wrong("takes fewer Asynchronous Event Requests", most.into()));
        }
        for number in 0..count {
            self.admin.push(&SubmissionEntry {
                opcode: admin::ASYNC_EVENT_REQUEST,
                cid: EVENT_CID + number,
                ..SubmissionEntry::default()
            });
        }
        self.admin.ring(&mut self.doorbells);
        Ok(())
    }

    /// Looks for events while none should come.
    ///
    /// # Errors
    ///
    /// The event.
    pub fn look_for_events(&mut self) -> Result<(), Error> {
        match self.admin.pop()? {
            Some(completion) => Err(self.wrong("an event that nothing caused", completion.dw0.into())),
            None => Ok(()),
        }
    }

    /// Shows that every parked request is still there: rings the doorbell of a queue that does not exist, expects
    /// the event (Base 5.2.1), and reads the log that lets the next one come.
    ///
    /// # Errors
    ///
    /// An event that does not come, or another one.
    pub fn redeem_events(&mut self, machine: &mut dyn Machine) -> Result<(), Error> {
        let absent = self.queues.len() as u16 + 1;
        if self.admin.outstanding() > 0 && !self.doorbells.reach(absent) {
            return Err(self.wrong("BAR 0 has no doorbell of a queue that does not exist", absent.into()));
        }
        while self.admin.outstanding() > 0 {
            self.doorbells.ring_register(absent, 1);
            let deadline = Deadline::new(machine, self.tsc_khz, ADMIN_TIMEOUT_MILLISECONDS);
            let completion = loop {
                if let Some(completion) = self.admin.pop()? {
                    break completion;
                }
                if deadline.is_over(machine) {
                    return Err(self.admin.stalled(0));
                }
            };
            self.admin.ring(&mut self.doorbells);
            if completion.cid < EVENT_CID || completion.dw0 != Event::INVALID_DOORBELL_REGISTER.to_dword() {
                return Err(self.wrong("another event than the one that was caused", completion.dw0.into()));
            }
            let log = SubmissionEntry {
                opcode: admin::GET_LOG_PAGE,
                nsid: nvme_spec::NSID_BROADCAST,
                prp1: self.scratch.address(),
                cdw10: (64 / 4 - 1) << 16 | u32::from(Event::INVALID_DOORBELL_REGISTER.log_page),
                ..SubmissionEntry::default()
            };
            self.command(machine, log)?;
        }
        Ok(())
    }
}
