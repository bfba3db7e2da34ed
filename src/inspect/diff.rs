//! Two files field by field.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, HashMap};
use std::hash::{Hash, Hasher};
use std::io::Write;

use anyhow::{Context, ensure};
use stream::described::{Described, Value};
use stream::description::Node;
use stream::{Configuration, ReadAt};

use super::input::devices;
use super::text::{Name, hex, line};
use super::{Block, Input, Section, Visitor};

/// Bytes of all sections of the first file together, which are kept.
const SECTIONS_BYTES_MAX: usize = 256 << 20;
/// Values of one section, which are compared.
const VALUES_MAX: usize = 1 << 20;
/// The most text of the values of a section, paths included, that is kept to be compared.
const TEXT_BYTES_MAX: usize = 64 << 20;

/// What is kept of a file: its sections, and a hash of every page that is not zero.
#[derive(Debug, Default)]
pub struct Diff {
    configuration: Option<Configuration>,
    blocks: Vec<Block>,
    pages: BTreeMap<(usize, u64), u64>,
    sections: BTreeMap<(String, u32), Kept>,
    bytes: usize,
}

#[derive(Debug)]
struct Kept {
    version: u32,
    payload: Vec<u8>,
}

impl Diff {
    /// Prints every difference between two files; sections that `wanted` refuses are left out. Says how many there are.
    ///
    /// # Errors
    /// One of them is not what its description says, or `out` fails.
    pub fn print<A: ReadAt, B: ReadAt>(
        a: &Input<A>,
        b: &Input<B>,
        wanted: impl Fn(&str) -> bool,
        out: &mut impl Write,
    ) -> anyhow::Result<u64> {
        let (old, new) = (Self::of(a).context("the first file")?, Self::of(b).context("the second file")?);
        let mut lines = Lines { out, count: 0 };
        if machine(&old) != machine(&new) {
            lines.add(format_args!("machine: {} -> {}", machine(&old), machine(&new)))?;
        }
        ram(&old, &new, &mut lines)?;
        let (in_old, in_new) = (devices(a.trailer()), devices(b.trailer()));
        for ((name, instance), one) in old.sections.iter().filter(|((name, _), _)| wanted(name)) {
            let title = title(name, *instance);
            match new.sections.get(&(name.clone(), *instance)) {
                None => lines.add(format_args!("{title}: only in the first file"))?,
                Some(other) => {
                    let key = (name.as_str(), u64::from(*instance));
                    let described = in_old.get(&key).zip(in_new.get(&key));
                    let (ours, theirs) = described.context("a section without a description")?;
                    let (one, other) = (one.described(*ours), other.described(*theirs));
                    one.compare(&other, &title, &mut lines).with_context(|| title.clone())?;
                }
            }
        }
        let only = new.sections.keys().filter(|key| wanted(&key.0) && !old.sections.contains_key(*key));
        for (name, instance) in only {
            lines.add(format_args!("{}: only in the second file", title(name, *instance)))?;
        }
        Ok(lines.count)
    }

    fn of<R: ReadAt>(input: &Input<R>) -> anyhow::Result<Self> {
        let mut this = Self::default();
        let (contents, result) = input.walk(&mut this);
        result?;
        this.blocks = contents.blocks;
        Ok(this)
    }
}

impl Visitor for Diff {
    fn configuration(&mut self, configuration: &Configuration) -> anyhow::Result<()> {
        self.configuration = Some(configuration.clone());
        Ok(())
    }

    fn wants_pages(&self) -> bool {
        true
    }

    fn page(&mut self, block: usize, offset: u64, bytes: Option<&[u8]>) {
        match bytes.filter(|bytes| bytes.iter().any(|byte| *byte != 0)) {
            Some(bytes) => {
                let mut hasher = DefaultHasher::new();
                bytes.hash(&mut hasher);
                self.pages.insert((block, offset), hasher.finish());
            }
            None => {
                self.pages.remove(&(block, offset));
            }
        }
    }

    fn section(&mut self, section: &Section<'_>) -> anyhow::Result<()> {
        let payload = section.state.bytes().to_vec();
        self.bytes += payload.len();
        ensure!(
            self.bytes <= SECTIONS_BYTES_MAX,
            "the sections have more than {SECTIONS_BYTES_MAX} bytes; that is too much to compare"
        );
        let kept = Kept { version: section.version, payload };
        self.sections.insert((section.name.to_owned(), section.instance_id), kept);
        Ok(())
    }
}

/// The configuration on one line.
fn machine(diff: &Diff) -> String {
    let names =
        diff.configuration.iter().flat_map(|one| std::iter::once(&one.machine).chain(&one.capabilities));
    names.map(|name| Name(name).to_string()).collect::<Vec<_>>().join(", ")
}

fn title(name: &str, instance: u32) -> String {
    match instance {
        0 => Name(name).to_string(),
        _ => format!("{} instance {instance}", Name(name)),
    }
}

fn ram(old: &Diff, new: &Diff, lines: &mut Lines<'_, impl Write>) -> anyhow::Result<()> {
    let shape = |diff: &Diff| -> Vec<_> {
        diff.blocks
            .iter()
            .map(|block| format!("{} of {} bytes", Name(&block.name), block.length_bytes))
            .collect()
    };
    if shape(old) != shape(new) {
        return lines.add(format_args!("RAM: {} -> {}", shape(old).join(", "), shape(new).join(", ")));
    }
    let mut differ = vec![0_u64; old.blocks.len()];
    let mut count = |block: usize| differ.get_mut(block).into_iter().for_each(|count| *count += 1);
    for (page, hash) in &old.pages {
        if new.pages.get(page) != Some(hash) {
            count(page.0);
        }
    }
    new.pages.keys().filter(|page| !old.pages.contains_key(page)).for_each(|page| count(page.0));
    for (block, count) in old.blocks.iter().zip(differ).filter(|(_, count)| *count > 0) {
        lines.add(format_args!("RAM {}: {count} pages differ", Name(&block.name)))?;
    }
    Ok(())
}

impl Kept {
    fn described<'a>(&'a self, description: Node<'a>) -> DescribedKept<'a> {
        DescribedKept { kept: self, description }
    }
}

/// A section that was kept, with what describes it.
struct DescribedKept<'a> {
    kept: &'a Kept,
    description: Node<'a>,
}

impl DescribedKept<'_> {
    fn compare(&self, other: &Self, title: &str, lines: &mut Lines<'_, impl Write>) -> anyhow::Result<()> {
        let (ours, theirs) = (self.kept, other.kept);
        if ours.version != theirs.version {
            lines.add(format_args!("{title}: version {} -> {}", ours.version, theirs.version))?;
        }
        if ours.payload == theirs.payload && self.description == other.description {
            return Ok(());
        }
        let (old, new) = (self.leaves()?, other.leaves()?);
        let (in_old, in_new) = (index(&old), index(&new));
        for (path, leaf) in &old {
            match in_new.get(path.as_str()).and_then(|index| new.get(*index)) {
                None => lines.add(format_args!("{title}: {path}: {}, only in the first file", leaf.text))?,
                Some((_, other)) if leaf.bytes == other.bytes && leaf.text == other.text => {}
                Some((_, other)) => lines.add(format_args!("{title}: {path}: {}", leaf.change(other)))?,
            }
        }
        for (path, leaf) in new.iter().filter(|(path, _)| !in_old.contains_key(path.as_str())) {
            lines.add(format_args!("{title}: {path}: {}, only in the second file", leaf.text))?;
        }
        Ok(())
    }

    fn leaves(&self) -> anyhow::Result<Vec<(String, Leaf<'_>)>> {
        let mut leaves = Leaves::default();
        state("", &Described::new(self.description, &self.kept.payload, 0)?, &mut leaves)?;
        Ok(leaves.found)
    }
}

fn index<'a>(leaves: &'a [(String, Leaf<'_>)]) -> HashMap<&'a str, usize> {
    leaves.iter().enumerate().map(|(index, (path, _))| (path.as_str(), index)).collect()
}

/// A value without parts; of a buffer also its bytes, of which the text has only the first.
#[derive(Debug)]
struct Leaf<'a> {
    text: String,
    bytes: Option<&'a [u8]>,
}

impl Leaf<'_> {
    /// How it became `other`; of long buffers where they differ first.
    fn change(&self, other: &Self) -> String {
        let (Some(ours), Some(theirs)) = (self.bytes, other.bytes) else {
            return format!("{} -> {}", self.text, other.text);
        };
        let mut differ = ours.iter().zip(theirs).enumerate().filter(|(_, (ours, theirs))| ours != theirs);
        match differ.next() {
            Some((first, (one, another))) if ours.len() == theirs.len() && ours.len() > 8 => format!(
                "{} of {} bytes differ, the first is byte {first}: {} -> {}",
                1 + differ.count(),
                ours.len(),
                hex(&[*one]),
                hex(&[*another])
            ),
            _ => format!("{} -> {}", self.text, other.text),
        }
    }
}

/// The leaves of a section by path, and how many values were looked at for them: one of no bytes has no leaf, but takes time.
#[derive(Default)]
struct Leaves<'a> {
    found: Vec<(String, Leaf<'a>)>,
    looked_at: usize,
    /// Of paths and texts.
    text_bytes: usize,
}

impl<'a> Leaves<'a> {
    fn add(&mut self, path: &str, text: String, bytes: Option<&'a [u8]>) -> anyhow::Result<()> {
        self.text_bytes += path.len() + text.len();
        ensure!(
            self.text_bytes <= TEXT_BYTES_MAX,
            "names and values have more than {TEXT_BYTES_MAX} bytes; that is too much to compare"
        );
        self.found.push((path.to_owned(), Leaf { text, bytes }));
        Ok(())
    }
}

fn state<'a>(path: &str, described: &Described<'a>, leaves: &mut Leaves<'a>) -> anyhow::Result<()> {
    let join = |name: &str| match path {
        "" => Name(name).to_string(),
        path => format!("{path}.{}", Name(name)),
    };
    for field in described.fields()? {
        let path = join(field.name);
        value(&path, &field.value, leaves).with_context(|| path.clone())?;
    }
    for part in described.subsections()? {
        let path = join(part.name());
        leaves.add(&path, format!("version {}", part.version().unwrap_or_default()), None)?;
        state(&path, &part, leaves)?;
    }
    Ok(())
}

fn value<'a>(path: &str, it: &Value<'a>, leaves: &mut Leaves<'a>) -> anyhow::Result<()> {
    leaves.looked_at += 1;
    ensure!(
        leaves.looked_at <= VALUES_MAX,
        "there are more than {VALUES_MAX} values; that is too much to compare"
    );
    match it {
        Value::Struct(inner) => state(path, inner, leaves)?,
        Value::Array(array) => {
            for index in 0..array.count() {
                value(&format!("{path}[{index}]"), &array.get(index)?, leaves)?;
            }
        }
        Value::List(list) => {
            leaves.add(path, format!("{} elements", list.count()), None)?;
            for index in 0..list.count() {
                value(&format!("{path}[{index}]"), &list.get(index)?, leaves)?;
            }
        }
        Value::Elements(elements) => {
            leaves.add(path, format!("{} elements", elements.len()), None)?;
            for (index, element) in elements.iter().enumerate() {
                value(&format!("{path}[{index}]"), element, leaves)?;
            }
        }
        Value::Slots(slots) => {
            for (index, slot) in slots.iter().enumerate() {
                let path = format!("{path}[{index}]");
                let text = if slot.is_some() { "present" } else { "empty" };
                leaves.add(&path, text.to_owned(), None)?;
                slot.iter().try_for_each(|element| value(&path, element, leaves))?;
            }
        }
        Value::Bytes(bytes) | Value::Bitmap(bytes) => {
            leaves.add(path, line(it)?.unwrap_or_default(), Some(*bytes))?;
        }
        Value::Bool(_) | Value::Unsigned(_) | Value::Signed(_) => {
            leaves.add(path, line(it)?.unwrap_or_default(), None)?;
        }
    }
    Ok(())
}

/// Counts what it prints.
struct Lines<'a, W> {
    out: &'a mut W,
    count: u64,
}

impl<W: Write> Lines<'_, W> {
    fn add(&mut self, line: std::fmt::Arguments<'_>) -> anyhow::Result<()> {
        self.count += 1;
        Ok(writeln!(self.out, "{line}")?)
    }
}
