//! Lists, which carry their own end: `0x01` and an element, again and again; `0x00` ends.

use crate::description::Description;
use crate::schema::{FieldSchema, Outer};
use crate::{Error, Problem, Reader, Value};

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
    while load_mark(reader).map_err(|error| error.at_index(list.len()))? {
        if list.len() == maximum {
            return Err(Problem::ListTooLong { maximum }.into());
        }
        if list.len() == list.capacity() {
            grow(&mut list, reader, maximum)?;
        }
        list.push(T::load(reader, version).map_err(|error| error.at_index(list.len()))?);
    }
    Ok(list)
}

/// Whether another element follows.
fn load_mark(reader: &mut Reader<'_>) -> Result<bool, Error> {
    match reader.byte()? {
        END => Ok(false),
        ELEMENT => Ok(true),
        other => Err(Problem::ListMarker(other).into()),
    }
}

/// Makes room for as many elements again, but for no more than the bytes left can hold.
fn grow<T: Value>(list: &mut Vec<T>, reader: &mut Reader<'_>, maximum: usize) -> Result<(), Error> {
    // The mark of the first has been read.
    let follow = reader.left().saturating_sub(T::LEAST_BYTES) / (1 + T::LEAST_BYTES) + 1;
    let (capacity, size) = (list.capacity(), size_of::<T>());
    let more = capacity.max(4).min(follow).min(maximum - list.len());
    // While the elements move, both places are there.
    reader.spend(capacity.saturating_add(more).saturating_mul(size))?;
    list.reserve_exact(more);
    reader.refund(capacity * size);
    Ok(())
}

/// Adds an entry for each mark and each element.
pub fn describe<T: Value>(list: &[T], name: &str, description: &mut Description) {
    for element in list {
        description.plain(name, "list-marker", 1, 1);
        element.describe(name, description);
    }
    description.plain(name, "list-marker", 1, 1);
}

/// Fills in what the type says of itself as a part of the structs `outer`.
pub fn schema<T: Value>(field: &mut FieldSchema, outer: &Outer<'_>) {
    let mut element = FieldSchema::default();
    T::schema(&mut element, outer);
    if element.kind == "struct" && element.array_len.is_none() {
        (field.structure, field.recursion) = (element.structure, element.recursion);
    } else {
        field.element = Some(Box::new(element));
    }
    field.plain("list-marker", 1);
}
