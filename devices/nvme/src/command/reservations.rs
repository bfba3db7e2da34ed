//! Reservation Register, Acquire, Release and Report (Base 7.2 to 7.5, 8.19). They come to I/O queues, are rare, and take the lock of
//! [`crate::reservations`]; what they decide is in [`crate::reservation`].

use nvme_spec::opcode::nvm;
use nvme_spec::reservation::{
    self as spec, RegisteredController, RegisteredControllerExtended, ReportHeader,
};
use nvme_spec::{Status, SubmissionEntry};

use crate::data::Direction;
use crate::namespace::Namespace;
use crate::prp;
use crate::reservation::{HostIdentity, Kind, Registration, Reservation};
use crate::reservations::{Member, Table};
use crate::shared::Shared;
use crate::worker::{Owner, Worker};

/// Bytes of a report without a limit by MDTS: more than the longest there can be.
const MAX_REPORT_BYTES: u64 = 1 << 20;
/// CNTLID of a registrant that no controller is of at present.
const NO_CONTROLLER: u16 = 0xffff;

/// The commands that are served here.
pub(crate) fn is_reservation(opcode: u8) -> bool {
    matches!(
        opcode,
        nvm::RESERVATION_REGISTER
            | nvm::RESERVATION_ACQUIRE
            | nvm::RESERVATION_RELEASE
            | nvm::RESERVATION_REPORT
    )
}

/// RESCAP of Identify Namespace: all types, and whether the loss of power can be survived.
pub(crate) fn capabilities(persistence: bool) -> u8 {
    nvme_spec::identify::RESCAP_ALL_TYPES
        | nvme_spec::identify::RESCAP_IGNORE_EXISTING_KEY
        | if persistence { nvme_spec::identify::RESCAP_PERSIST } else { 0 }
}

impl Worker {
    /// Carries out one of the commands. As [`Worker::start`] says: `true` if it is not done yet.
    pub fn reservation(
        &mut self,
        shared: &Shared,
        sq_index: u32,
        entry: &SubmissionEntry,
        namespace: &Namespace,
    ) -> Result<bool, Status> {
        let invalid = Status::INVALID_FIELD.do_not_retry();
        if entry.opcode == nvm::RESERVATION_REPORT {
            self.report(shared, entry, namespace)?;
            return Ok(false);
        }
        let action = entry.cdw10 & 7;
        let ignores_key = entry.cdw10 & spec::IGNORE_EXISTING_KEY != 0;
        let kind = Kind::from_value((entry.cdw10 >> 8) as u8);
        let by = (shared.controller_id, self.index);
        let change = |abort, command: &mut dyn FnMut(&mut Reservation, HostIdentity) -> _| {
            let changed = shared.subsystem.reservations.change(by, namespace.nsid, abort, command)?;
            if changed.persists {
                // As rare as it is, and durable before it is answered.
                keep(shared)?;
            }
            Ok::<_, Status>(changed.drain)
        };
        let mut data = [0; 16];
        match entry.opcode {
            nvm::RESERVATION_REGISTER => {
                let persists = match entry.cdw10 >> 30 {
                    spec::PERSISTENCE_UNCHANGED => None,
                    spec::PERSISTENCE_OFF => Some(false),
                    spec::PERSISTENCE_ON if shared.subsystem.keeps_reservations() => Some(true),
                    _ => return Err(invalid),
                };
                self.read_data(shared, entry, &mut data)?;
                let (current, key) = keys(&data);
                let current = (!ignores_key).then_some(current);
                let registration = match action {
                    spec::REGISTER => Registration::Register { key },
                    spec::UNREGISTER => Registration::Unregister { current },
                    spec::REPLACE => Registration::Replace { current, key },
                    _ => return Err(invalid),
                };
                change(false, &mut |one, host| one.register(host, registration, persists))?;
            }
            // "If this bit is set to '1', then the controller shall return an error of Invalid Field in Command."
            _ if ignores_key => return Err(invalid),
            nvm::RESERVATION_ACQUIRE => {
                let kind = kind.ok_or(invalid)?;
                self.read_data(shared, entry, &mut data)?;
                let (key, victim) = keys(&data);
                let drain = match action {
                    spec::ACQUIRE => change(false, &mut |one, host| one.acquire(host, key, kind))?,
                    spec::PREEMPT | spec::PREEMPT_AND_ABORT => {
                        let abort = action == spec::PREEMPT_AND_ABORT;
                        change(abort, &mut |one, host| one.preempt(host, key, victim, kind))?
                    }
                    _ => return Err(invalid),
                };
                if let Some(number) = drain {
                    let slot = self.take_slot(Owner::Queue(sq_index), entry.cid, entry.nsid);
                    self.preemptions.waiting.push((slot.ok_or(Status::INTERNAL_ERROR)?, number));
                    return Ok(true);
                }
            }
            // Reservation Release.
            _ => {
                self.read_data(shared, entry, &mut data[..8])?;
                let (key, _) = keys(&data);
                match action {
                    spec::RELEASE => change(false, &mut |one, host| one.release(host, key, kind))?,
                    spec::CLEAR => change(false, &mut |one, host| one.clear(host, key))?,
                    _ => return Err(invalid),
                };
            }
        }
        Ok(false)
    }

    /// Reservation Report (Base 7.5).
    fn report(
        &mut self,
        shared: &Shared,
        entry: &SubmissionEntry,
        namespace: &Namespace,
    ) -> Result<(), Status> {
        let length_bytes = (u64::from(entry.cdw10) + 1) * 4;
        if length_bytes > shared.config.max_transfer_bytes().min(MAX_REPORT_BYTES) {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        let extended = entry.cdw11 & spec::EXTENDED_DATA_STRUCTURE != 0;
        let mut report = {
            let table = shared.subsystem.reservations.table();
            let identity = table.members.get(&shared.controller_id).map(|member| member.identity);
            // Each form of the report has room for one form of Host Identifier.
            let fits = match identity {
                Some(HostIdentity::Short(_)) => !extended,
                Some(HostIdentity::Extended(_)) => extended,
                _ => true,
            };
            if !fits {
                return Err(Status::HOST_IDENTIFIER_INCONSISTENT.do_not_retry());
            }
            report(&table, namespace.nsid, extended)
        };
        report.resize(length_bytes as usize, 0);
        let mut ranges = std::mem::take(&mut self.ranges);
        ranges.clear();
        let walked = self.walker.walk(&shared.memory, entry, length_bytes, Direction::ToGuest, &mut ranges);
        let written = walked.and_then(|()| prp::write_ranges(&shared.memory, &ranges, &report));
        self.ranges = ranges;
        written
    }
}

/// Has the store keep what has changed. Without it the command has done what it does, and the host knows that power may undo it.
pub(crate) fn keep(shared: &Shared) -> Result<(), Status> {
    shared.subsystem.keep_reservations().map_err(|error| {
        log::error!("NVMe controller {:?}: {error}", shared.config.serial);
        Status::INTERNAL_ERROR
    })
}

/// The two keys that go with a command.
fn keys(data: &[u8; 16]) -> (u64, u64) {
    let value = u128::from_le_bytes(*data);
    (value as u64, (value >> 64) as u64)
}

/// An entry for each controller of each registrant.
fn report(table: &Table, nsid: u32, extended: bool) -> Vec<u8> {
    let nothing = Reservation::default();
    let reservation = table.namespaces.get(&nsid).unwrap_or(&nothing);
    let mut entries = Vec::new();
    let mut count = 0;
    for registrant in &reservation.registrants {
        let of = |(&id, member): (&u16, &Member)| (member.identity == registrant.host).then_some(id);
        let mut controllers: Vec<u16> = table.members.iter().filter_map(of).collect();
        if controllers.is_empty() {
            controllers.push(NO_CONTROLLER);
        }
        let status = if reservation.is_holder(registrant.host) { spec::HOLDER } else { 0 };
        let (short, long) = match registrant.host {
            HostIdentity::Unnamed { .. } => ([0; 8], [0; 16]),
            HostIdentity::Short(short) => (short, [0; 16]),
            HostIdentity::Extended(long) => ([0; 8], long),
        };
        count += controllers.len() as u16;
        for controller in controllers {
            let key = registrant.key;
            if extended {
                let entry = RegisteredControllerExtended { controller, status, key, host: long };
                entries.extend(entry.to_bytes());
            } else {
                entries.extend(RegisteredController { controller, status, host: short, key }.to_bytes());
            }
        }
    }
    let header = ReportHeader {
        generation: reservation.generation,
        kind: reservation.held.map_or(0, |(kind, _)| kind as u8),
        registered_controllers: count,
        persists: reservation.persists.into(),
    };
    let mut report = header.to_bytes().to_vec();
    if extended {
        report.resize(spec::EXTENDED_HEADER_SIZE_BYTES, 0);
    }
    report.extend(entries);
    report
}
