//! Namespace Management and Namespace Attachment (Base 5.22, 5.23, NVM 4.1.6).

use nvme_spec::identify::CSI_NVM;
use nvme_spec::log::ErrorEntry;
use nvme_spec::opcode::{attachment, management};
use nvme_spec::{Status, SubmissionEntry};

use crate::admin::{Admin, Answer, Pool};
use crate::management::{Creation, NotCreated};
use crate::metadata::BlockFormat;
use crate::namespace;
use crate::reservations::goes_to;

/// Bytes of a controller list, and of what a namespace is created from.
const DATA_BYTES: usize = 4096;
/// Identifiers in a controller list (Base 4.4.1).
const MAX_LISTED: usize = 2047;

impl Admin {
    /// Namespace Management: dword 0 of a create is the identifier.
    pub fn namespace_management(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        match entry.cdw10 & 0xf {
            management::CREATE => self.create_namespace(pool, entry),
            management::DELETE => {
                self.check_reserved(pool, entry.nsid)?;
                let generation = pool.shared.subsystem.delete(entry.nsid)?;
                self.end_when_followed(pool, entry.cid, generation);
                Ok(Answer::Later)
            }
            _ => Err(Status::INVALID_FIELD.do_not_retry()),
        }
    }

    /// Whether no reservation of another host keeps the command from the namespace, or with the broadcast identifier from all.
    fn check_reserved(&self, pool: &Pool, nsid: u32) -> Result<(), Status> {
        let allocated = namespace::active(&self.allocated).map(|namespace| namespace.nsid);
        let mut concerned = allocated.filter(|&allocated| goes_to(nsid, allocated));
        concerned.try_for_each(|nsid| pool.shared.gate.check_reserved(nsid))
    }

    fn create_namespace(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        if (entry.cdw11 >> 24) as u8 != CSI_NVM {
            return Err(Status::IO_COMMAND_SET_NOT_SUPPORTED.do_not_retry());
        }
        let data: [u8; DATA_BYTES] = self.read_data(pool, entry)?;
        let creation = creation(&data, pool.shared.subsystem.is_shared())?;
        match pool.shared.subsystem.create(&creation) {
            Ok(nsid) => Ok(Answer::Now(nsid)),
            Err(NotCreated::Status(status)) => Err(status),
            Err(NotCreated::InsufficientCapacity { needed_bytes }) => {
                let status = Status(Status::NAMESPACE_INSUFFICIENT_CAPACITY.do_not_retry().0 | Status::MORE);
                // "The Command Specific Information field of the Error Information Log specifies the total amount of NVM capacity
                // required to create the namespace in bytes."
                pool.shared.events().log_error(ErrorEntry {
                    sq_id: 0,
                    cid: entry.cid,
                    status: status.0 << 1,
                    parameter_location: 0xffff,
                    command_specific: needed_bytes,
                    ..ErrorEntry::default()
                });
                Err(status)
            }
        }
    }

    /// Namespace Attachment: answered when nothing is in flight at a namespace that was detached.
    pub fn namespace_attachment(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let data: [u8; DATA_BYTES] = self.read_data(pool, entry)?;
        let words = data.as_chunks::<2>().0.iter().map(|word| u16::from_le_bytes(*word));
        let count = usize::from(words.clone().next().unwrap_or(0));
        if count > MAX_LISTED {
            return Err(Status::CONTROLLER_LIST_INVALID.do_not_retry());
        }
        let controllers: Vec<u16> = words.skip(1).take(count).collect();
        self.check_reserved(pool, entry.nsid)?;
        let subsystem = &pool.shared.subsystem;
        let generation = match entry.cdw10 & 0xf {
            attachment::ATTACH => subsystem.attach(entry.nsid, &controllers)?,
            attachment::DETACH => subsystem.detach(entry.nsid, &controllers)?,
            _ => return Err(Status::INVALID_FIELD.do_not_retry()),
        };
        self.end_when_followed(pool, entry.cid, generation);
        Ok(Answer::Later)
    }
}

/// What the host asks for (NVM figure 105: the fields of Identify Namespace that a host sets, and LBSTM).
fn creation(data: &[u8; DATA_BYTES], may_share: bool) -> Result<Creation, Status> {
    let invalid = Status::INVALID_FIELD.do_not_retry();
    let [n0, n1, n2, n3, n4, n5, n6, n7, c0, c1, c2, c3, c4, c5, c6, c7, ..] = *data;
    let blocks = u64::from_le_bytes([n0, n1, n2, n3, n4, n5, n6, n7]);
    let capacity = u64::from_le_bytes([c0, c1, c2, c3, c4, c5, c6, c7]);
    let (flbas, dps, nmic) = (data[26], data[29], data[30]);
    if blocks == 0 || capacity > blocks {
        return Err(invalid);
    }
    if capacity < blocks {
        return Err(Status::THIN_PROVISIONING_NOT_SUPPORTED.do_not_retry());
    }
    // Bits 3:0 and 6:5 are the index of the format; bit 4 asks for metadata at the end of each block.
    let (index, extended) = (flbas & 0xf | flbas >> 1 & 0x30, flbas & 1 << 4 != 0);
    if flbas & 1 << 7 != 0 || dps & !0xf != 0 {
        return Err(invalid);
    }
    let format = BlockFormat::new(index.into(), extended, dps & 7, dps & 8 != 0);
    let format = format.ok_or(Status::INVALID_FORMAT.do_not_retry())?;
    if extended && format.metadata.is_none() {
        return Err(invalid);
    }
    if nmic & !1 != 0 || nmic & 1 == 1 && !may_share {
        return Err(invalid);
    }
    // ANAGRPID, NVMSETID, ENDGID, LBSTM: none of these is there to choose from.
    if [92..96, 100..104, 384..392].into_iter().any(|range| data[range].iter().any(|&byte| byte != 0)) {
        return Err(invalid);
    }
    Ok(Creation { blocks, format, shared: nmic & 1 == 1 })
}
