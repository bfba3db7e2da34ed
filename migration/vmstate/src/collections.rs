//! Collections whose length an earlier field holds: [`Vec`], [`Slots`] and [`Bitmap`]; and lists, which carry their own end.

use crate::description::Description;
use crate::schema::FieldSchema;
use crate::{Bitmap, Error, Problem, Reader, Slots, Value, VmState};

/// A collection whose number of elements is an earlier field of the same struct.
#[diagnostic::on_unimplemented(
    message = "`{Self}` has no length to be counted",
    label = "`len = ...` is for `Vec`, `Slots` and `Bitmap`"
)]
pub trait Counted: Sized {
    /// Levels of structs inside.
    const DEPTH: u32 = 0;
    /// The version of the struct inside.
    const STRUCT_VERSION: u32 = 1;
    /// The oldest readable version of the struct inside.
    const STRUCT_OLDEST: u32 = 1;

    /// The number of elements.
    fn count(&self) -> usize;

    /// Appends the elements, without their number.
    fn save(&self, out: &mut Vec<u8>);

    /// Reads `count` elements; the caller has compared `count` with its maximum.
    fn load(reader: &mut Reader<'_>, count: usize, version: u32) -> Result<Self, Error>;

    /// Adds the entries for the elements.
    fn describe(&self, name: &str, description: &mut Description);

    /// Fills in what the type says of itself.
    fn schema(field: &mut FieldSchema);
}

impl<T: Value> Counted for Vec<T> {
    const DEPTH: u32 = T::DEPTH;
    const STRUCT_VERSION: u32 = T::STRUCT_VERSION;
    const STRUCT_OLDEST: u32 = T::STRUCT_OLDEST;

    fn count(&self) -> usize {
        self.len()
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

    fn schema(field: &mut FieldSchema) {
        T::schema(field);
    }
}

impl<T: VmState> Counted for Slots<T> {
    const DEPTH: u32 = T::DEPTH;
    const STRUCT_VERSION: u32 = T::VERSION;
    const STRUCT_OLDEST: u32 = T::OLDEST;

    fn count(&self) -> usize {
        self.len()
    }

    fn save(&self, out: &mut Vec<u8>) {
        for slot in self.iter() {
            match slot {
                None => out.push(b'0'),
                Some(element) => {
                    out.push(b'1');
                    element.save_fields(out);
                }
            }
        }
    }

    fn load(reader: &mut Reader<'_>, count: usize, version: u32) -> Result<Self, Error> {
        // Every slot takes a byte at least, so a count that the bytes cannot hold is refused before memory is taken for it.
        if count > reader.left() {
            return Err(Problem::Truncated { needed: count as u64, left: reader.left() as u64 }.into());
        }
        let mut slots = Slots::empty(count);
        for index in 0..count {
            let element = match reader.byte() {
                Ok(b'0') => Ok(None),
                Ok(b'1') => T::load_fields(reader, version).map(Some),
                Ok(other) => Err(Problem::SlotMarker(other).into()),
                Err(error) => Err(error),
            };
            slots.put(index, element.map_err(|error| error.at_index(index))?);
        }
        Ok(slots)
    }

    fn describe(&self, name: &str, description: &mut Description) {
        for slot in self.iter() {
            description.plain(name, "ptr-marker", 1, 1);
            if let Some(element) = slot {
                description.structure(name, element);
            }
        }
    }

    fn schema(field: &mut FieldSchema) {
        field.structure(T::schema());
        field.plain("ptr-marker", 1);
    }
}

impl Counted for Bitmap {
    fn count(&self) -> usize {
        self.len()
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

    fn schema(field: &mut FieldSchema) {
        field.kind = "bitmap";
    }
}

/// Lists: `0x01` and an element, again and again; `0x00` ends.
pub mod list {
    use super::*;

    const ELEMENT: u8 = 0x01;
    const END: u8 = 0x00;

    /// Appends the list.
    pub fn save<T: Value>(list: &[T], out: &mut Vec<u8>) {
        for element in list {
            out.push(ELEMENT);
            element.save(out);
        }
        out.push(END);
    }

    /// Reads a list of at most `maximum` elements.
    pub fn load<T: Value>(reader: &mut Reader<'_>, maximum: usize, version: u32) -> Result<Vec<T>, Error> {
        let mut list = Vec::new();
        loop {
            match reader.byte()? {
                END => return Ok(list),
                ELEMENT if list.len() == maximum => return Err(Problem::ListTooLong { maximum }.into()),
                ELEMENT => list.push(T::load(reader, version).map_err(|error| error.at_index(list.len()))?),
                other => return Err(Error::from(Problem::ListMarker(other)).at_index(list.len())),
            }
        }
    }

    /// Adds an entry for each mark and each element.
    pub fn describe<T: Value>(list: &[T], name: &str, description: &mut Description) {
        for element in list {
            description.plain(name, "list-marker", 1, 1);
            element.describe(name, description);
        }
        description.plain(name, "list-marker", 1, 1);
    }

    /// Fills in what the type says of itself.
    pub fn schema<T: Value>(field: &mut FieldSchema) {
        T::schema(field);
        field.array_len = None;
        field.plain("list-marker", 1);
    }
}
