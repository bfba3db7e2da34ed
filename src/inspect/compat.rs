//! Two schemas against each other: which streams load where.
//!
//! A stream is written by the newest version of every description; the names of fields are not in it, only their bytes. So a reader
//! takes it if it reads that version of the section, and if the fields that it expects at that version are, one by one, those that
//! the writer has: of the same type, size and number, with no value that it refuses. A struct inside is read as the version that the
//! reader's field says (`struct_versions`), or else as its newest.

use std::collections::{BTreeMap, HashMap};
use std::fmt;

use anyhow::{Context, ensure};
use serde_json::{Value as Json, json};

/// What a field says that has a rule of its own below, or does not matter. A difference in anything else changes the bytes, or what
/// is accepted, as far as this build can know.
const WITH_RULE: [&str; 14] = [
    "name",
    "max",
    "min",
    "equal",
    "since",
    "until",
    "struct_versions",
    "struct",
    "count",
    "count_from_context",
    "each",
    "element",
    "default",
    "index",
];

/// What [`compare`] found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    /// Everything that differs, whether it matters or not.
    pub differences: Vec<String>,
    /// Why streams of the old schema do not load in the new one.
    pub old_in_new: Vec<String>,
    /// Why streams of the new schema do not load in the old one.
    pub new_in_old: Vec<String>,
}

/// Compares two outputs of `ferry inspect --schema`: whole builds, trailers, or single descriptions.
///
/// # Errors
/// One of them is no schema.
pub fn compare(old: &Json, new: &Json) -> anyhow::Result<Comparison> {
    ensure!(
        is_of_one_file(old) == is_of_one_file(new),
        "one of them describes the bytes of one file, the other what a build writes: take both from `ferry inspect --schema` without a file, \
         or both with one (whether this build can load a file, `ferry run --incoming file:PATH` tells)"
    );
    let (old, new) = (parts(old).context("the old schema")?, parts(new).context("the new schema")?);
    let mut comparison = Comparison::default();
    for (name, old) in &old {
        let Some(new) = new.get(name) else {
            comparison.differences.push(format!("{name}: only in the old schema"));
            comparison.old_in_new.push(format!("{name}: the new schema has no such section"));
            continue;
        };
        differences(name, old, new, &mut comparison.differences);
        loads(name, old, new, &mut comparison.old_in_new);
        loads(name, new, old, &mut comparison.new_in_old);
    }
    for name in new.keys().filter(|name| !old.contains_key(*name)) {
        comparison.differences.push(format!("{name}: only in the new schema"));
        comparison.new_in_old.push(format!("{name}: the old schema has no such section"));
    }
    Ok(comparison)
}

/// Whether a schema has numbers of sections: a build's is of kinds of sections.
fn is_of_one_file(schema: &Json) -> bool {
    let devices = schema["devices"].as_array();
    devices.is_some_and(|devices| devices.iter().any(|device| device.get("instance_id").is_some()))
}

/// The descriptions in a schema by name.
fn parts(schema: &Json) -> anyhow::Result<BTreeMap<String, &Json>> {
    let configuration = schema.get("configuration").map(|part| ("configuration".to_owned(), part));
    let named = |device: &Json| match (&device["name"], &device["vmsd_name"]) {
        (Json::String(name), _) | (Json::Null, Json::String(name)) => match device["instance_id"].as_u64() {
            Some(instance) if instance > 0 => format!("{name} instance {instance}"),
            _ => name.clone(),
        },
        _ => "a section without a name".to_owned(),
    };
    let parts: BTreeMap<_, _> = match schema["devices"].as_array() {
        Some(devices) => {
            configuration.into_iter().chain(devices.iter().map(|one| (named(one), one))).collect()
        }
        None => [(named(schema), schema)].into(),
    };
    for (name, part) in &parts {
        ensure!(part["fields"].is_array(), "{name}: there are no fields");
    }
    Ok(parts)
}

/// Whether what `writer` writes is read by `reader`; adds every reason why not.
fn loads(path: &str, writer: &Json, reader: &Json, reasons: &mut Vec<String>) {
    let (version, newest) = (version(writer), version(reader));
    let oldest = reader["oldest"].as_u64().unwrap_or(newest);
    if version > newest {
        reasons.push(format!("{path}: version {version} is written, {newest} is the newest that is read"));
    } else if version < oldest {
        reasons.push(format!("{path}: version {version} is written, {oldest} is the oldest that is read"));
    } else {
        layout(path, writer, reader, version, reasons);
    }
}

/// Whether the bytes that `writer` writes are those that `reader` expects of `version`.
fn layout(path: &str, writer: &Json, reader: &Json, expected: u64, reasons: &mut Vec<String>) {
    let written = fields(writer, version(writer));
    let read = fields(reader, expected);
    let (written_at, read_at) = (positions(&written), positions(&read));
    for pair in 0.. {
        let (ours, theirs) = match (written.get(pair), read.get(pair)) {
            (None, None) => break,
            (Some(extra), None) => {
                reasons.push(format!("{path}.{}: it is written, but not read", name(extra)));
                break;
            }
            (None, Some(missing)) => {
                reasons.push(format!("{path}.{}: it is read, but not written", name(missing)));
                break;
            }
            (Some(ours), Some(theirs)) => (*ours, *theirs),
        };
        let (our_name, their_name) = (name(ours), name(theirs));
        // Without names in the stream, a field of another name is the same field, unless its name is elsewhere.
        if our_name != their_name && read_at.contains_key(our_name) {
            reasons.push(format!("{path}.{their_name}: it is read before {our_name}, but not written there"));
            break;
        }
        if our_name != their_name && written_at.contains_key(their_name) {
            reasons.push(format!("{path}.{our_name}: it is written before {their_name}, but not read there"));
            break;
        }
        let path = format!("{path}.{our_name}");
        let at = Positions { written: &written_at, read: &read_at };
        field(&path, ours, theirs, &at, (reader, expected), reasons);
    }
    if let (Some(deep), Some(most)) = (writer["depth"].as_u64(), reader["depth"].as_u64())
        && deep > most
    {
        reasons.push(format!("{path}: {deep} levels may be written, and more than {most} are refused"));
    }
    let known: HashMap<_, _> = subsections(reader).collect();
    for (part_name, part) in subsections(writer) {
        match known.get(part_name) {
            Some(known) => loads(&format!("{path}.{part_name}"), part, known, reasons),
            None => reasons.push(format!("{path}: a stream that has the subsection {part_name} is refused")),
        }
    }
}

/// Where the fields of a struct are that hold numbers of elements.
struct Positions<'a> {
    written: &'a HashMap<&'a str, usize>,
    read: &'a HashMap<&'a str, usize>,
}

impl Positions<'_> {
    /// Whether two fields have their numbers of elements from the same place.
    fn agree(&self, ours: &Json, theirs: &Json) -> bool {
        let position = |of: &Json, at: &HashMap<&str, usize>| at.get(of["count"].as_str()?).copied();
        ours["count_from_context"] == theirs["count_from_context"]
            && match (position(ours, self.written), position(theirs, self.read)) {
                (None, None) => ours["count"] == theirs["count"],
                (ours, theirs) => ours == theirs,
            }
    }
}

/// Where a number of elements comes from.
fn count(field: &Json) -> String {
    if field["count_from_context"] == true { "the context".to_owned() } else { show(&field["count"]) }
}

/// Subsections by name.
fn subsections(description: &Json) -> impl Iterator<Item = (&str, &Json)> {
    let parts = description["subsections"].as_array().into_iter().flatten();
    parts.map(|part| (part["vmsd_name"].as_str().unwrap_or_default(), part))
}

/// Whether a field that is written is the one that is read, by a `reader` of the version that it expects.
fn field(
    path: &str,
    ours: &Json,
    theirs: &Json,
    at: &Positions<'_>,
    (reader, expected): (&Json, u64),
    reasons: &mut Vec<String>,
) {
    if !at.agree(ours, theirs) {
        let (ours, theirs) = (count(ours), count(theirs));
        reasons.push(format!("{path}: the number of elements is written as {ours}, but read from {theirs}"));
    }
    if theirs["equal"] == true && ours["equal"] != true {
        reasons.push(format!("{path}: values other than the reader's own may be written, and are refused"));
    }
    for part in ["each", "element"] {
        match (ours.get(part), theirs.get(part)) {
            (Some(ours), Some(theirs)) => {
                field(&format!("{path}[{part}]"), ours, theirs, at, (reader, expected), reasons);
            }
            (None, None) => {}
            (ours, _) => {
                let side = if ours.is_some() { "written" } else { "read" };
                reasons.push(format!("{path}: it has its {part} only where it is {side}"));
            }
        }
    }
    for key in keys(ours, theirs).filter(|key| !WITH_RULE.contains(key)) {
        if ours[key] != theirs[key] {
            let (ours, theirs) = (show(&ours[key]), show(&theirs[key]));
            reasons
                .push(format!("{path}: its {key} is {ours} where it is written, {theirs} where it is read"));
        }
    }
    let (low, high) = bounds(ours);
    let (least, most) = bounds(theirs);
    if high > most {
        reasons.push(format!("{path}: values above {most} may be written, and are refused"));
    }
    if low < least {
        reasons.push(format!("{path}: values below {least} may be written, and are refused"));
    }
    match (ours.get("struct"), theirs.get("struct")) {
        (Some(ours), Some(inner)) => {
            let versions = theirs["struct_versions"].as_array();
            let first = theirs["since"].as_u64().max(reader["oldest"].as_u64()).unwrap_or(expected);
            let index = usize::try_from(expected.saturating_sub(first)).unwrap_or(usize::MAX);
            let said = versions.and_then(|versions| versions.get(index)?.as_u64());
            layout(path, ours, inner, said.unwrap_or_else(|| version(inner)), reasons);
        }
        (None, None) => {}
        _ => reasons.push(format!("{path}: it is a struct on one side only")),
    }
}

/// The smallest and the largest value, or number of elements, that a field can have.
fn bounds(field: &Json) -> (i128, i128) {
    let number = |key: &str| {
        let value = &field[key];
        value.as_u64().map(i128::from).or_else(|| value.as_i64().map(i128::from))
    };
    let kind = field["type"].as_str().unwrap_or_default();
    let is_counted =
        field.get("count").is_some() || field["count_from_context"] == true || !kind.contains("int");
    let bits = kind.trim_start_matches(|character: char| !character.is_ascii_digit());
    let bits: u32 = bits.split(' ').next().and_then(|bits| bits.parse().ok()).unwrap_or(64);
    let (low, high) = match (is_counted, kind.starts_with("int")) {
        (false, true) => (-(1_i128 << (bits.clamp(1, 64) - 1)), (1_i128 << (bits.clamp(1, 64) - 1)) - 1),
        (false, false) => (0, (1_i128 << bits.clamp(1, 64)) - 1),
        (true, _) => (0, i128::from(u64::MAX)),
    };
    (number("min").unwrap_or(low), number("max").unwrap_or(high))
}

/// Everything that two descriptions do not have in common.
fn differences(path: &str, old: &Json, new: &Json, found: &mut Vec<String>) {
    for key in ["vmsd_name", "version", "oldest", "depth"] {
        difference(path, key, &old[key], &new[key], found);
    }
    for (list, key) in [("fields", "name"), ("subsections", "vmsd_name")] {
        let (olds, news) = (by_name(old, list, key), by_name(new, list, key));
        for (&(name, number), &old) in &olds {
            let path = format!("{path}.{name}");
            match news.get(&(name, number)) {
                None => found.push(format!("{path}: only in the old schema")),
                Some(new) if list == "subsections" => differences(&path, old, new, found),
                Some(new) => field_differences(&path, old, new, found),
            }
        }
        for (name, _) in news.keys().filter(|name| !olds.contains_key(*name)) {
            found.push(format!("{path}.{name}: only in the new schema"));
        }
        if olds.len() == news.len() && olds.keys().eq(news.keys()) {
            let order = |of: &'_ Json| -> Vec<String> {
                let all = of[list].as_array().into_iter().flatten();
                all.map(|one| one[key].as_str().unwrap_or_default().to_owned()).collect()
            };
            if order(old) != order(new) {
                found.push(format!("{path}: the {list} are in another order"));
            }
        }
    }
}

fn field_differences(path: &str, old: &Json, new: &Json, found: &mut Vec<String>) {
    const NESTED: [&str; 3] = ["struct", "each", "element"];
    for key in keys(old, new).filter(|key| !NESTED.contains(key)) {
        difference(path, key, &old[key], &new[key], found);
    }
    for key in NESTED {
        match (old.get(key), new.get(key)) {
            (Some(old), Some(new)) if key == "struct" => differences(path, old, new, found),
            (Some(old), Some(new)) => field_differences(&format!("{path}[{key}]"), old, new, found),
            (None, None) => {}
            (old, _) => {
                let side = if old.is_some() { "old" } else { "new" };
                found.push(format!("{path}: {key}: only in the {side} schema"));
            }
        }
    }
}

/// The entries of a list by name, and number among those of that name.
fn by_name<'a>(of: &'a Json, list: &str, key: &str) -> BTreeMap<(&'a str, usize), &'a Json> {
    let mut counts = HashMap::<&str, usize>::new();
    let entries = of[list].as_array().into_iter().flatten();
    let named = entries.map(|entry| {
        let name = entry[key].as_str().unwrap_or_default();
        let count = counts.entry(name).or_default();
        *count += 1;
        ((name, *count), entry)
    });
    named.collect()
}

fn difference(path: &str, key: &str, old: &Json, new: &Json, found: &mut Vec<String>) {
    if old != new {
        found.push(format!("{path}: {key}: {} -> {}", show(old), show(new)));
    }
}

fn show(value: &Json) -> String {
    match value {
        Json::Null => "none".to_owned(),
        Json::String(text) => text.escape_debug().to_string(),
        other => other.to_string(),
    }
}

fn version(description: &Json) -> u64 {
    description["version"].as_u64().unwrap_or_default()
}

fn name(field: &Json) -> &str {
    field["name"].as_str().unwrap_or_default()
}

/// Where each name comes first.
fn positions<'a>(fields: &[&'a Json]) -> HashMap<&'a str, usize> {
    fields.iter().enumerate().rev().map(|(position, field)| (name(field), position)).collect()
}

/// The fields that a version has.
fn fields(description: &Json, version: u64) -> Vec<&Json> {
    let has = |field: &&Json| {
        field["since"].as_u64().is_none_or(|since| since <= version)
            && field["until"].as_u64().is_none_or(|until| version <= until)
    };
    description["fields"].as_array().into_iter().flatten().filter(has).collect()
}

/// The keys of both, each once.
fn keys<'a>(one: &'a Json, other: &'a Json) -> impl Iterator<Item = &'a str> {
    let of = |json: &'a Json| json.as_object().into_iter().flat_map(|map| map.keys().map(String::as_str));
    of(one).chain(of(other).filter(|key| one.get(key).is_none()))
}

impl Comparison {
    /// The same for programs.
    pub fn to_json(&self) -> Json {
        let verdict = |reasons: &Vec<String>| json!({ "loads": reasons.is_empty(), "reasons": reasons });
        json!({
            "differences": self.differences,
            "old_in_new": verdict(&self.old_in_new),
            "new_in_old": verdict(&self.new_in_old),
        })
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.differences.is_empty() {
            writeln!(f, "no difference")?;
        }
        self.differences.iter().try_for_each(|difference| writeln!(f, "{difference}"))?;
        for (what, reasons) in [
            ("streams of the old schema load in the new one", &self.old_in_new),
            ("streams of the new schema load in the old one", &self.new_in_old),
        ] {
            writeln!(f, "{what}: {}", if reasons.is_empty() { "yes" } else { "no" })?;
            reasons.iter().try_for_each(|reason| writeln!(f, "  {reason}"))?;
        }
        Ok(())
    }
}
