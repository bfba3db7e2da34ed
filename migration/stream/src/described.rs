//! A state read by its description: the values of a section, whoever wrote it.
//!
//! A description is what the trailer says of a device (or of a struct inside): entries with a name, a type and a size, in the order
//! of the bytes. [`Described`] holds one beside its bytes and expands one level of it at a time, so that reading takes memory for
//! the entries on the way to a value, whatever they claim. Everything is compared before it is believed: the sizes of all entries
//! must add up to the bytes there are, slots and lists must be laid out as their entries say, subsections must have the names that
//! the description gives. What does not fit is an error with the offset of the byte where it is seen.

use crate::description::{Node, Nodes};
use crate::{Error, trailer};

/// Levels of structs and lists that are followed.
const DEPTH_MAX: u32 = 32;
/// The longest name of a field or a type.
const NAME_BYTES_MAX: usize = 255;

const SLOT_TYPE: &str = "ptr-marker";
const LIST_TYPE: &str = "list-marker";
/// QEMU's lists: one entry for all of it.
const QUEUE_TYPE: &str = "qtailq";

/// A struct with its bytes.
#[derive(Debug, Clone, Copy)]
pub struct Described<'a> {
    description: Node<'a>,
    bytes: &'a [u8],
    offset: u64,
    depth: u32,
}

/// One field of a struct.
#[derive(Debug, Clone)]
pub struct Field<'a> {
    /// As the description has it.
    pub name: &'a str,
    /// The type's name in the description, for example `uint32`, `buffer` or `struct`.
    pub kind: &'a str,
    /// Where its bytes begin.
    pub offset: u64,
    /// What they say.
    pub value: Value<'a>,
}

/// What the bytes of a field, an element or a slot say.
#[derive(Debug, Clone)]
pub enum Value<'a> {
    /// A bool.
    Bool(bool),
    /// An unsigned integer of any size.
    Unsigned(u64),
    /// A signed integer of any size, or a point in time in nanoseconds.
    Signed(i64),
    /// A buffer, or a type that only its writer knows.
    Bytes(&'a [u8]),
    /// Words of 64 bits; [`set_bits`] reads them.
    Bitmap(&'a [u8]),
    /// A struct.
    Struct(Described<'a>),
    /// Elements that are laid out alike, back to back.
    Array(Array<'a>),
    /// The elements of one of QEMU's lists: laid out alike, behind a mark each.
    List(Array<'a>),
    /// Elements with layouts of their own: a list, or an array of structs that have subsections.
    Elements(Vec<Value<'a>>),
    /// A sparse array, slot by slot.
    Slots(Vec<Option<Value<'a>>>),
}

/// Elements that are laid out alike.
#[derive(Debug, Clone, Copy)]
pub struct Array<'a> {
    entry: Node<'a>,
    inside: Inside<'a>,
    bytes: &'a [u8],
    element_bytes: usize,
    offset: u64,
    depth: u32,
    /// Each starts with a byte of its own.
    is_marked: bool,
}

/// What the elements of an entry are, measured once for all of them: a description can have many entries without a byte.
#[derive(Debug, Clone, Copy)]
enum Inside<'a> {
    /// Nothing that has fields.
    Plain,
    /// A struct, and the bytes that its description adds up to.
    Struct(Node<'a>, u64),
    /// A container that only QEMU has: the entry is a description too, of the last of its elements. What they add up to, if they do.
    Container(Option<u64>),
}

impl<'a> Inside<'a> {
    fn of(entry: Node<'a>) -> Result<Self, Error> {
        Ok(match (entry.get("struct"), entry.get("fields")) {
            (Some(inner), _) => Inside::Struct(inner, trailer::state_bytes(inner)?),
            (None, Some(_)) => Inside::Container(trailer::state_bytes(entry).ok()),
            (None, None) => Inside::Plain,
        })
    }
}

/// Elements of a list that take fewer bytes, marks included, are shown as bytes: there would be more to read than they say.
const QUEUE_ELEMENT_BYTES_MIN: usize = 4;

impl<'a> Described<'a> {
    /// A state whose first byte is at `offset` of whatever the errors shall speak of.
    ///
    /// # Errors
    ///
    /// If the description is none, or does not have as many bytes as there are.
    pub fn new(description: Node<'a>, bytes: &'a [u8], offset: u64) -> Result<Self, Error> {
        Self::measured(description, trailer::state_bytes(description)?, bytes, offset, 1)
    }

    /// The same inside of others; the description adds up to `described` bytes.
    fn measured(
        description: Node<'a>,
        described: u64,
        bytes: &'a [u8],
        offset: u64,
        depth: u32,
    ) -> Result<Self, Error> {
        let this = Described { description, bytes, offset, depth };
        check_depth(depth, offset)?;
        if described != bytes.len() as u64 {
            let (name, there) = (this.name(), bytes.len());
            return Err(unfit(
                offset,
                format!("{described} bytes of {name:?} are described, but there are {there}"),
            ));
        }
        Ok(this)
    }

    /// The description's name; empty if it has none.
    pub fn name(&self) -> &'a str {
        self.description.text("vmsd_name").filter(|name| name.len() <= NAME_BYTES_MAX).unwrap_or_default()
    }

    /// The description's version, if it says one.
    pub fn version(&self) -> Option<u64> {
        self.description.number("version")
    }

    /// The bytes of it all.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Where they begin.
    pub fn offset(&self) -> u64 {
        self.offset
    }

    /// The fields, in the order of the bytes.
    ///
    /// # Errors
    ///
    /// If the bytes are not what the entries say.
    pub fn fields(&self) -> Result<Vec<Field<'a>>, Error> {
        self.cursor().fields(self.entries()?)
    }

    /// The subsections that are there.
    ///
    /// # Errors
    ///
    /// If the bytes are not what the description says.
    pub fn subsections(&self) -> Result<Vec<Described<'a>>, Error> {
        let mut cursor = self.cursor();
        for entry in self.entries()? {
            cursor.take(entry_bytes(entry, &cursor)?, "a field")?;
        }
        let mut parts = Vec::new();
        for part in self.description.list("subsections").into_iter().flatten() {
            let name = text(part, "vmsd_name", &cursor)?;
            let version = part.number("version").and_then(|version| u32::try_from(version).ok());
            let version =
                version.ok_or_else(|| cursor.unfit(format!("subsection {name:?} has no version")))?;
            let mut header = vec![0x05, name.len() as u8]; // names are bounded
            header.extend(name.bytes());
            header.extend(version.to_be_bytes());
            let start = cursor.offset;
            if cursor.take(header.len() as u64, "the head of a subsection")? != header {
                return Err(unfit(start, format!("subsection {name:?} v{version} does not begin here")));
            }
            let offset = cursor.offset;
            let described = trailer::state_bytes(part)?;
            let bytes = cursor.take(described, name)?;
            parts.push(Self::measured(part, described, bytes, offset, self.depth + 1)?);
        }
        Ok(parts)
    }

    fn entries(&self) -> Result<Nodes<'a>, Error> {
        self.description
            .list("fields")
            .ok_or_else(|| unfit(self.offset, format!("{:?} has no fields", self.name())))
    }

    fn cursor(&self) -> Cursor<'a> {
        Cursor { rest: self.bytes, offset: self.offset, depth: self.depth }
    }
}

impl<'a> Array<'a> {
    /// The number of elements, at least 1.
    pub fn count(&self) -> usize {
        self.bytes.len() / self.element_bytes.max(1)
    }

    /// The bytes of element `index`, its mark included; empty if there is none.
    pub fn element_bytes(&self, index: usize) -> &'a [u8] {
        let start = index.saturating_mul(self.element_bytes);
        self.bytes.get(start..start.saturating_add(self.element_bytes)).unwrap_or_default()
    }

    /// Element `index`.
    ///
    /// # Errors
    ///
    /// If its bytes are not what the description says, or there is no such element.
    pub fn get(&self, index: usize) -> Result<Value<'a>, Error> {
        let start = index.saturating_mul(self.element_bytes);
        let offset = self.offset.saturating_add(start as u64);
        match self.element_bytes(index) {
            [_mark, bytes @ ..] if self.is_marked => {
                let (description, depth) = (self.entry, self.depth + 1);
                // Its length is right: the description was measured once for all of them.
                Ok(Value::Struct(Described { description, bytes, offset: offset.saturating_add(1), depth }))
            }
            [] => Err(unfit(offset, format!("there is no element {index} of {}", self.count()))),
            bytes => decode(self.entry, self.inside, bytes, offset, self.depth),
        }
    }
}

/// The numbers of the bits that are set in a bitmap, in order: bit 0 is the lowest of the first word.
pub fn set_bits(bitmap: &[u8]) -> impl Iterator<Item = usize> {
    let words = bitmap.as_chunks::<8>().0.iter().map(|word| u64::from_be_bytes(*word)).enumerate();
    words.flat_map(|(index, word)| {
        (0..64).filter(move |bit| word >> bit & 1 == 1).map(move |bit| index * 64 + bit)
    })
}

/// The bytes that follow, of a struct.
struct Cursor<'a> {
    rest: &'a [u8],
    offset: u64,
    depth: u32,
}

impl<'a> Cursor<'a> {
    fn unfit(&self, why: String) -> Error {
        unfit(self.offset, why)
    }

    fn take(&mut self, count: u64, what: &str) -> Result<&'a [u8], Error> {
        let split = usize::try_from(count).ok().and_then(|count| self.rest.split_at_checked(count));
        let (taken, rest) = split.ok_or_else(|| {
            let (what, left) = (what.escape_debug(), self.rest.len());
            self.unfit(format!("{what} has {count} bytes, but {left} are left"))
        })?;
        self.rest = rest;
        self.offset = self.offset.saturating_add(count);
        Ok(taken)
    }

    /// What the entries of a struct, or of a part of it, say.
    fn fields(&mut self, mut entries: Nodes<'a>) -> Result<Vec<Field<'a>>, Error> {
        let mut fields = Vec::with_capacity(entries.len());
        while let Some(entry) = entries.first() {
            let (name, kind) = (text(entry, "name", self)?, text(entry, "type", self)?);
            let offset = self.offset;
            let value = if kind == SLOT_TYPE {
                self.slots(&mut entries, name)?
            } else if kind == LIST_TYPE {
                self.list(&mut entries, name)?
            } else if entry.number("index") == Some(0) {
                self.indexed(&mut entries, name)?
            } else {
                entries.next();
                self.value(entry, name)?
            };
            fields.push(Field { name, kind, offset, value });
        }
        Ok(fields)
    }

    /// The value of one entry.
    fn value(&mut self, entry: Node<'a>, name: &str) -> Result<Value<'a>, Error> {
        let offset = self.offset;
        let total = entry_bytes(entry, self)?;
        let bytes = self.take(total, name)?;
        match entry.number("array_len") {
            None | Some(1) => decode(entry, Inside::of(entry)?, bytes, offset, self.depth),
            Some(0) => Ok(Value::Elements(Vec::new())),
            Some(count) => {
                let element_bytes = bytes.len() as u64 / count; // the sum of bytes is below 64 bits
                if element_bytes == 0 {
                    let name = name.escape_debug();
                    return Err(unfit(offset, format!("{name} has {count} elements without a byte")));
                }
                let element_bytes = element_bytes as usize; // no more than `bytes` has
                Ok(Value::Array(Array {
                    entry,
                    inside: Inside::of(entry)?,
                    bytes,
                    element_bytes,
                    offset,
                    depth: self.depth,
                    is_marked: false,
                }))
            }
        }
    }

    /// A sparse array: a marker per slot, and what is in the slot. Takes the entries of all of it.
    fn slots(&mut self, entries: &mut Nodes<'a>, name: &str) -> Result<Value<'a>, Error> {
        let mut slots = Vec::new();
        while let Some(entry) = entries.first().filter(|entry| is(*entry, name, Some(SLOT_TYPE))) {
            let present = match self.marker(entry, name)? {
                b'0' => false,
                b'1' => true,
                marker => {
                    let (name, index) = (name.escape_debug(), slots.len());
                    return Err(self.before(format!("{name}[{index}] is marked {marker:#04x}")));
                }
            };
            entries.next();
            let element = entries.first().filter(|entry| is(*entry, name, None));
            match (present, element) {
                (true, Some(element)) => {
                    slots.push(Some(self.value(element, name)?));
                    entries.next();
                }
                (false, None) => slots.push(None),
                (true, None) => {
                    let (name, index) = (name.escape_debug(), slots.len());
                    return Err(
                        self.before(format!("{name}[{index}] is marked present, but described as empty"))
                    );
                }
                (false, Some(_)) => {
                    let (name, index) = (name.escape_debug(), slots.len());
                    return Err(
                        self.before(format!("{name}[{index}] is marked empty, but described as present"))
                    );
                }
            }
        }
        Ok(Value::Slots(slots))
    }

    /// A list of ours: a marker and the entries of an element each, and a marker at the end.
    fn list(&mut self, entries: &mut Nodes<'a>, name: &str) -> Result<Value<'a>, Error> {
        let mut elements = Vec::new();
        while let Some(entry) = entries.first().filter(|entry| is(*entry, name, Some(LIST_TYPE))) {
            let marker = self.marker(entry, name)?;
            entries.next();
            match (marker, entries.first()) {
                (0x00, next) if next.is_none_or(|next| next.text("name") != Some(name)) => {
                    return Ok(Value::Elements(elements));
                }
                (0x01, Some(_)) => {
                    // Looked for only where there is an element, so that no entry is looked at twice on one level.
                    let element = entries.take_before(|entry| is(entry, name, Some(LIST_TYPE)));
                    let element = element.ok_or_else(|| self.endless(name))?;
                    elements.push(self.element(element)?);
                }
                _ => {
                    let (name, index) = (name.escape_debug(), elements.len());
                    return Err(self
                        .before(format!("{name}[{index}] is marked {marker:#04x}, unlike its description")));
                }
            }
        }
        Err(self.endless(name))
    }

    fn endless(&self, name: &str) -> Error {
        self.unfit(format!("the list {} has no end", name.escape_debug()))
    }

    /// An element of a list: mostly one entry, but an array has as many as its elements differ. Lists in lists are told apart by
    /// their names alone and take no levels of the JSON, so they are counted like structs.
    fn element(&mut self, entries: Nodes<'a>) -> Result<Value<'a>, Error> {
        check_depth(self.depth + 1, self.offset)?;
        self.depth += 1;
        let parts = self.fields(entries);
        self.depth -= 1;
        let mut parts = parts?;
        match (parts.pop(), parts.is_empty()) {
            (Some(only), true) => Ok(only.value),
            (last, _) => Ok(Value::Elements(parts.into_iter().chain(last).map(|part| part.value).collect())),
        }
    }

    /// Elements that have an entry each.
    fn indexed(&mut self, entries: &mut Nodes<'a>, name: &str) -> Result<Value<'a>, Error> {
        let mut elements = Vec::new();
        let is_next =
            |entry: &Node<'a>, index| is(*entry, name, None) && entry.number("index") == Some(index as u64);
        while let Some(entry) = entries.first().filter(|entry| is_next(entry, elements.len())) {
            elements.push(self.value(entry, name)?);
            entries.next();
        }
        Ok(Value::Elements(elements))
    }

    fn marker(&mut self, entry: Node<'_>, name: &str) -> Result<u8, Error> {
        match (entry_bytes(entry, self)?, self.take(1, name)?) {
            (1, [marker]) => Ok(*marker),
            (size, _) => {
                let name = name.escape_debug();
                Err(self.before(format!("a marker of {name} has {size} bytes")))
            }
        }
    }

    /// An error about the byte before.
    fn before(&self, why: String) -> Error {
        unfit(self.offset.saturating_sub(1), why)
    }
}

/// Refuses what lies deeper than is followed: every level takes some of the stack.
fn check_depth(depth: u32, offset: u64) -> Result<(), Error> {
    match depth > DEPTH_MAX {
        true => {
            Err(unfit(offset, format!("there are more than {DEPTH_MAX} structs and lists in each other")))
        }
        false => Ok(()),
    }
}

/// Whether an entry is one of `name`: a marker of this type, or something that is no marker.
fn is(entry: Node<'_>, name: &str, marker: Option<&str>) -> bool {
    let kind = entry.text("type").unwrap_or_default();
    let kind = Some(kind).filter(|kind| [SLOT_TYPE, LIST_TYPE].contains(kind));
    entry.text("name") == Some(name) && kind == marker
}

/// The bytes of an entry with all its elements.
fn entry_bytes(entry: Node<'_>, at: &Cursor<'_>) -> Result<u64, Error> {
    let size = entry.number("size").ok_or_else(|| at.unfit("a field has no size".into()))?;
    let count = entry.number("array_len").unwrap_or(1);
    size.checked_mul(count).ok_or_else(|| at.unfit(format!("{count} elements of {size} bytes")))
}

fn text<'a>(entry: Node<'a>, key: &str, at: &Cursor<'_>) -> Result<&'a str, Error> {
    match entry.text(key) {
        Some(text) if text.len() <= NAME_BYTES_MAX => Ok(text),
        Some(text) => Err(at.unfit(format!("a {key} has {} bytes", text.len()))),
        None => Err(at.unfit(format!("an entry has no {key}"))),
    }
}

/// One element of an entry.
fn decode<'a>(
    entry: Node<'a>,
    inside: Inside<'a>,
    bytes: &'a [u8],
    offset: u64,
    depth: u32,
) -> Result<Value<'a>, Error> {
    let kind = entry.text("type").unwrap_or_default();
    let structure = |description, described| {
        Described::measured(description, described, bytes, offset, depth + 1).map(Value::Struct)
    };
    match inside {
        Inside::Struct(inner, described) => return structure(inner, described),
        Inside::Container(described) => {
            let inner = described.and_then(|described| match kind {
                QUEUE_TYPE => queue(entry, described, bytes, offset, depth),
                _ => structure(entry, described).ok(),
            });
            return Ok(inner.unwrap_or(Value::Bytes(bytes)));
        }
        Inside::Plain => {}
    }
    // `uint8 equal`: the loader compares. `int32 le`: it accepts no more than its own. Their bytes are those of the plain type.
    let plain = kind.strip_suffix(" equal").or_else(|| kind.strip_suffix(" le")).unwrap_or(kind);
    Ok(match (plain, bytes) {
        ("bool", [0]) => Value::Bool(false),
        ("bool", [1]) => Value::Bool(true),
        ("bool", [other]) => return Err(unfit(offset, format!("{other:#04x} is not a bool"))),
        ("uint8", [_])
        | ("uint16", [_, _])
        | ("uint32", [_, _, _, _])
        | ("uint64", [_, _, _, _, _, _, _, _]) => {
            Value::Unsigned(bytes.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
        }
        ("int8", [_])
        | ("int16", [_, _])
        | ("int32", [_, _, _, _])
        | ("int64" | "timer", [_, _, _, _, _, _, _, _]) => {
            // The first byte carries the sign.
            let start = if bytes.first().is_some_and(|byte| *byte >= 0x80) { -1 } else { 0 };
            Value::Signed(bytes.iter().fold(start, |value, byte| value << 8 | i64::from(*byte)))
        }
        ("bitmap", words) if words.len() % 8 == 0 => Value::Bitmap(words),
        (QUEUE_TYPE, [0]) => Value::Elements(Vec::new()),
        _ => Value::Bytes(bytes),
    })
}

/// The elements of one of QEMU's lists, if all are laid out like the last, which adds up to `described` bytes: a mark and an element
/// each, and a mark at the end.
fn queue<'a>(entry: Node<'a>, described: u64, bytes: &'a [u8], offset: u64, depth: u32) -> Option<Value<'a>> {
    let (0x00, pieces) = bytes.split_last()? else { return None };
    let length = usize::try_from(described).ok()?.checked_add(1)?;
    if length < QUEUE_ELEMENT_BYTES_MIN || depth >= DEPTH_MAX || !pieces.len().is_multiple_of(length) {
        return None;
    }
    let is_marked = pieces.chunks(length).all(|piece| piece.first() == Some(&0x01));
    is_marked.then_some(Value::List(Array {
        entry,
        inside: Inside::Container(Some(described)),
        bytes: pieces,
        element_bytes: length,
        offset,
        depth,
        is_marked,
    }))
}

fn unfit(offset: u64, why: String) -> Error {
    Error::Unfit { offset, why }
}

#[cfg(test)]
mod tests;
