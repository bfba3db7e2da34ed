//! A description as it stands in a trailer: JSON that others wrote, held in little more memory than its text.
//!
//! A tree of `serde_json::Value` takes up to a hundred times its text: `{"":0},` is a map with a node of its own. Here every value
//! is one [`Compact`] of 16 bytes, in the order of the text, and all texts stand in one string. The shortest value has two bytes
//! (`0,`), so nine times the text are enough for everything; `tests/memory.rs` counts it. Both are counted in a first pass and
//! allocated once.
//!
//! Bounds: [`TEXT_BYTES_MAX`] of text, 128 levels (`serde_json`'s own), and [`MEMBERS_MAX`] keys in an object, so that a key is found
//! in few steps however often an entry is looked at. Nothing else is required of the JSON; who looks for a key must expect that it is
//! not there, or is another type.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeSeed, Error as _, MapAccess, SeqAccess, Visitor};
use serde::{Deserializer, Serialize, Serializer};

/// The longest text.
const TEXT_BYTES_MAX: usize = 16 << 20;
/// Keys of one object. Descriptions have fewer than ten.
const MEMBERS_MAX: usize = 64;
/// The key of the list of devices in a trailer.
const DEVICES: &str = "devices";
/// What [`Description::into_trailer`] puts in front.
const HEAD_VALUES: usize = 3;

/// JSON that says what the bytes of sections mean.
#[derive(Debug, Default)]
pub struct Description {
    values: Vec<Compact>,
    texts: String,
}

/// One value. The values inside follow it: `span` of them, those inside of these included.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Compact {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text {
        start: u32,
        length: u32,
    },
    List {
        span: u32,
        count: u32,
    },
    /// Keys, which are texts, and values by turns.
    Object {
        span: u32,
    },
}

const _: () = assert!(size_of::<Compact>() == 16);

/// One value of a [`Description`], with all that is inside.
#[derive(Clone, Copy)]
pub struct Node<'a> {
    whole: &'a Description,
    at: u32,
}

/// Values of a list, in order.
#[derive(Debug, Clone)]
pub struct Nodes<'a> {
    rest: Node<'a>,
    left: u32,
}

impl Description {
    /// Reads JSON.
    ///
    /// # Errors
    ///
    /// If it is none, or not within the bounds of this module.
    pub fn parse(text: &[u8]) -> Result<Self, serde_json::Error> {
        if text.len() > TEXT_BYTES_MAX {
            return Err(serde_json::Error::custom(format!("more than {TEXT_BYTES_MAX} bytes")));
        }
        let mut size = Builder::default();
        size.read(text)?;
        let mut builder = Builder {
            kept: Some(Description {
                values: Vec::with_capacity(size.values + HEAD_VALUES),
                texts: String::with_capacity(size.text_bytes + DEVICES.len()),
            }),
            ..Builder::default()
        };
        builder.read(text)?;
        Ok(builder.kept.unwrap_or_default())
    }

    /// The outermost value.
    pub fn root(&self) -> Node<'_> {
        Node { whole: self, at: 0 }
    }

    /// A trailer with this device alone, unless it is a trailer already.
    #[must_use]
    pub fn into_trailer(mut self) -> Self {
        if self.root().get(DEVICES).is_some() {
            return self;
        }
        let (start, length) = (self.texts.len() as u32, DEVICES.len() as u32); // the text is bounded
        let span = self.values.len() as u32;
        let head = [
            Compact::Object { span: span + 2 },
            Compact::Text { start, length },
            Compact::List { span, count: 1 },
        ];
        self.texts.push_str(DEVICES);
        self.values.splice(0..0, head); // there is room
        self
    }

    fn compact(&self, at: u32) -> Compact {
        self.values.get(at as usize).copied().unwrap_or(Compact::Null)
    }
}

impl<'a> Node<'a> {
    /// The value of a key; the last if there are several. `None` if there is none, or this is no object.
    pub fn get(self, key: &str) -> Option<Node<'a>> {
        self.pairs().filter(|(name, _)| *name == key).last().map(|(_, value)| value)
    }

    /// The text of a key.
    pub fn text(self, key: &str) -> Option<&'a str> {
        self.get(key)?.as_text()
    }

    /// The number of a key, if it is an integer that is not negative.
    pub fn number(self, key: &str) -> Option<u64> {
        match self.get(key)?.compact() {
            Compact::Unsigned(number) => Some(number),
            _ => None,
        }
    }

    /// The list of a key.
    pub fn list(self, key: &str) -> Option<Nodes<'a>> {
        let list = self.get(key)?;
        match list.compact() {
            Compact::List { count, .. } => Some(Nodes { rest: list.behind(1), left: count }),
            _ => None,
        }
    }

    /// The values of an object by their keys.
    pub fn members(self) -> BTreeMap<&'a str, Node<'a>> {
        self.pairs().collect()
    }

    fn as_text(self) -> Option<&'a str> {
        match self.compact() {
            Compact::Text { start, length } => {
                let start = start as usize;
                self.whole.texts.get(start..start + length as usize)
            }
            _ => None,
        }
    }

    /// Keys and values in the order of the text.
    fn pairs(self) -> impl Iterator<Item = (&'a str, Node<'a>)> {
        let span = match self.compact() {
            Compact::Object { span } => span,
            _ => 0,
        };
        let (mut key, end) = (self.behind(1), self.at.saturating_add(span));
        std::iter::from_fn(move || {
            let pair = (key.at <= end).then(|| (key.as_text().unwrap_or_default(), key.behind(1)))?;
            key = pair.1.next();
            Some(pair)
        })
    }

    fn compact(self) -> Compact {
        self.whole.compact(self.at)
    }

    /// Values inside.
    fn span(self) -> u32 {
        match self.compact() {
            Compact::List { span, .. } | Compact::Object { span } => span,
            _ => 0,
        }
    }

    fn behind(self, count: u32) -> Self {
        Node { at: self.at.saturating_add(count), ..self }
    }

    /// What follows it.
    fn next(self) -> Self {
        self.behind(1).behind(self.span())
    }
}

/// The same values in the same order, whatever is around them.
impl PartialEq for Node<'_> {
    fn eq(&self, other: &Self) -> bool {
        let alike = |by: u32| {
            let (ours, theirs) = (self.behind(by), other.behind(by));
            match (ours.as_text(), theirs.as_text()) {
                (None, None) => ours.compact() == theirs.compact(),
                (ours, theirs) => ours == theirs,
            }
        };
        (0..=self.span()).all(alike)
    }
}

impl fmt::Debug for Node<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} at {}", self.compact(), self.at)
    }
}

impl<'a> Nodes<'a> {
    /// The next one, which stays.
    pub fn first(&self) -> Option<Node<'a>> {
        (self.left > 0).then_some(self.rest)
    }

    /// Takes those before the first that `is_end`; `None`, and nothing is taken, if there is no such.
    pub fn take_before(&mut self, is_end: impl Fn(Node<'a>) -> bool) -> Option<Nodes<'a>> {
        let (mut before, mut rest) = (Nodes { left: 0, ..*self }, self.clone());
        while !is_end(rest.first()?) {
            rest.next();
            before.left += 1;
        }
        *self = rest;
        Some(before)
    }
}

impl<'a> Iterator for Nodes<'a> {
    type Item = Node<'a>;

    fn next(&mut self) -> Option<Node<'a>> {
        let first = self.first()?;
        (self.rest, self.left) = (first.next(), self.left - 1);
        Some(first)
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}

impl ExactSizeIterator for Nodes<'_> {}

/// Keys in the order of the alphabet.
impl Serialize for Node<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.compact() {
            Compact::Null => serializer.serialize_unit(),
            Compact::Bool(value) => serializer.serialize_bool(value),
            Compact::Unsigned(value) => serializer.serialize_u64(value),
            Compact::Signed(value) => serializer.serialize_i64(value),
            Compact::Float(value) => serializer.serialize_f64(value),
            Compact::Text { .. } => serializer.serialize_str(self.as_text().unwrap_or_default()),
            Compact::List { count, .. } => {
                serializer.collect_seq(Nodes { rest: self.behind(1), left: count })
            }
            Compact::Object { .. } => serializer.collect_map(self.members()),
        }
    }
}

impl Serialize for Description {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.root().serialize(serializer)
    }
}

/// Counts values and texts, and keeps them where there is room for them.
#[derive(Default)]
struct Builder {
    values: usize,
    text_bytes: usize,
    kept: Option<Description>,
}

impl Builder {
    fn read(&mut self, text: &[u8]) -> Result<(), serde_json::Error> {
        let mut deserializer = serde_json::Deserializer::from_slice(text);
        One(self).deserialize(&mut deserializer)?;
        deserializer.end()
    }

    /// Returns its number.
    fn add(&mut self, value: Compact) -> usize {
        if let Some(kept) = &mut self.kept {
            kept.values.push(value);
        }
        self.values += 1;
        self.values - 1
    }

    fn add_text(&mut self, text: &str) {
        let (start, length) = (self.text_bytes as u32, text.len() as u32); // the whole is bounded
        self.add(Compact::Text { start, length });
        if let Some(kept) = &mut self.kept {
            kept.texts.push_str(text);
        }
        self.text_bytes += text.len();
    }

    /// Notes how many values are inside of value number `at`, now that they are.
    fn close(&mut self, at: usize, value: impl FnOnce(u32) -> Compact) {
        let span = (self.values - at - 1) as u32; // no more than the text has bytes
        if let Some(open) = self.kept.as_mut().and_then(|kept| kept.values.get_mut(at)) {
            *open = value(span);
        }
    }
}

/// Reads one value with all that is inside.
struct One<'b>(&'b mut Builder);

impl<'de> DeserializeSeed<'de> for One<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for One<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON")
    }

    fn visit_unit<E>(self) -> Result<(), E> {
        self.0.add(Compact::Null);
        Ok(())
    }

    fn visit_bool<E>(self, value: bool) -> Result<(), E> {
        self.0.add(Compact::Bool(value));
        Ok(())
    }

    fn visit_u64<E>(self, value: u64) -> Result<(), E> {
        self.0.add(Compact::Unsigned(value));
        Ok(())
    }

    fn visit_i64<E>(self, value: i64) -> Result<(), E> {
        self.0.add(Compact::Signed(value));
        Ok(())
    }

    fn visit_f64<E>(self, value: f64) -> Result<(), E> {
        self.0.add(Compact::Float(value));
        Ok(())
    }

    fn visit_str<E>(self, text: &str) -> Result<(), E> {
        self.0.add_text(text);
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<(), A::Error> {
        let (at, mut count) = (self.0.add(Compact::Null), 0);
        while list.next_element_seed(One(self.0))?.is_some() {
            count += 1;
        }
        self.0.close(at, |span| Compact::List { span, count });
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        let (at, mut count) = (self.0.add(Compact::Null), 0);
        while map.next_key_seed(One(self.0))?.is_some() {
            map.next_value_seed(One(self.0))?;
            count += 1;
            if count > MEMBERS_MAX {
                return Err(A::Error::custom(format!("an object with more than {MEMBERS_MAX} keys")));
            }
        }
        self.0.close(at, |span| Compact::Object { span });
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value as Json, json};

    use super::*;

    fn parse(json: &Json) -> Description {
        Description::parse(json.to_string().as_bytes()).unwrap()
    }

    #[test]
    fn what_was_read_is_written_with_its_keys_in_order() {
        let json =
            json!({ "a": [1, -1, 1.5, null, true, "t\n", [], {}], "b": { "c": [[2]], "": "x" }, "z": 0 });
        assert_eq!(serde_json::to_string(&parse(&json)).unwrap(), json.to_string());
        let unordered = Description::parse(br#" {"b":1, "a":{"d":2,"c":3}, "b":4} "#).unwrap();
        assert_eq!(serde_json::to_string(&unordered).unwrap(), r#"{"a":{"c":3,"d":2},"b":4}"#);
        assert_eq!(unordered.root().number("b"), Some(4));
    }

    #[test]
    fn keys_are_found_whatever_stands_before_them() {
        let description = parse(&json!({ "a": [[1, 2], { "b": 3 }], "c": "text", "d": -1, "e": 7 }));
        let root = description.root();
        assert_eq!((root.text("c"), root.number("e")), (Some("text"), Some(7)));
        assert_eq!(
            (root.number("d"), root.number("c"), root.text("e"), root.number("f")),
            (None, None, None, None)
        );
        let list = root.list("a").unwrap();
        assert_eq!((list.len(), list.clone().nth(1).unwrap().number("b")), (2, Some(3)));
        assert!(list.clone().next().unwrap().get("b").is_none());
        let is_object = |node: Node<'_>| node.get("b").is_some();
        let mut rest = list.clone();
        assert_eq!(rest.take_before(is_object).unwrap().len(), 1);
        assert_eq!(rest.len(), 1);
        rest.next();
        assert!(rest.take_before(is_object).is_none());
    }

    #[test]
    fn nodes_are_equal_by_what_is_inside() {
        let (one, other) =
            (parse(&json!([{ "a": ["b", 1] }])), parse(&json!({ "c": "d", "e": { "a": ["b", 1] } })));
        let inner = other.root().get("e").unwrap();
        assert_eq!(one.root().behind(1), inner);
        assert_ne!(one.root().behind(1), parse(&json!({ "a": ["c", 1] })).root());
        assert_ne!(one.root().behind(1), parse(&json!({ "a": ["b", 2] })).root());
    }

    #[test]
    fn a_single_device_becomes_a_trailer() {
        let device = json!({ "name": "x", "fields": [] });
        let trailer = parse(&device).into_trailer();
        assert_eq!(serde_json::to_value(&trailer).unwrap(), json!({ "devices": [device] }));
        assert_eq!(serde_json::to_value(trailer.into_trailer()).unwrap(), json!({ "devices": [device] }));
    }

    #[test]
    fn json_out_of_bounds_is_refused() {
        let keys = |count: usize| {
            (0..count).map(|key| (key.to_string(), json!(0))).collect::<serde_json::Map<_, _>>()
        };
        parse(&Json::Object(keys(MEMBERS_MAX)));
        let refused = |text: &str| Description::parse(text.as_bytes()).unwrap_err().to_string();
        let error = refused(&Json::Object(keys(MEMBERS_MAX + 1)).to_string());
        assert!(error.starts_with("an object with more than 64 keys"), "{error}");
        assert!(refused(&"[".repeat(1000)).starts_with("recursion limit exceeded"));
        assert!(refused(&" ".repeat(TEXT_BYTES_MAX + 1)).starts_with("more than 16777216 bytes"));
        for text in ["", "[1,", "{\"a\"}", "[] []", "\"\\ud800\"", "1e999"] {
            assert!(Description::parse(text.as_bytes()).is_err(), "{text}");
        }
        assert!(Description::parse(b"\"\xff\"").is_err());
    }
}
