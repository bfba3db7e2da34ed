//! The state engine: plain structs that hold a device's saved state, and the bytes that carry them.
//!
//! A device keeps its saved state apart from itself, as a struct that derives [`VmState`]. Saving builds that struct from the
//! paused device and writes it; loading reads it and hands it to the device's checking constructor. This crate is the middle: it
//! turns the struct into bytes and bytes into the struct, says what the bytes mean ([`describe`]) and what the type can hold
//! ([`schema()`]). The bytes are those that QEMU's vmstate would write; what is read is not trusted.
//!
//! # In ten minutes
//!
//! **A device and its state** are two structs. The bytes hold neither name nor version of the state: whoever keeps them keeps both beside
//! them, as the head of a section does in a stream.
//!
//! ```
//! use vmstate::VmState;
//!
//! /// It runs, and has whatever that takes: threads, descriptors, locks.
//! struct Timer {
//!     period_ns: u64,
//!     elapsed_ns: u64,
//! }
//!
//! #[derive(VmState)]
//! #[vmstate(name = "timer")]
//! struct TimerState {
//!     #[vmstate(min = 1, max = 1_000_000_000)]
//!     period_ns: u64,
//!     elapsed_ns: u64,
//! }
//!
//! impl Timer {
//!     fn save(&self) -> TimerState {
//!         TimerState { period_ns: self.period_ns, elapsed_ns: self.elapsed_ns }
//!     }
//! }
//!
//! /// The only way from a state to a device: what the fields must be to each other is checked here.
//! impl TryFrom<TimerState> for Timer {
//!     type Error = String;
//!
//!     fn try_from(state: TimerState) -> Result<Self, String> {
//!         let TimerState { period_ns, elapsed_ns } = state;
//!         match elapsed_ns < period_ns {
//!             true => Ok(Timer { period_ns, elapsed_ns }),
//!             false => Err(format!("elapsed_ns: {elapsed_ns} is not within the period of {period_ns}")),
//!         }
//!     }
//! }
//!
//! let bytes = vmstate::to_bytes(&Timer { period_ns: 500, elapsed_ns: 3 }.save());
//! let version = TimerState::VERSION;
//!
//! let timer = Timer::try_from(vmstate::from_bytes::<TimerState>(&bytes, version)?)?;
//! assert_eq!((timer.period_ns, timer.elapsed_ns), (500, 3));
//! println!("{}", vmstate::schema::<TimerState>()); // what the bytes mean, as JSON
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! **A device with a sparse array.** Queues live in slots: the index is the identity, and holes are meaningful. The number of slots
//! is an earlier field. Whatever comes from a stream and counts something has a maximum.
//!
//! ```
//! use vmstate::{Slots, VmState};
//!
//! #[derive(VmState, Debug, PartialEq)]
//! #[vmstate(name = "queue")]
//! struct Queue {
//!     base: u64,
//!     #[vmstate(max = 65536)]
//!     size: u32,
//! }
//!
//! #[derive(VmState, Debug, PartialEq)]
//! #[vmstate(name = "controller")]
//! struct Controller {
//!     enabled: bool,
//!     queue_count: u16,
//!     #[vmstate(len = "queue_count", max = 256)]
//!     queues: Slots<Queue>,
//! }
//!
//! let mut queues = Slots::empty(3);
//! queues.put(1, Queue { base: 0x1000, size: 64 });
//! let state = Controller { enabled: true, queue_count: 3, queues };
//!
//! let mut bytes = vmstate::to_bytes(&state);
//! assert_eq!(bytes[..5], [1, 0, 3, b'0', b'1']); // enabled, three slots, the first is empty, the second is not
//! assert_eq!(vmstate::from_bytes::<Controller>(&bytes, 1)?, state);
//!
//! bytes[14] = 1; // the size of queue 1 becomes 65600
//! let error = vmstate::from_bytes::<Controller>(&bytes, 1).unwrap_err();
//! assert_eq!(error.to_string(), "queues[1].size: 65600 is above 65536");
//! # Ok::<(), vmstate::Error>(())
//! ```
//!
//! **A new field in version 2.** Older streams end before it, and get the default. A build that knows only version 1 refuses
//! version 2 by name and number.
//!
//! ```
//! # use vmstate::VmState;
//! #[derive(VmState)]
//! #[vmstate(name = "sensor", version = 2, oldest = 1)]
//! struct Sensor {
//!     enabled: bool,
//!     #[vmstate(since = 2, default = "320")]
//!     kelvin: u16,
//! }
//!
//! assert_eq!(vmstate::from_bytes::<Sensor>(&[1, 1, 44], 2)?.kelvin, 300);
//! assert_eq!(vmstate::from_bytes::<Sensor>(&[1], 1)?.kelvin, 320);
//! # Ok::<(), vmstate::Error>(())
//! ```
//!
//! **A subsection** is a part that is written only where it matters, so that states without it still load in builds that never
//! heard of it. One that is there and unknown is refused.
//!
//! ```
//! # use vmstate::VmState;
//! #[derive(VmState)]
//! #[vmstate(name = "clock/alarm")]
//! struct Alarm {
//!     at_ns: u64,
//! }
//!
//! #[derive(VmState)]
//! #[vmstate(name = "clock")]
//! struct Clock {
//!     now_ns: u64,
//!     #[vmstate(subsection, needed = "Clock::has_alarm")]
//!     alarm: Option<Alarm>,
//! }
//!
//! impl Clock {
//!     fn has_alarm(&self) -> bool {
//!         self.alarm.as_ref().is_some_and(|alarm| alarm.at_ns > self.now_ns)
//!     }
//! }
//!
//! let mut clock = Clock { now_ns: 5, alarm: Some(Alarm { at_ns: 4 }) };
//! assert_eq!(vmstate::to_bytes(&clock).len(), 8); // it has rung
//! clock.now_ns = 3;
//! let bytes = vmstate::to_bytes(&clock);
//! assert!(vmstate::from_bytes::<Clock>(&bytes, 1)?.alarm.is_some());
//! # Ok::<(), vmstate::Error>(())
//! ```
//!
//! **A check of your own**, of a field or of the whole struct, refuses what bounds cannot express.
//!
//! ```
//! # use vmstate::VmState;
//! #[derive(VmState)]
//! #[vmstate(name = "ring", check = "Ring::consistent")]
//! struct Ring {
//!     #[vmstate(check = "power_of_two")]
//!     size: u32,
//!     head: u32,
//! }
//!
//! fn power_of_two(size: &u32) -> Result<(), String> {
//!     if size.is_power_of_two() { Ok(()) } else { Err(format!("{size} is no power of two")) }
//! }
//!
//! impl Ring {
//!     fn consistent(&self) -> Result<(), &'static str> {
//!         if self.head < self.size { Ok(()) } else { Err("the head is beyond the end") }
//!     }
//! }
//!
//! let load = |bytes: [u8; 8]| vmstate::from_bytes::<Ring>(&bytes, 1).map(|_| ()).map_err(|error| error.to_string());
//! assert_eq!(load([0, 0, 0, 8, 0, 0, 0, 7]), Ok(()));
//! assert_eq!(load([0, 0, 0, 9, 0, 0, 0, 7]).unwrap_err(), "size: 9 is no power of two");
//! assert_eq!(load([0, 0, 0, 8, 0, 0, 0, 8]).unwrap_err(), "the head is beyond the end");
//! ```
//!
//! **A context** is what this side knows already: the length of an array that is a property of the device and not in the stream,
//! or a value that both sides must have. It goes along into the structs inside.
//!
//! ```
//! # use vmstate::{Slots, VmState};
//! struct Local {
//!     page_bytes: u32,
//!     lanes: usize,
//! }
//!
//! #[derive(VmState)]
//! #[vmstate(name = "lane")]
//! struct Lane {
//!     speed: u8,
//! }
//!
//! #[derive(VmState)]
//! #[vmstate(name = "link", context = "Local")]
//! struct Link {
//!     #[vmstate(equal = "Local::page_bytes")]
//!     page_bytes: u32,
//!     #[vmstate(len_from = "Local::lanes", max = 32)]
//!     lanes: Slots<Lane>,
//! }
//!
//! impl Local {
//!     fn page_bytes(&self) -> u32 {
//!         self.page_bytes
//!     }
//!     fn lanes(&self) -> usize {
//!         self.lanes
//!     }
//! }
//!
//! let bytes = [0, 0, 16, 0, b'0', b'1', 5];
//! let link: Link = vmstate::from_bytes_with(&bytes, 1, &Local { page_bytes: 4096, lanes: 2 })?;
//! assert_eq!(link.lanes.get(1).map(|lane| lane.speed), Some(5));
//! let error = vmstate::from_bytes_with::<Link, _>(&bytes, 1, &Local { page_bytes: 8192, lanes: 2 }).map(|_| ());
//! assert_eq!(error.unwrap_err().to_string(), "page_bytes: 4096 differs from this side's 8192");
//! # Ok::<(), vmstate::Error>(())
//! ```
//!
//! **A struct that contains itself** says how deep, and which field leads back. Deeper streams are an error, never an overflow.
//!
//! ```
//! # use vmstate::{Slots, VmState};
//! #[derive(VmState)]
//! #[vmstate(name = "bus", depth = 8)]
//! struct Bus {
//!     slot_count: u8,
//!     #[vmstate(len = "slot_count", max = 32, recursive)]
//!     bridges: Slots<Bus>,
//! }
//!
//! let chain = [1, b'1'].repeat(8);
//! let error = vmstate::from_bytes::<Bus>(&chain, 1).map(|_| ()).unwrap_err();
//! assert!(error.to_string().ends_with("\"bus\" is nested more than 8 levels deep"));
//! ```
//!
//! # Attributes
//!
//! | on the struct | |
//! | --- | --- |
//! | `name = "x"` | the description's name, under 128 bytes; `"parent/part"` for a subsection |
//! | `version = 2`, `oldest = 1` | what is written, and the oldest that is read (default: only `version`) |
//! | `depth = N` | the levels that a struct which contains itself may have |
//! | `context = "Type"` | what this side knows and the stream need not say; given to [`from_bytes_with`] |
//! | `check = "path"` | `fn(&Self) -> Result<(), impl Display>`, called after loading |
//!
//! | on a field | |
//! | --- | --- |
//! | none | integers, `bool`, arrays, nested structs (large ones in a `Box`) |
//! | `len = "field", max = N` | `Vec`, [`Slots`] or [`Bitmap`], or an array of these, whose length is the earlier field (`u8`, `u16`, `u32`); saving writes the real length there |
//! | `len_from = "path", max = N` | the same with the length in the context: `fn(&Context) -> usize` |
//! | `len = N` | the same with a length that never changes |
//! | `each_len`, `each_len_from`, `each_max` | for a `Vec` of such collections: the length of each of them |
//! | `list, max = N` | a `Vec` that carries its own end |
//! | `recursive` | the collection leads back to a struct that has a `depth` |
//! | `max = N`, `min = N` | bounds of an integer |
//! | `since = n`, `until = n`, `default = "expr"` | the first and last version that have the field, and its value otherwise (default: `Default::default()`) |
//! | `versions = [1, 1, 2]` | the version of the struct inside, for each version of this one that has the field |
//! | `subsection`, `needed = "path"` | an `Option` part that older readers may lack; `fn(&Self) -> bool` says whether it is written |
//! | `equal = "path"` | `fn(&Context) -> Field`: the value that this side has and the loaded one must be |
//! | `check = "path"` | `fn(&Field) -> Result<(), impl Display>`, called after loading |
//!
//! # Invariants
//!
//! - Saving cannot fail. The same state gives the same bytes, and save, load, save gives the same bytes.
//! - Loading never panics and never takes more memory than the stated maxima allow: every count is compared with its maximum
//!   before anything is allocated. Nor does it ever take more than 1 MiB and 16 times the size of its input.
//! - Nor does it overflow the stack: structs inside each other are counted by the compiler, and those that contain themselves by the
//!   loader. A struct that contains itself without saying how deep does not compile.
//! - All of the bytes are consumed, or the load fails.
//!
//! ```compile_fail,E0391
//! # use vmstate::VmState;
//! #[derive(VmState)]
//! #[vmstate(name = "tree")] // `depth = 8` is missing here,
//! struct Tree {
//!     #[vmstate(list, max = 2)] // and `recursive` here
//!     children: Vec<Tree>,
//! }
//! ```
//!
//! # Speed
//!
//! Medians that `cargo bench -p vmstate -- --verbose` printed on the reference host, which other work kept busy; the copies (`to_vec`
//! of the same bytes) are of the same run. No field costs more than 3.5 copies.
//!
//! | | 64 KiB, save | load | 1 MiB, save | load |
//! | --- | --- | --- | --- | --- |
//! | a copy | 0.70 µs | | 18.8 µs | |
//! | bytes | 0.72 µs | 0.77 µs | 18.4 µs | 18.8 µs |
//! | bools | 0.72 µs | 2.06 µs | 18.6 µs | 35.6 µs |
//! | 16-bit integers | 1.32 µs | 1.07 µs | 21.7 µs | 20.2 µs |
//! | 32-bit integers | 2.02 µs | 2.01 µs | 34.2 µs | 32.7 µs |
//! | 64-bit integers | 2.29 µs | 2.35 µs | 38.0 µs | 38.4 µs |
//! | entries of 64 bytes | 0.55 µs | 1.46 µs | 18.5 µs | 29.2 µs |
//! | a bitmap | 2.29 µs | 2.43 µs | 38.1 µs | 37.8 µs |
//!
//! A controller with 64 queue pairs, 256 namespaces and holes among both (45,181 bytes; 386 elements in sparse arrays, 256 with an
//! array of their own) is saved in 5.6 µs and loaded in 17.4 µs; a copy takes 0.30 µs.
//!
//! # Absent
//!
//! - No reflection at run time, no map types, no floating point, no strings (bytes are counted `Vec<u8>`), no enums (integers, which
//!   the device's constructor checks), no writing of older versions, and no default "nothing to save": whoever lists the devices of
//!   a machine says of each what becomes of it ([`Migratability`]).
//! - Of what QEMU's descriptions know: no single pointers (a sparse array of one slot has the same bytes), no sparse arrays of plain
//!   integers, no lists of collections, no counts that are signed, 64 bits wide, or a field of another struct. A list is described
//!   mark by mark, where QEMU says `qtailq` once.
//! - One type of context in a load: a struct inside that names another type than the outermost was given is an error.
//! - Saving cannot fail, so a state that breaks its own description (longer than a `max`, deeper than a `depth`, collections that
//!   share a length and have different ones) is written and cannot be loaded; lengths are asserted in debug builds. The same goes
//!   for a state of very many elements that take more than 16 times their bytes in memory, and over 1 MiB in all.
//! - The format cannot tell a subsection of a nested struct from fields that follow it and read the same, name and all: these are
//!   refused. Subsections may come in any order and, though not needed, be there.

#![forbid(unsafe_code)]

extern crate self as vmstate;

mod boxed;
mod collections;
#[doc(hidden)]
pub mod derived;
mod description;
mod error;
mod list;
mod migratability;
mod reader;
mod schema;
mod slots;
mod subsection;
mod value;

#[cfg(test)]
mod tests;

/// The examples of the README are tested like those above.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

use std::any::Any;

pub use collections::Counted;
pub use description::Description;
pub use error::{Error, Problem};
pub use migratability::Migratability;
pub use reader::Reader;
pub use schema::{FieldSchema, Outer, Schema};
pub use slots::{Bitmap, Slots};
pub use value::Value;
pub use vmstate_derive::VmState;

/// A struct that can be saved and loaded. Derived, not written by hand.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no saved state",
    note = "derive it: `#[derive(VmState)]`; if it is one of several collections, say how long each is: `each_len`"
)]
pub trait VmState: Sized + 'static {
    /// The description's name.
    const NAME: &'static str;
    /// The version that is written.
    const VERSION: u32;
    /// The oldest version that is read.
    const OLDEST: u32;
    /// The fewest bytes that a state takes on the wire, in any version that is read.
    const LEAST_BYTES: usize;
    /// What a load has on the stack at once, roughly: the largest chain of structs inside each other, this one included.
    const STACK_BYTES: usize;

    /// Appends the fields and the needed subsections.
    fn save_fields(&self, out: &mut Vec<u8>);

    /// Reads the fields and subsections as `version` wrote them. The caller has checked that `version` is one we read.
    fn load_fields(reader: &mut Reader<'_>, version: u32) -> Result<Self, Error>;

    /// Adds an entry for each field and each needed subsection.
    fn describe_fields(&self, description: &mut Description);

    /// The schema of the type as a part of the structs `outer`.
    fn schema_within(outer: Option<&Outer<'_>>) -> Schema;

    /// The schema of the type.
    fn schema() -> Schema {
        Self::schema_within(None)
    }
}

/// The bytes of a state, written as [`VmState::VERSION`].
pub fn to_bytes<T: VmState>(state: &T) -> Vec<u8> {
    let mut out = Vec::new();
    state.save_fields(&mut out);
    out
}

/// Reads a state that was written as `version`.
///
/// # Errors
///
/// A version that is not read, bytes that do not fit the description, values out of their bounds, and bytes left over.
pub fn from_bytes<T: VmState>(bytes: &[u8], version: u32) -> Result<T, Error> {
    load_whole(Reader::new(bytes), version)
}

/// [`from_bytes`] for structs that name a context.
///
/// # Errors
///
/// As [`from_bytes`], and [`Problem::MissingContext`] if a struct names another type than `C`.
pub fn from_bytes_with<T: VmState, C: Any>(bytes: &[u8], version: u32, context: &C) -> Result<T, Error> {
    load_whole(Reader::new(bytes).with_context(context), version)
}

fn load_whole<T: VmState>(mut reader: Reader<'_>, version: u32) -> Result<T, Error> {
    let state = load_versioned(&mut reader, version)?;
    match reader.left() {
        0 => Ok(state),
        bytes => Err(Problem::LeftOver { bytes }.into()),
    }
}

/// The number of bytes at the start of `bytes` that are a `T` written as `version`: for streams whose sections carry no length.
///
/// # Errors
///
/// [`Problem::Truncated`] if that depends on bytes that are not there yet; otherwise as [`from_bytes`].
pub fn measure<T: VmState>(bytes: &[u8], version: u32) -> Result<usize, Error> {
    measure_whole::<T>(Reader::partial(bytes), version)
}

/// [`measure`] for structs that name a context.
///
/// # Errors
///
/// As [`measure`], and [`Problem::MissingContext`] if a struct names another type than `C`.
pub fn measure_with<T: VmState, C: Any>(bytes: &[u8], version: u32, context: &C) -> Result<usize, Error> {
    measure_whole::<T>(Reader::partial(bytes).with_context(context), version)
}

fn measure_whole<T: VmState>(mut reader: Reader<'_>, version: u32) -> Result<usize, Error> {
    let whole = reader.left();
    load_versioned::<T>(&mut reader, version)?;
    Ok(whole - reader.left())
}

fn load_versioned<T: VmState>(reader: &mut Reader<'_>, version: u32) -> Result<T, Error> {
    if version > T::VERSION {
        return Err(Problem::TooNew { name: T::NAME, version, newest: T::VERSION }.into());
    }
    if version < T::OLDEST {
        return Err(Problem::TooOld { name: T::NAME, version, oldest: T::OLDEST }.into());
    }
    T::load_fields(reader, version)
}

/// What the bytes of this state mean, as the stream's trailer says it: `{vmsd_name, version, fields, subsections}`.
pub fn describe<T: VmState>(state: &T) -> serde_json::Value {
    Description::of(state)
}

/// The schema of a type.
pub fn schema<T: VmState>() -> Schema {
    T::schema()
}

/// The schema of a type as JSON, with the keys of the trailer.
pub fn schema_json<T: VmState>() -> serde_json::Value {
    T::schema().to_json()
}

/// A hash of all that the schema of a type says.
pub fn schema_hash<T: VmState>() -> u64 {
    T::schema().hash()
}
