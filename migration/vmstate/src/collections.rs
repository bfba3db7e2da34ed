//! Collections whose length is outside: [`Vec`], [`Slots`], [`Bitmap`], and arrays of these.

use crate::description::Description;
use crate::schema::{FieldSchema, Outer};
use crate::{Bitmap, Error, Problem, Reader, Slots, Value, VmState};

/// A collection whose number of elements is an earlier field of the same struct, a constant, or this side's business.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no length to be counted",
    label = "`len = ...` is for `Vec`, `Slots` and `Bitmap`, and for arrays of these"
)]
pub trait Counted: Sized {
    /// What a load has on the stack for the structs inside, roughly: see [`VmState::STACK_BYTES`].
    const STACK_BYTES: usize = 0;
    /// The version of the struct inside.
    const STRUCT_VERSION: u32 = 1;
    /// The oldest readable version of the struct inside.
    const STRUCT_OLDEST: u32 = 1;

    /// The number of elements; of an array, what its collections have in common, and nothing if it has none.
    fn count(&self) -> Option<usize>;

    /// Appends the elements, without their number.
    fn save(&self, out: &mut Vec<u8>);

    /// Reads `count` elements; the caller has compared `count` with its maximum.
    fn load(reader: &mut Reader<'_>, count: usize, version: u32) -> Result<Self, Error>;

    /// Adds the entries for the elements.
    fn describe(&self, name: &str, description: &mut Description);

    /// Fills in what the type says of itself as a part of the structs `outer`.
    fn schema(field: &mut FieldSchema, outer: &Outer<'_>);
}

impl<T: Value> Counted for Vec<T> {
    const STACK_BYTES: usize = T::STACK_BYTES;
    const STRUCT_VERSION: u32 = T::STRUCT_VERSION;
    const STRUCT_OLDEST: u32 = T::STRUCT_OLDEST;

    fn count(&self) -> Option<usize> {
        Some(self.len())
    }

    fn save(&self, out: &mut Vec<u8>) {
        T::save_run(self, out);
    }

    fn load(reader: &mut Reader<'_>, count: usize, version: u32) -> Result<Self, Error> {
        T::load_run(reader, count, version)
    }

    fn describe(&self, name: &str, description: &mut Description) {
        T::describe_run(self, name, description);
    }

    fn schema(field: &mut FieldSchema, outer: &Outer<'_>) {
        T::schema(field, outer);
    }
}

const EMPTY: u8 = b'0';
const PRESENT: u8 = b'1';

impl<T: VmState> Counted for Slots<T> {
    const STACK_BYTES: usize = T::STACK_BYTES;
    const STRUCT_VERSION: u32 = T::VERSION;
    const STRUCT_OLDEST: u32 = T::OLDEST;

    fn count(&self) -> Option<usize> {
        Some(self.len())
    }

    fn save(&self, out: &mut Vec<u8>) {
        for slot in self.iter() {
            match slot {
                None => out.push(EMPTY),
                Some(element) => {
                    out.push(PRESENT);
                    element.save_fields(out);
                }
            }
        }
    }

    fn load(reader: &mut Reader<'_>, count: usize, version: u32) -> Result<Self, Error> {
        // Every slot takes a byte at least, so a count that the bytes cannot hold is refused before memory is taken for it.
        let mut slots = reader.room(count, 1)?;
        reader.promise(count);
        for index in 0..count {
            reader.keep(1);
            slots.push(load_slot(reader, version).map_err(|error| error.at_index(index))?);
        }
        Ok(Slots::from_boxes(slots))
    }

    fn describe(&self, name: &str, description: &mut Description) {
        for slot in self.iter() {
            description.plain(name, "ptr-marker", 1, 1);
            if let Some(element) = slot {
                description.structure(name, element);
            }
        }
    }

    fn schema(field: &mut FieldSchema, outer: &Outer<'_>) {
        field.structure::<T>(outer);
        field.plain("ptr-marker", 1);
    }
}

fn load_slot<T: VmState>(reader: &mut Reader<'_>, version: u32) -> Result<Option<Box<T>>, Error> {
    match reader.byte()? {
        EMPTY => Ok(None),
        PRESENT => {
            reader.spend(size_of::<T>())?;
            Ok(Some(Box::new(T::load_fields(reader, version)?)))
        }
        other => Err(Problem::SlotMarker(other).into()),
    }
}

impl Counted for Bitmap {
    fn count(&self) -> Option<usize> {
        Some(self.len())
    }

    fn save(&self, out: &mut Vec<u8>) {
        u64::save_run(self.words(), out);
    }

    fn load(reader: &mut Reader<'_>, count: usize, version: u32) -> Result<Self, Error> {
        let words = u64::load_run(reader, count.div_ceil(64), version)?;
        Bitmap::from_words(count, words).ok_or_else(|| Problem::BitBeyond { bits: count }.into())
    }

    fn describe(&self, name: &str, description: &mut Description) {
        if !self.is_empty() {
            description.plain(name, "bitmap", self.words().len() * 8, 1);
        }
    }

    fn schema(field: &mut FieldSchema, _outer: &Outer<'_>) {
        field.kind = "bitmap";
    }
}

/// One collection after the other, all of the same length.
impl<C: Counted, const N: usize> Counted for [C; N] {
    const STACK_BYTES: usize = C::STACK_BYTES;
    const STRUCT_VERSION: u32 = C::STRUCT_VERSION;
    const STRUCT_OLDEST: u32 = C::STRUCT_OLDEST;

    fn count(&self) -> Option<usize> {
        rows::each_count(self)
    }

    fn save(&self, out: &mut Vec<u8>) {
        rows::save(self, out);
    }

    fn load(reader: &mut Reader<'_>, count: usize, version: u32) -> Result<Self, Error> {
        let run = rows::load(reader, N, count, version)?;
        reader.refund(size_of::<Self>());
        Ok(run.try_into().unwrap_or_else(|_| unreachable!("as many collections are loaded as asked")))
    }

    fn describe(&self, name: &str, description: &mut Description) {
        rows::describe(self, name, description);
    }

    fn schema(field: &mut FieldSchema, outer: &Outer<'_>) {
        C::schema(field, outer);
        field.repeat(N);
    }
}

/// Collections one after the other, whose length is another number than theirs.
pub mod rows {
    use super::*;

    /// What the collections have in common, if there are any.
    pub fn each_count<C: Counted>(rows: &[C]) -> Option<usize> {
        let first = rows.first()?.count();
        debug_assert!(rows.iter().all(|row| row.count() == first), "collections that share a length");
        first
    }

    /// Appends the collections.
    pub fn save<C: Counted>(rows: &[C], out: &mut Vec<u8>) {
        rows.iter().for_each(|row| row.save(out));
    }

    /// Reads `count` collections of `each` elements; the caller has compared both with their maxima.
    pub fn load<C: Counted>(
        reader: &mut Reader<'_>,
        count: usize,
        each: usize,
        version: u32,
    ) -> Result<Vec<C>, Error> {
        let mut rows = reader.room(count, 0)?;
        for index in 0..count {
            rows.push(C::load(reader, each, version).map_err(|error| error.at_index(index))?);
        }
        Ok(rows)
    }

    /// Adds the entries of every collection.
    pub fn describe<C: Counted>(rows: &[C], name: &str, description: &mut Description) {
        rows.iter().for_each(|row| row.describe(name, description));
    }
}
