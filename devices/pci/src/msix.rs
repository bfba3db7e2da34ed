//! MSI-X: the vector table, the pending bits, and the way from an event to a message.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::config::ConfigSpace;
use crate::error::Error;
use crate::state::{MsixEntryState, MsixState};

/// Most vectors that MSI-X can have.
pub const MAX_VECTORS: u16 = 2048;
const ENTRY_BYTES: u64 = 16;
const CONTROL_MASKED: u32 = 1;

/// What a vector sends: `data` written to `address`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsiMessage {
    /// Where to; bits 1:0 are 0.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// Where messages go: KVM's routes and irqfds, a vfio-user client, or a recorder in tests.
///
/// `set_vector` is called with the table locked: it must not call back into [`Msix`].
pub trait MsixSink: Send + Sync {
    /// From now on `vector` sends `message`; `None`: it is masked, MSI-X is off or the function is no bus
    /// master, and no `signal` for it comes until the next `Some`.
    fn set_vector(&self, vector: u16, message: Option<MsiMessage>);
    /// Sends the message of `vector` now. May come from several threads at once.
    fn signal(&self, vector: u16);
}

/// How many vectors there are and where table and pending bits lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// Vectors, 1 to [`MAX_VECTORS`].
    pub vectors: u16,
    /// The BAR that holds both.
    pub bar: u8,
    /// Offset of the table in bytes, a multiple of 8; it takes 16 bytes a vector.
    pub table_offset: u32,
    /// Offset of the pending bits in bytes, a multiple of 8; they take 8 bytes for every 64 vectors.
    pub pending_offset: u32,
}

impl MsixLayout {
    fn table_bytes(&self) -> u64 {
        u64::from(self.vectors) * ENTRY_BYTES
    }

    fn pending_bytes(&self) -> u64 {
        u64::from(self.vectors).div_ceil(64) * 8
    }

    pub(crate) fn error(&self, reason: &'static str) -> Error {
        let Self { vectors, bar, table_offset, pending_offset } = *self;
        Error::BadMsix { vectors, bar, table_offset, pending_offset, reason }
    }

    pub(crate) fn check(&self, bar_length_bytes: u64) -> Result<(), Error> {
        if !(1..=MAX_VECTORS).contains(&self.vectors) {
            return Err(self.error("there can be 1 to 2048 vectors"));
        }
        if !self.table_offset.is_multiple_of(8) || !self.pending_offset.is_multiple_of(8) {
            return Err(self.error("offsets must be multiples of 8"));
        }
        let (table, pending) = (u64::from(self.table_offset), u64::from(self.pending_offset));
        let (table_end, pending_end) = (table + self.table_bytes(), pending + self.pending_bytes());
        if table_end > bar_length_bytes || pending_end > bar_length_bytes {
            return Err(self.error("they reach beyond the BAR"));
        }
        if table < pending_end && pending < table_end {
            return Err(self.error("they overlap"));
        }
        Ok(())
    }
}

/// Lets senders through without a lock. The top bit says that the vector is deliverable, the others count the senders
/// that are looking at it, so that whoever masks it can wait until they are gone.
#[derive(Default)]
struct Gate(AtomicU32);

impl Gate {
    const OPEN: u32 = 1 << 31;

    fn pass(&self, send: impl FnOnce()) -> bool {
        let open = self.0.fetch_add(1, Ordering::Acquire) & Self::OPEN != 0;
        if open {
            send();
        }
        self.0.fetch_sub(1, Ordering::Release);
        open
    }

    fn is_open(&self) -> bool {
        self.0.load(Ordering::Acquire) & Self::OPEN != 0
    }

    fn open(&self) {
        self.0.fetch_or(Self::OPEN, Ordering::Release);
    }

    /// Closes, and returns when no sender is inside. Senders never wait for anything but the sink's `signal`.
    fn close(&self) {
        self.0.fetch_and(!Self::OPEN, Ordering::Acquire);
        while self.0.load(Ordering::Acquire) & !Self::OPEN != 0 {
            std::thread::yield_now();
        }
    }
}

#[derive(Clone, Copy)]
struct Entry {
    message: MsiMessage,
    masked: bool,
    pending: bool,
    /// What the sink was told last.
    announced: Option<MsiMessage>,
}

struct Table {
    entries: Vec<Entry>,
    control: Control,
}

/// What configuration space says about all vectors.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Control {
    enabled: bool,
    function_masked: bool,
    /// A message is a memory write, which only a bus master can make.
    bus_master: bool,
}

impl Control {
    pub fn of(config: &ConfigSpace) -> Self {
        let (enabled, function_masked) = config.msix_control();
        Self { enabled, function_masked, bus_master: config.bus_master() }
    }

    /// Whether messages of vectors that are not masked themselves go out.
    fn lets_through(self) -> bool {
        self.enabled && !self.function_masked && self.bus_master
    }
}

/// The MSI-X of one function.
pub struct Msix {
    layout: MsixLayout,
    sink: Arc<dyn MsixSink>,
    gates: Vec<Gate>,
    table: Mutex<Table>,
}

impl Msix {
    /// All vectors masked and MSI-X off, as after reset.
    pub(crate) fn new(layout: MsixLayout, sink: Arc<dyn MsixSink>) -> Self {
        let entry = Entry {
            message: MsiMessage { address: 0, data: 0 },
            masked: true,
            pending: false,
            announced: None,
        };
        Self {
            layout,
            sink,
            gates: (0..layout.vectors).map(|_| Gate::default()).collect(),
            table: Mutex::new(Table {
                entries: vec![entry; usize::from(layout.vectors)],
                control: Control::default(),
            }),
        }
    }

    /// Number of vectors.
    #[must_use]
    pub fn vectors(&self) -> u16 {
        self.layout.vectors
    }

    /// Sends the message of `vector`, or remembers it in the pending bit while the vector is masked or the function is no bus
    /// master. While MSI-X is off the event is lost, as there is no other interrupt. Takes no lock if the message can be sent. A
    /// vector that does not exist is ignored.
    pub fn trigger(&self, vector: u16) {
        let Some(gate) = self.gates.get(usize::from(vector)) else { return };
        if gate.pass(|| self.sink.signal(vector)) {
            return;
        }
        let mut table = self.lock_table();
        if gate.is_open() {
            self.sink.signal(vector);
        } else if table.control.enabled
            && let Some(entry) = table.entries.get_mut(usize::from(vector))
        {
            entry.pending = true;
        }
    }

    /// Takes over what the configuration space says.
    pub(crate) fn set_control(&self, control: Control) {
        let mut table = self.lock_table();
        if table.control == control {
            return;
        }
        table.control = control;
        if !control.enabled {
            table.entries.iter_mut().for_each(|entry| entry.pending = false);
        }
        for vector in 0..self.layout.vectors {
            self.announce(&mut table, vector);
        }
    }

    /// See [`Endpoint::bar_read`](crate::Endpoint::bar_read).
    pub(crate) fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) -> bool {
        let Some(place) = self.place(bar, offset) else { return false };
        let table = self.lock_table();
        match place {
            Place::Table(start) => {
                for (position, byte) in (start..).zip(data) {
                    *byte = table.entries.get((position / ENTRY_BYTES) as usize).map_or(0, |entry| {
                        {
                            let words = entry.message.address.to_le_bytes().into_iter();
                            let words = words.chain(entry.message.data.to_le_bytes());
                            words
                                .chain(u32::from(entry.masked).to_le_bytes())
                                .nth((position % ENTRY_BYTES) as usize)
                        }
                        .unwrap_or(0)
                    });
                }
            }
            Place::Pending(start) => {
                for (position, byte) in (start..).zip(data) {
                    let vectors = table.entries.iter().skip(position as usize * 8).take(8);
                    *byte = vectors
                        .enumerate()
                        .fold(0, |bits, (bit, entry)| bits | u8::from(entry.pending) << bit);
                }
            }
        }
        true
    }

    /// See [`Endpoint::bar_write`](crate::Endpoint::bar_write). "Software must use aligned full DWORD or QWORD
    /// transactions; otherwise the result is undefined" (PCI 3.0, 6.8.2): others are ignored, and so are the pending
    /// bits, which are read-only.
    pub(crate) fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) -> bool {
        let Some(place) = self.place(bar, offset) else { return false };
        let Place::Table(start) = place else { return true };
        let aligned = matches!(data.len(), 4 | 8) && start.is_multiple_of(data.len() as u64);
        let vector = start / ENTRY_BYTES;
        let mut table = self.lock_table();
        let Some(entry) = table.entries.get_mut(vector as usize) else { return true };
        if !aligned {
            return true;
        }
        for (position, word) in (start % ENTRY_BYTES..).step_by(4).zip(data.as_chunks::<4>().0) {
            let word = u32::from_le_bytes(*word);
            let address = entry.message.address;
            match position {
                0 => entry.message.address = address & !0xffff_ffff | u64::from(word & !0b11),
                4 => entry.message.address = address & 0xffff_ffff | u64::from(word) << 32,
                8 => entry.message.data = word,
                _ => entry.masked = word & CONTROL_MASKED != 0,
            }
        }
        // The table has at most 2048 entries.
        self.announce(&mut table, vector as u16);
        true
    }

    pub(crate) fn save(&self) -> MsixState {
        let table = self.lock_table();
        let entry = |entry: &Entry| MsixEntryState {
            address: entry.message.address,
            data: entry.message.data,
            masked: entry.masked,
            pending: entry.pending,
        };
        MsixState { count: self.layout.vectors, entries: table.entries.iter().map(entry).collect() }
    }

    /// Takes over `state`, with what the restored configuration space says.
    pub(crate) fn restore(&self, state: &MsixState, control: Control) -> Result<(), Error> {
        let here = usize::from(self.layout.vectors);
        if state.entries.len() != here || usize::from(state.count) != here {
            return Err(Error::VectorCountMismatch {
                saved: state.entries.len(),
                declared: state.count,
                here,
            });
        }
        for (vector, entry) in state.entries.iter().enumerate() {
            if entry.address & 0b11 != 0 {
                return Err(Error::BadVector { vector, reason: "its address is not a multiple of 4" });
            }
            if entry.pending && !control.enabled {
                return Err(Error::BadVector { vector, reason: "it is pending while MSI-X is off" });
            }
            if entry.pending && control.lets_through() && !entry.masked {
                return Err(Error::BadVector { vector, reason: "it is pending but not masked" });
            }
        }
        let mut table = self.lock_table();
        table.control = control;
        for (entry, saved) in table.entries.iter_mut().zip(&state.entries) {
            entry.message = MsiMessage { address: saved.address, data: saved.data };
            entry.masked = saved.masked;
            entry.pending = saved.pending;
        }
        for vector in 0..self.layout.vectors {
            self.announce(&mut table, vector);
        }
        Ok(())
    }

    /// Tells the sink what became of `vector`, and sends what was pending if it can be sent now.
    fn announce(&self, table: &mut Table, vector: u16) {
        let index = usize::from(vector);
        let (Some(entry), Some(gate)) = (table.entries.get_mut(index), self.gates.get(index)) else { return };
        let deliverable = table.control.lets_through() && !entry.masked;
        let message = deliverable.then_some(entry.message);
        if message == entry.announced {
            return;
        }
        gate.close();
        entry.announced = message;
        self.sink.set_vector(vector, message);
        if deliverable {
            if std::mem::take(&mut entry.pending) {
                self.sink.signal(vector);
            }
            gate.open();
        }
    }

    fn place(&self, bar: u8, offset: u64) -> Option<Place> {
        if bar != self.layout.bar {
            return None;
        }
        let inside =
            |start: u32, length_bytes| offset.checked_sub(u64::from(start)).filter(|&at| at < length_bytes);
        let table = inside(self.layout.table_offset, self.layout.table_bytes()).map(Place::Table);
        table.or_else(|| inside(self.layout.pending_offset, self.layout.pending_bytes()).map(Place::Pending))
    }

    fn lock_table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Offset of an access in the table or in the pending bits.
enum Place {
    Table(u64),
    Pending(u64),
}
