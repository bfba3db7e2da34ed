//! A stream as JSON, for programs. The keys are stable:
//!
//! ```text
//! { "sections": [{ "name", "instance_id", "version", "offset", "size", "state": STATE }],
//!   "configuration": { "machine", "capabilities" } or null,
//!   "ram": { "rounds", "pages_read": bool, "blocks": [{ "name", "length_bytes", "pages", "zero_pages" }] },
//!   "commands": [{ "kind", "count" }], "verified": bool, "error": text or null }
//! STATE: { "vmsd_name", "version", "fields": [{ "name", "type", "offset", "value": VALUE }], "subsections": [STATE] }
//! VALUE: a number or a bool; a buffer is { "hex" }, with "text" if it holds nothing else; a bitmap is { "bits", "set": [number] };
//!        elements are a list, slots a list with null for the empty ones; a struct is a STATE
//! ```
//!
//! `pages_read` is false if RAM lies beside the sections and was left there, so that `verified` does not speak of it.
//! Sections are written while the file is read, so nothing of them is kept.

use std::cell::RefCell;
use std::io::Write;

use anyhow::{Context, ensure};
use serde::ser::{Error as _, SerializeMap, SerializeSeq};
use serde::{Serialize, Serializer};
use serde_json::json;
use stream::ReadAt;
use stream::described::{Described, Field, Value, set_bits};

use super::text::{Name, as_text, hex};
use super::{Contents, Input, Section, Visitor};

/// Values of one section.
pub(super) const VALUES_MAX: usize = 4 << 20;

/// Writes what is in a file; sections that `wanted` refuses are left out. `wants_pages`: RAM is read even where it could be left out. An error of the
/// file is told in the document, and returned.
///
/// # Errors
/// The file is not what its description says, or `out` fails.
pub fn write<R: ReadAt>(
    input: &Input<R>,
    mut out: impl Write,
    wanted: impl Fn(&str) -> bool,
    wants_pages: bool,
) -> anyhow::Result<Contents> {
    write!(out, "{{\"sections\":[")?;
    let mut sections = Sections { out: &mut out, wanted, wants_pages, is_first: true };
    let (contents, result) = input.walk(&mut sections);
    let blocks: Vec<_> = contents.blocks.iter().map(|block| {
        json!({ "name": block.name, "length_bytes": block.length_bytes, "pages": block.pages, "zero_pages": block.zero_pages })
    }).collect();
    let configuration = contents.configuration.as_ref().map(
        |configuration| json!({ "machine": configuration.machine, "capabilities": configuration.capabilities }),
    );
    let commands: Vec<_> =
        contents.commands.iter().map(|(kind, count)| json!({ "kind": kind, "count": count })).collect();
    let error = result.as_ref().err().map(|error| format!("{error:#}"));
    writeln!(
        out,
        "],\"configuration\":{},\"ram\":{},\"commands\":{},\"verified\":{},\"error\":{}}}",
        json!(configuration),
        json!({ "rounds": contents.rounds, "blocks": blocks, "pages_read": !contents.are_pages_unread }),
        json!(commands),
        contents.verified,
        json!(error)
    )?;
    out.flush()?;
    result.map(|()| contents)
}

struct Sections<W, F> {
    out: W,
    wanted: F,
    wants_pages: bool,
    is_first: bool,
}

impl<W: Write, F: Fn(&str) -> bool> Visitor for Sections<W, F> {
    fn wants_pages(&self) -> bool {
        self.wants_pages
    }

    fn section(&mut self, section: &Section<'_>) -> anyhow::Result<()> {
        if !(self.wanted)(section.name) {
            return Ok(());
        }
        // A section that does not fit its description would leave half a document: it is looked through first.
        Check::default().state(&section.state).with_context(|| format!("section {:?}", section.name))?;
        if !std::mem::take(&mut self.is_first) {
            write!(self.out, ",")?;
        }
        serde_json::to_writer(&mut self.out, &Whole(section)).context("cannot write a section")
    }
}

/// Makes sure that all of a state can be read, and that it has an end.
#[derive(Default)]
struct Check {
    values: usize,
}

impl Check {
    fn state(&mut self, state: &Described<'_>) -> anyhow::Result<()> {
        for Field { name, value, .. } in state.fields()? {
            self.value(&value).with_context(|| Name(name).to_string())?;
        }
        let mut parts = state.subsections()?.into_iter();
        parts.try_for_each(|part| self.state(&part).with_context(|| Name(part.name()).to_string()))
    }

    fn value(&mut self, value: &Value<'_>) -> anyhow::Result<()> {
        self.values += 1;
        ensure!(self.values <= VALUES_MAX, "there are more than {VALUES_MAX} values");
        match value {
            Value::Struct(inner) => self.state(inner),
            Value::Array(array) | Value::List(array) => {
                (0..array.count()).try_for_each(|index| self.value(&array.get(index)?))
            }
            Value::Elements(elements) => elements.iter().try_for_each(|element| self.value(element)),
            Value::Slots(slots) => slots.iter().flatten().try_for_each(|element| self.value(element)),
            Value::Bool(_) | Value::Unsigned(_) | Value::Signed(_) | Value::Bytes(_) | Value::Bitmap(_) => {
                Ok(())
            }
        }
    }
}

struct Whole<'a>(&'a Section<'a>);

impl Serialize for Whole<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Section { name, instance_id, version, state, .. } = self.0;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("name", name)?;
        map.serialize_entry("instance_id", instance_id)?;
        map.serialize_entry("version", version)?;
        map.serialize_entry("offset", &state.offset())?;
        map.serialize_entry("size", &state.bytes().len())?;
        map.serialize_entry("state", &State(state))?;
        map.end()
    }
}

struct State<'a>(&'a Described<'a>);

impl Serialize for State<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let fields = self.0.fields().map_err(S::Error::custom)?;
        let parts = self.0.subsections().map_err(S::Error::custom)?;
        let mut map = serializer.serialize_map(None)?;
        map.serialize_entry("vmsd_name", self.0.name())?;
        map.serialize_entry("version", &self.0.version())?;
        map.serialize_entry("fields", &List::new(fields.iter().map(One)))?;
        map.serialize_entry("subsections", &List::new(parts.iter().map(State)))?;
        map.end()
    }
}

struct One<'a>(&'a Field<'a>);

impl Serialize for One<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Field { name, kind, offset, value } = self.0;
        let mut map = serializer.serialize_map(Some(4))?;
        map.serialize_entry("name", name)?;
        map.serialize_entry("type", kind)?;
        map.serialize_entry("offset", offset)?;
        map.serialize_entry("value", &Plain(value))?;
        map.end()
    }
}

struct Plain<'a>(&'a Value<'a>);

impl Serialize for Plain<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            Value::Bool(value) => value.serialize(serializer),
            Value::Unsigned(value) => value.serialize(serializer),
            Value::Signed(value) => value.serialize(serializer),
            Value::Bytes(bytes) => {
                let mut map = serializer.serialize_map(None)?;
                map.serialize_entry("hex", &hex(bytes))?;
                if let Some(text) = as_text(bytes) {
                    map.serialize_entry("text", text)?;
                }
                map.end()
            }
            Value::Bitmap(words) => {
                let mut map = serializer.serialize_map(Some(2))?;
                map.serialize_entry("bits", &(words.len() * 8))?;
                map.serialize_entry("set", &List::new(set_bits(words)))?;
                map.end()
            }
            Value::Struct(inner) => State(inner).serialize(serializer),
            Value::Array(array) | Value::List(array) => {
                let mut list = serializer.serialize_seq(Some(array.count()))?;
                for index in 0..array.count() {
                    list.serialize_element(&Plain(&array.get(index).map_err(S::Error::custom)?))?;
                }
                list.end()
            }
            Value::Elements(elements) => List::new(elements.iter().map(Plain)).serialize(serializer),
            Value::Slots(slots) => {
                List::new(slots.iter().map(|slot| slot.as_ref().map(Plain))).serialize(serializer)
            }
        }
    }
}

/// A list that is made while it is written.
struct List<I>(RefCell<Option<I>>);

impl<I> List<I> {
    fn new(items: I) -> Self {
        Self(RefCell::new(Some(items)))
    }
}

impl<I: Iterator<Item: Serialize>> Serialize for List<I> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let items = self.0.take().ok_or_else(|| S::Error::custom("a list that was written before"))?;
        serializer.collect_seq(items)
    }
}
