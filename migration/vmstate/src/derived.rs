//! What derived code calls. Not for hand-written code.

use std::fmt::{Debug, Display, Write};

pub use crate::collections::rows;
use crate::{Error, FieldSchema, Problem, Reader};

pub mod list {
    //! Lists.
    pub use crate::list::{describe, load, save, schema};
}

pub mod subsection {
    //! Optional parts.
    pub use crate::subsection::{describe, is_part_of, is_same, load, next, save, unknown};
}

/// What the structs of a state, one inside the other, may take of the stack. A load has up to a dozen copies of each at hand, and runs on
/// threads with 2 MiB of stack.
const MAX_STACK_BYTES: usize = 128 << 10;

/// What a level takes besides its struct.
const LEVEL_BYTES: usize = 1 << 10;

/// The bytes of a struct and of the largest of the structs inside.
pub const fn stack_bytes(own: usize, inner: &[usize]) -> usize {
    own.saturating_add(LEVEL_BYTES).saturating_add(largest(inner))
}

/// The largest of the numbers, and 0 if there is none.
pub const fn largest(numbers: &[usize]) -> usize {
    let mut largest = 0;
    let mut at = 0;
    while at < numbers.len() {
        if numbers[at] > largest {
            largest = numbers[at];
        }
        at += 1;
    }
    largest
}

/// Whether a thread has the stack to load `levels` of such structs inside each other.
pub const fn stack_suffices(level_bytes: usize, levels: u32) -> bool {
    level_bytes.saturating_mul(levels as usize) <= MAX_STACK_BYTES
}

/// The sum of what the fields take at least.
pub const fn least_bytes(fields: &[usize]) -> usize {
    let mut sum: usize = 0;
    let mut at = 0;
    while at < fields.len() {
        sum = sum.saturating_add(fields[at]);
        at += 1;
    }
    sum
}

/// Whether every version is one the struct inside can read, and the last one the newest.
pub const fn versions_fit(versions: &[u32], oldest: u32, newest: u32) -> bool {
    let mut at = 0;
    while at < versions.len() {
        if versions[at] < oldest || versions[at] > newest {
            return false;
        }
        at += 1;
    }
    versions[versions.len() - 1] == newest
}

/// Begins to load a struct that may contain itself.
pub fn enter<T: crate::VmState>(reader: &mut Reader<'_>, maximum: u32) -> Result<(), Error> {
    reader.enter::<T>(T::NAME, maximum)
}

/// Ends what [`enter`] began.
pub fn leave(reader: &mut Reader<'_>) {
    reader.leave();
}

/// What can be above or below something.
#[diagnostic::on_unimplemented(
    message = "`{Self}` cannot have a `max` or a `min`",
    label = "bounds are for integers, and a `max` for what has a length"
)]
pub trait Bounded: Copy + Into<i128> {}

impl Bounded for u8 {}
impl Bounded for u16 {}
impl Bounded for u32 {}
impl Bounded for u64 {}
impl Bounded for i8 {}
impl Bounded for i16 {}
impl Bounded for i32 {}
impl Bounded for i64 {}

/// The bound as the schema holds it.
pub fn bound<T: Bounded>(bound: T) -> i128 {
    bound.into()
}

/// Refuses a value above `maximum`.
pub fn at_most<T: Bounded>(value: T, maximum: T) -> Result<(), Error> {
    let (value, maximum) = (value.into(), maximum.into());
    if value > maximum { Err(Problem::AboveMaximum { value, maximum }.into()) } else { Ok(()) }
}

/// Refuses a value below `minimum`.
pub fn at_least<T: Bounded>(value: T, minimum: T) -> Result<(), Error> {
    let (value, minimum) = (value.into(), minimum.into());
    if value < minimum { Err(Problem::BelowMinimum { value, minimum }.into()) } else { Ok(()) }
}

/// Refuses a count above `maximum`, before anything is allocated for it.
pub fn bounded<T: Copy + Into<i128>>(count: T, maximum: usize) -> Result<usize, Error> {
    let count = count.into();
    match usize::try_from(count) {
        Ok(count) if count <= maximum => Ok(count),
        _ => Err(Problem::AboveMaximum { value: count, maximum: maximum as i128 }.into()),
    }
}

/// The same for a count of this side's context.
pub fn bounded_here(count: usize, maximum: usize) -> Result<usize, Error> {
    match count <= maximum {
        true => Ok(count),
        false => Err(Problem::AboveMaximum { value: count as i128, maximum: maximum as i128 }.into()),
    }
}

/// The length that collections have in common: that is what is written, so that a length and its collections cannot disagree in a
/// stream. A field that counts nothing at the moment is written as it is.
pub fn shared_count(field: usize, counts: &[Option<usize>]) -> usize {
    let mut known = counts.iter().flatten();
    let Some(first) = known.next() else { return field };
    debug_assert!(known.all(|count| count == first), "collections that share a length");
    *first
}

/// Refuses a value that is not this side's.
pub fn same<T: PartialEq + Debug>(value: &T, ours: T) -> Result<(), Error> {
    match *value == ours {
        true => Ok(()),
        false => Err(Problem::Different { value: brief(value), ours: brief(&ours) }.into()),
    }
}

/// The value as a message shows it: a long one not to its end.
fn brief(value: &impl Debug) -> Box<str> {
    const MOST_BYTES: usize = 100;

    struct Brief(String);
    impl Write for Brief {
        fn write_str(&mut self, text: &str) -> std::fmt::Result {
            self.0.extend(text.chars().take(MOST_BYTES));
            if self.0.len() > MOST_BYTES { Err(std::fmt::Error) } else { Ok(()) }
        }
    }

    let mut brief = Brief(String::new());
    if write!(brief, "{value:?}").is_err() {
        brief.0.push_str("...");
    }
    brief.0.into_boxed_str()
}

/// Says that there are `count` of what the schema says so far.
pub fn repeat(field: &mut FieldSchema, count: usize) {
    field.repeat(count);
}

/// Turns what a check says into an error.
pub fn checked(result: Result<(), impl Display>) -> Result<(), Error> {
    result.map_err(|why| Problem::Refused(why.to_string()).into())
}
