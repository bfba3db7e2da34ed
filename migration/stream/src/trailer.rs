//! The description trailer of a file.

use serde_json::{Value as Json, json};

use crate::description::{Description, Node};
use crate::section::DeviceSection;
use crate::wire::{TRAILER_BYTES_MAX, mark};
use crate::{Error, PAGE_BYTES};

/// The entry of one device.
pub(crate) fn device(section: &DeviceSection) -> Json {
    let mut entry = section.description.clone();
    entry["name"] = json!(section.name);
    entry["instance_id"] = json!(section.instance_id);
    entry
}

/// The trailer's text.
pub(crate) fn text(configuration: &Json, devices: &[Json]) -> Result<Vec<u8>, Error> {
    let json = json!({ "configuration": configuration, "page_size": PAGE_BYTES, "devices": devices });
    let mut text = json.to_string().into_bytes(); // control characters are escaped, so it holds no NUL
    // Foreign tools look for the last NUL, which is in the length, and take the next `{` for the start. A `{` in the length
    // would mislead them, so blanks are added until there is none.
    while (text.len() as u32).to_be_bytes().contains(&b'{') {
        text.push(b' ');
    }
    if text.len() > TRAILER_BYTES_MAX {
        let (value, maximum) = (text.len() as u64, TRAILER_BYTES_MAX as u64);
        return Err(Error::AboveMaximum { what: "length of the trailer", value, maximum });
    }
    Ok(text)
}

/// The trailer with its mark and length.
pub(crate) fn save(text: &[u8]) -> Vec<u8> {
    let mut out = vec![mark::TRAILER];
    out.extend((text.len() as u32).to_be_bytes()); // bounded above
    out.extend(text);
    out
}

/// The trailer of a whole file, or of its last 10 MiB. `None` if the file has none.
///
/// # Errors
///
/// If what stands in its place is not JSON.
pub fn find(file: &[u8]) -> Result<Option<Description>, Error> {
    // The length before the JSON is below 2^24, so the last NUL of the file is one of its bytes.
    let Some(nul) = file.iter().rposition(|byte| *byte == 0) else { return Ok(None) };
    for start in nul + 1..=nul + 4 {
        let header = start.checked_sub(5).and_then(|header| file.get(header..start));
        let Some(&[mark::TRAILER, length @ ..]) = header.and_then(|header| header.first_chunk::<5>()) else {
            continue;
        };
        let text = file.get(start..).unwrap_or_default();
        if u32::from_be_bytes(length) as usize == text.len() {
            return Description::parse(text).map(Some).map_err(Error::Trailer);
        }
    }
    Ok(None)
}

/// The bytes of a device's state, by its description.
pub(crate) fn state_bytes(description: Node<'_>) -> Result<u64, Error> {
    let shape = |what: &str| Error::TrailerShape(format!("{what} of {}", name(description)));
    let fields = description.list("fields").ok_or_else(|| shape("no fields"))?;
    let mut bytes = 0_u64;
    for field in fields {
        let size = field.number("size").ok_or_else(|| shape("a field without size"))?;
        let count = field.number("array_len").unwrap_or(1);
        bytes = size
            .checked_mul(count)
            .and_then(|run| bytes.checked_add(run))
            .ok_or_else(|| shape("too large a field"))?;
    }
    for part in description.list("subsections").into_iter().flatten() {
        let name = part.text("vmsd_name").ok_or_else(|| shape("a nameless subsection"))?;
        let header = 1 + 1 + name.len() as u64 + 4;
        let part = state_bytes(part)?.checked_add(header);
        bytes =
            part.and_then(|part| bytes.checked_add(part)).ok_or_else(|| shape("too large a subsection"))?;
    }
    Ok(bytes)
}

/// A description's name for errors.
fn name(description: Node<'_>) -> String {
    description.text("vmsd_name").map_or_else(|| "null".into(), |name| format!("{name:?}"))
}
