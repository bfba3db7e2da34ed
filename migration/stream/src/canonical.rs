//! The trailer of our own files, held against what this crate would have written.
//!
//! Loading does not depend on the trailer, so a wrong one would go unseen until a person or a tool needs it. It is read without a
//! tree of JSON, which could take many times the memory of its text: names are borrowed from the text. Writing what was read must
//! give the text again, and every section that came must be described with its length.

use std::borrow::Cow;
use std::io::{self, Write};

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};
use serde_json::Value as Json;

use crate::{Error, PAGE_BYTES};

/// What the trailer must say of a section.
#[derive(Debug)]
pub(crate) struct Section {
    pub name: String,
    pub instance_id: u32,
    pub version: u32,
    pub bytes: u64,
}

// The keys are in the order in which they are written.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Trailer<'a> {
    #[serde(borrow)]
    configuration: Structure<'a>,
    #[serde(borrow)]
    devices: Vec<Device<'a>>,
    page_size: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Device<'a> {
    #[serde(borrow)]
    fields: Vec<Field<'a>>,
    instance_id: u32,
    #[serde(borrow)]
    name: Cow<'a, str>,
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    subsections: Vec<Structure<'a>>,
    version: u32,
    #[serde(borrow)]
    vmsd_name: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Structure<'a> {
    #[serde(borrow)]
    fields: Vec<Field<'a>>,
    #[serde(borrow, default, skip_serializing_if = "Vec::is_empty")]
    subsections: Vec<Structure<'a>>,
    version: u32,
    #[serde(borrow)]
    vmsd_name: Cow<'a, str>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Field<'a> {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    array_len: Option<u64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    index: Option<u64>,
    #[serde(borrow)]
    name: Cow<'a, str>,
    size: u64,
    #[serde(borrow, default, rename = "struct", skip_serializing_if = "Option::is_none")]
    structure: Option<Box<Structure<'a>>>,
    #[serde(borrow, rename = "type")]
    kind: Cow<'a, str>,
}

/// Makes sure that the text is JSON.
pub(crate) fn check_syntax(text: &[u8]) -> Result<(), Error> {
    std::str::from_utf8(text).map_err(|error| shape(error.to_string()))?;
    serde_json::from_slice::<IgnoredAny>(text).map(drop).map_err(Error::Trailer)
}

/// Makes sure that the text is what we write, and describes this configuration, exactly these sections and, as the last of them, the
/// integrity section. What the fields of a device are called is not checked: an older version may have called them otherwise.
pub(crate) fn check(
    text: &[u8],
    sections: &[Section],
    configuration: &Json,
    integrity: &Json,
) -> Result<(), Error> {
    let trailer: Trailer<'_> = serde_json::from_slice(text).map_err(Error::Trailer)?;
    if !is_written_as(&trailer, text) {
        return Err(shape("it is not written as it should be".into()));
    }
    if trailer.page_size != PAGE_BYTES as u64 {
        return Err(shape(format!("pages of {} bytes", trailer.page_size)));
    }
    if !is_written_as(&trailer.configuration, configuration.to_string().as_bytes()) {
        return Err(shape("the configuration is described as another".into()));
    }
    let last = trailer.devices.last();
    if !last.is_some_and(|last| is_written_as(last, integrity.to_string().as_bytes())) {
        return Err(shape("the integrity section is described as another".into()));
    }
    if trailer.devices.len() != sections.len() {
        return Err(shape(format!("{} devices, but {} came", trailer.devices.len(), sections.len())));
    }
    for (device, section) in trailer.devices.iter().zip(sections) {
        let described = (&*device.name, device.instance_id, device.version);
        let Section { name, instance_id, version, bytes: came } = section;
        if described != (name, *instance_id, *version) {
            return Err(shape(format!("{described:?}, but {:?} came", (name, instance_id, version))));
        }
        let bytes = bytes(&device.fields, &device.subsections)?;
        if bytes != *came {
            return Err(shape(format!("{bytes} bytes of section {name:?}, but {came} came")));
        }
    }
    Ok(())
}

fn shape(why: String) -> Error {
    Error::TrailerShape(why)
}

/// The bytes of a struct, whose parts must agree with each other.
fn bytes(fields: &[Field<'_>], subsections: &[Structure<'_>]) -> Result<u64, Error> {
    let too_large = || shape("a size is too large".into());
    let mut sum = 0_u64;
    let mut elements = 0;
    for field in fields {
        if let Some(structure) = &field.structure {
            let inside = bytes(&structure.fields, &structure.subsections)?;
            if inside != field.size {
                let (name, size) = (&field.name, field.size);
                return Err(shape(format!("{name:?} has {size} bytes, but {inside} are described")));
            }
        }
        // Elements that differ are counted from 0.
        elements = match field.index {
            None => 0,
            Some(0) => 1,
            Some(index) if index == elements => elements + 1,
            Some(index) => return Err(shape(format!("element {index} of {:?} is out of order", field.name))),
        };
        let run = field.size.checked_mul(field.array_len.unwrap_or(1)).ok_or_else(too_large)?;
        sum = sum.checked_add(run).ok_or_else(too_large)?;
    }
    for part in subsections {
        let header = 1 + 1 + part.vmsd_name.len() as u64 + 4;
        let part = bytes(&part.fields, &part.subsections)?;
        sum = part.checked_add(header).and_then(|part| sum.checked_add(part)).ok_or_else(too_large)?;
    }
    Ok(sum)
}

/// Whether writing the part gives the text; blanks may follow.
fn is_written_as(part: &impl Serialize, text: &[u8]) -> bool {
    let mut same = Same { rest: text };
    serde_json::to_writer(&mut same, part).is_ok() && same.rest.iter().all(|byte| *byte == b' ')
}

/// Takes only bytes that it has already.
struct Same<'a> {
    rest: &'a [u8],
}

impl Write for Same<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.rest = self.rest.strip_prefix(bytes).ok_or(io::ErrorKind::InvalidData)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAILER: &str = concat!(
        r#"{"configuration":{"fields":[{"name":"len","size":4,"type":"uint32"}],"version":1,"vmsd_name":"configuration"},"#,
        r#""devices":[{"fields":[{"array_len":3,"name":"a","size":4,"type":"uint32"},"#,
        r#"{"name":"b","size":2,"struct":{"fields":[{"name":"c","size":2,"type":"uint16"}],"version":1,"vmsd_name":"q"},"type":"struct"},"#,
        r#"{"index":0,"name":"d","size":1,"type":"uint8"},{"index":1,"name":"d","size":1,"type":"uint8"}],"instance_id":0,"name":"x","#,
        r#""subsections":[{"fields":[],"version":1,"vmsd_name":"x/s"}],"version":2,"vmsd_name":"x"},"#,
        r#"{"fields":[],"instance_id":0,"name":"integrity","version":1,"vmsd_name":"integrity"}],"page_size":4096}"#,
    );

    fn checked(text: &str) -> Result<(), Error> {
        let section =
            |name: &str, version, bytes| Section { name: name.into(), instance_id: 0, version, bytes };
        // Three numbers, a struct, two elements, and the subsection with its header.
        let sections = [section("x", 2, 12 + 2 + 2 + 9), section("integrity", 1, 0)];
        let json: Json = serde_json::from_str(TRAILER).unwrap();
        check(text.as_bytes(), &sections, &json["configuration"], &json["devices"][1])
    }

    #[test]
    fn trailer_describes_what_came_and_is_written_in_one_way() {
        checked(TRAILER).unwrap();
        checked(&format!("{TRAILER}  ")).unwrap();
        let written = "it is not written as it should be";
        for (from, to, why) in [
            (
                r#""size":4,"type":"uint32"},{"#,
                r#""size":5,"type":"uint32"},{"#,
                "28 bytes of section \"x\", but 25 came",
            ),
            (r#""array_len":3"#, r#""array_len":4"#, "29 bytes of section \"x\", but 25 came"),
            (r#""array_len":3"#, r#""array_len":9223372036854775807"#, "a size is too large"),
            (r#"x/s"#, r#"x/st"#, "26 bytes of section \"x\", but 25 came"),
            (r#""size":2,"struct""#, r#""size":3,"struct""#, "\"b\" has 3 bytes, but 2 are described"),
            (r#""index":1"#, r#""index":2"#, "element 2 of \"d\" is out of order"),
            (r#"0,"name":"x""#, r#"1,"name":"x""#, "(\"x\", 1, 2), but (\"x\", 0, 2) came"),
            (r#""name":"x""#, r#""name":"y""#, "(\"y\", 0, 2), but (\"x\", 0, 2) came"),
            (r#""version":2"#, r#""version":3"#, "(\"x\", 0, 3), but (\"x\", 0, 2) came"),
            ("4096", "8192", "pages of 8192 bytes"),
            (r#""len""#, r#""lem""#, "the configuration is described as another"),
            (
                r#""vmsd_name":"integrity""#,
                r#""vmsd_name":"integer""#,
                "the integrity section is described as another",
            ),
            (r#""index":1,"#, r#""index": 1,"#, written),
            (r#"{"index":1,"name":"d","#, r#"{"name":"d","index":1,"#, written),
            ("\"a\"", r#""\u0061""#, written),
        ] {
            let text = TRAILER.replacen(from, to, 1);
            assert_ne!(text, TRAILER, "{from}");
            let message = format!("the trailer is not a description: {why}");
            assert_eq!(checked(&text).unwrap_err().to_string(), message, "{to}");
        }
        for (from, to) in [
            (r#""index":1"#, r#""indey":1"#),
            (r#""index":1"#, r#""index":1,"index":1"#),
            (r#","page_size":4096"#, ""),
            (r#""type":"uint8""#, r#""type":8"#),
            ("}", ""),
        ] {
            assert!(matches!(checked(&TRAILER.replacen(from, to, 1)), Err(Error::Trailer(_))), "{to}");
        }
    }
}
