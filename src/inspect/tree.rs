//! A stream as a tree, for people: what belongs together stands below each other, and nothing is said twice.

use std::io::Write;

use anyhow::{Context, ensure};
use stream::Configuration;
use stream::described::{Array, Described, Value};

use super::json::VALUES_MAX;
use super::text::{Name, line};
use super::{Block, Section, Visitor};

/// Names longer than this do not push the values of others to the right.
const NAME_COLUMN_MAX: usize = 32;

/// Prints what it is shown.
#[derive(Debug)]
pub struct Tree<W> {
    out: W,
    /// Values of the section so far.
    values: usize,
}

impl<W: Write> Tree<W> {
    /// Prints to `out`.
    pub fn new(out: W) -> Self {
        Self { out, values: 0 }
    }

    fn state(&mut self, state: &Described<'_>, depth: usize) -> anyhow::Result<()> {
        let fields = state.fields()?;
        let width = fields.iter().map(|field| Name(field.name).to_string().len());
        let width = width.filter(|width| *width <= NAME_COLUMN_MAX).max().unwrap_or(0);
        for field in &fields {
            let name = Name(field.name).to_string();
            self.value(&name, &field.value, depth, width).with_context(|| name.clone())?;
        }
        for part in state.subsections()? {
            let name = Name(part.name()).to_string();
            let version = part.version().unwrap_or_default();
            writeln!(self.out, "{:indent$}subsection {name} version {version}", "", indent = depth * 2)?;
            self.state(&part, depth + 1).with_context(|| name.clone())?;
        }
        Ok(())
    }

    fn value(&mut self, name: &str, value: &Value<'_>, depth: usize, width: usize) -> anyhow::Result<()> {
        self.values += 1;
        ensure!(
            self.values <= VALUES_MAX,
            "a section has more than {VALUES_MAX} values; that is too much to print"
        );
        if let Some(line) = line(value)? {
            return self.line(name, &line, depth, width);
        }
        match value {
            Value::Struct(inner) => {
                self.line(name, &Name(inner.name()).to_string(), depth, width)?;
                self.state(inner, depth + 1)
            }
            Value::Array(array) => {
                self.line(name, &format!("{} elements", array.count()), depth, width)?;
                self.array(array, depth + 1)
            }
            Value::Elements(elements) => {
                let count = elements.len();
                self.line(name, &format!("{count} element{}", plural(count)), depth, width)?;
                for (index, element) in elements.iter().enumerate() {
                    let name = format!("[{index}]");
                    self.value(&name, element, depth + 1, 0).with_context(|| name.clone())?;
                }
                Ok(())
            }
            Value::List(list) => {
                let count = list.count();
                self.line(name, &format!("{count} element{}", plural(count)), depth, width)?;
                for index in 0..count {
                    let name = format!("[{index}]");
                    self.value(&name, &list.get(index)?, depth + 1, 0).with_context(|| name.clone())?;
                }
                Ok(())
            }
            Value::Slots(slots) => self.slots(name, slots, depth, width),
            _ => Ok(()), // it was a line
        }
    }

    /// Elements of one layout; those that repeat the one before are not printed again.
    fn array(&mut self, array: &Array<'_>, depth: usize) -> anyhow::Result<()> {
        let (mut index, count) = (0, array.count());
        while index < count {
            let name = format!("[{index}]");
            let element = array.get(index).with_context(|| name.clone())?;
            self.value(&name, &element, depth, 0).with_context(|| name.clone())?;
            let bytes = array.element_bytes(index);
            let alike = (index + 1..count).take_while(|next| array.element_bytes(*next) == bytes).count();
            if alike > 0 {
                self.line(&range(index + 1, alike), &format!("like {name}"), depth, 0)?;
            }
            index += 1 + alike;
        }
        Ok(())
    }

    fn slots(
        &mut self,
        name: &str,
        slots: &[Option<Value<'_>>],
        depth: usize,
        width: usize,
    ) -> anyhow::Result<()> {
        let (count, present) = (slots.len(), slots.iter().flatten().count());
        self.line(name, &format!("{count} slot{}, {present} present", plural(count)), depth, width)?;
        let mut index = 0;
        while let Some(slot) = slots.get(index) {
            if let Some(element) = slot {
                let name = format!("[{index}]");
                self.value(&name, element, depth + 1, 0).with_context(|| name.clone())?;
                index += 1;
            } else {
                let empty = slots.iter().skip(index).take_while(|slot| slot.is_none()).count();
                self.line(&range(index, empty), "empty", depth + 1, 0)?;
                index += empty;
            }
        }
        Ok(())
    }

    fn line(&mut self, name: &str, text: &str, depth: usize, width: usize) -> anyhow::Result<()> {
        let line = format!("{:indent$}{name:width$}  {text}", "", indent = depth * 2);
        Ok(writeln!(self.out, "{}", line.trim_end())?)
    }
}

fn plural(count: usize) -> &'static str {
    if count == 1 { "" } else { "s" }
}

/// `count` places from `first` on.
fn range(first: usize, count: usize) -> String {
    if count == 1 { format!("[{first}]") } else { format!("[{first}-{}]", first + count - 1) }
}

impl<W: Write> Visitor for Tree<W> {
    fn configuration(&mut self, configuration: &Configuration) -> anyhow::Result<()> {
        write!(self.out, "machine {}", Name(&configuration.machine))?;
        for capability in &configuration.capabilities {
            write!(self.out, ", {}", Name(capability))?;
        }
        Ok(writeln!(self.out)?)
    }

    fn ram(&mut self, blocks: &[Block], rounds: u64) -> anyhow::Result<()> {
        writeln!(self.out, "RAM, sent in {rounds} round{}", if rounds == 1 { "" } else { "s" })?;
        let rows = blocks.iter().map(|block| {
            let numbers = [block.length_bytes, block.pages, block.zero_pages];
            (Name(&block.name).to_string(), numbers.map(|number| number.to_string()))
        });
        let rows: Vec<_> = rows.collect();
        let name = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        let width = |column: usize| {
            rows.iter().filter_map(|(_, numbers)| numbers.get(column)).map(String::len).max().unwrap_or(0)
        };
        let (bytes, pages, zeros) = (width(0), width(1), width(2));
        for (block, [a, b, c]) in &rows {
            writeln!(
                self.out,
                "  {block:name$}  {a:>bytes$} bytes  {b:>pages$} pages  {c:>zeros$} zero pages"
            )?;
        }
        Ok(())
    }

    fn section(&mut self, section: &Section<'_>) -> anyhow::Result<()> {
        let Section { name, instance_id, version, state, .. } = section;
        self.values = 0;
        writeln!(
            self.out,
            "section {} instance {instance_id} version {version}: {} bytes from byte {}",
            Name(name),
            state.bytes().len(),
            state.offset()
        )?;
        self.state(state, 1).with_context(|| format!("section {name:?}"))
    }
}
