//! The state engine: plain structs that hold a device's saved state, and the bytes that carry them.
//!
//! A device keeps its saved state apart from itself, as a struct that derives [`VmState`]. Saving builds that struct from the
//! paused device and writes it; loading reads it and hands it to the device's checking constructor. This crate is the middle: it
//! turns the struct into bytes and bytes into the struct, says what the bytes mean ([`describe`]) and what the type can hold
//! ([`schema()`]). The `stream` crate puts the bytes into sections.
//!
//! ```
//! use vmstate::{Slots, VmState};
//!
//! #[derive(VmState, Debug, PartialEq)]
//! #[vmstate(name = "queue", version = 1)]
//! struct Queue {
//!     base: u64,
//!     #[vmstate(max = 65536)]
//!     size: u32,
//! }
//!
//! #[derive(VmState, Debug, PartialEq)]
//! #[vmstate(name = "controller", version = 2, oldest = 1)]
//! struct Controller {
//!     enabled: bool,
//!     queue_count: u16,
//!     #[vmstate(len = "queue_count", max = 256)]
//!     queues: Slots<Queue>,
//!     #[vmstate(since = 2, default = "320")]
//!     kelvin: u16,
//! }
//!
//! let mut queues = Slots::empty(3);
//! queues.put(1, Queue { base: 0x1000, size: 64 });
//! let state = Controller { enabled: true, queue_count: 3, queues, kelvin: 300 };
//!
//! let bytes = vmstate::to_bytes(&state);
//! assert_eq!(vmstate::from_bytes::<Controller>(&bytes, 2)?, state);
//! // What version 1 wrote ends before the temperature.
//! assert_eq!(vmstate::from_bytes::<Controller>(&bytes[..bytes.len() - 2], 1)?.kelvin, 320);
//!
//! let mut bad = bytes.clone();
//! bad[14] = 1; // the size of queue 1 becomes 65600
//! let error = vmstate::from_bytes::<Controller>(&bad, 2).unwrap_err();
//! assert_eq!(error.to_string(), "queues[1].size: 65600 is above 65536");
//! # Ok::<(), vmstate::Error>(())
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
//! | none | integers, `bool`, arrays, nested structs |
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
//! # Absent
//!
//! No reflection at run time, no map types, no floating point, no strings (bytes are counted `Vec<u8>`), no enums (integers, which
//! the device's constructor checks), no writing of older versions, and no default "nothing to save".

#![forbid(unsafe_code)]

extern crate self as vmstate;

mod boxed;
mod collections;
#[doc(hidden)]
pub mod derived;
mod description;
mod error;
mod list;
mod reader;
mod schema;
mod slots;
mod subsection;
mod value;

#[cfg(test)]
mod tests;

use std::any::Any;

pub use collections::Counted;
pub use description::Description;
pub use error::{Error, Problem};
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
