//! Optional parts of a struct that older readers may lack.
//!
//! On the wire: `0x05`, u8 length, name (`parent/part`), be32 version, the part's fields. A reader finds out whether one follows
//! by looking: the byte, a length that fits, and a name with the parent's prefix.

use crate::description::Description;
use crate::reader::Peek;
use crate::{Error, Problem, Reader, Value, VmState};

const MARK: u8 = 0x05;

/// Bytes before the part's fields: mark, length, name, version.
pub(crate) fn header_bytes<T: VmState>() -> usize {
    1 + 1 + T::NAME.len() + 4
}

/// Appends the part if it is there and needed.
pub fn save<T: VmState>(part: Option<&T>, needed: bool, out: &mut Vec<u8>) {
    if let Some(part) = part.filter(|_| needed) {
        out.push(MARK);
        out.push(T::NAME.len() as u8); // the derive limits names to 127 bytes
        out.extend_from_slice(T::NAME.as_bytes());
        T::VERSION.save(out);
        part.save_fields(out);
    }
}

/// Describes the part if it is there and needed.
pub fn describe<T: VmState>(part: Option<&T>, needed: bool, description: &mut Description) {
    if let Some(part) = part.filter(|_| needed) {
        description.subsection(part);
    }
}

/// The name of the subsection of `parent` that comes next, if one does. Reads nothing.
#[inline]
pub fn next<'a>(reader: &Reader<'a>, parent: &str) -> Result<Option<&'a [u8]>, Error> {
    // Every struct ends here, and few have a subsection.
    match reader.first() {
        Some(byte) if byte != MARK => Ok(None),
        _ => name_of_next(reader, parent),
    }
}

fn name_of_next<'a>(reader: &Reader<'a>, parent: &str) -> Result<Option<&'a [u8]>, Error> {
    let parent = parent.as_bytes();
    let mut length = 0;
    let header = reader.peek(|index, byte| {
        let wanted = match index {
            0 => byte == MARK,
            1 => {
                length = usize::from(byte);
                length > parent.len() + 1
            }
            _ => index - 2 > parent.len() || byte == *parent.get(index - 2).unwrap_or(&b'/'),
        };
        match wanted {
            false => Peek::Unwanted,
            true if index > 1 && index == length + 1 => Peek::Last,
            true => Peek::Next,
        }
    })?;
    Ok(header.and_then(|header| header.get(2..)))
}

/// Reads the part whose name [`next`] returned into its place.
pub fn load<T: VmState>(reader: &mut Reader<'_>, place: &mut Option<T>) -> Result<(), Error> {
    reader.take(2 + T::NAME.len())?;
    if place.is_some() {
        return Err(Problem::RepeatedSubsection(T::NAME).into());
    }
    let version = u32::load(reader, 0)?;
    *place = Some(crate::load_versioned(reader, version)?);
    Ok(())
}

/// The error for a subsection nobody knows.
pub fn unknown(name: &[u8]) -> Error {
    Problem::UnknownSubsection(String::from_utf8_lossy(name).into_owned()).into()
}

/// For the derive: whether `name` is `parent/something`.
pub const fn is_part_of(name: &str, parent: &str) -> bool {
    let (name, parent) = (name.as_bytes(), parent.as_bytes());
    if name.len() < parent.len() + 2 || name[parent.len()] != b'/' {
        return false;
    }
    let mut at = 0;
    while at < parent.len() {
        if name[at] != parent[at] {
            return false;
        }
        at += 1;
    }
    true
}

/// For the derive: whether two subsections have one name.
pub const fn is_same(name: &str, other: &str) -> bool {
    let (name, other) = (name.as_bytes(), other.as_bytes());
    let mut at = 0;
    while at < name.len() && at < other.len() && name[at] == other[at] {
        at += 1;
    }
    at == name.len() && at == other.len()
}

#[cfg(test)]
mod tests {
    use super::is_same;

    #[test]
    fn a_name_is_the_same_only_to_its_end() {
        assert!(is_same("parent/part", "parent/part"));
        for other in ["parent/part2", "parent/par", "parent/tart", ""] {
            assert!(!is_same("parent/part", other) && !is_same(other, "parent/part"), "{other}");
        }
    }
}
