//! `ferry inspect`.

use std::fs::File;
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::{Args, ValueEnum};
use engine::FileState;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_json::Value;
use stream::ReadAt;
use stream::description::{Description, Node};

use super::output::unless_closed;
use crate::inspect::{
    self, Contents, Diff, Finder, Input, Limited, OUTPUT_BYTES_MAX, Section, Tree, Visitor,
};

/// The longest file with a description or a schema that is read.
const JSON_BYTES_MAX: u64 = 16 << 20;

/// What to look at. Its help stands at [`super::Command::Inspect`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry inspect suspended.ferry                            # everything in it, as a tree
  ferry inspect suspended.ferry --section nvme --format json | jq '.sections[].state.fields[].name'
  ferry inspect suspended.ferry --verify                   # are these the bytes that were written?
  ferry inspect tuesday.ferry --verify                     # and those of the snapshots that it needs, beside it?
  ferry inspect --diff before.ferry after.ferry            # status 1 if they differ
  ferry inspect nvme.section --description nvme.vmdesc.json    # one section without a stream around it
  ferry inspect --schema >schema.json                      # what this build writes
  ferry inspect --check-compat old.json schema.json        # status 1 if streams of OLD do not load in NEW

Any stream of QEMU's layout that has its description at its end can be read, for example one that QEMU wrote with
'migrate \"exec:cat >vm.stream\"'.")]
pub struct InspectArguments {
    /// A file that a machine was suspended into, or another stream, uncompressed.
    #[arg(value_name = "FILE", required_unless_present_any = ["schema", "diff", "check_compat"])]
    pub file: Option<PathBuf>,
    /// What the bytes of FILE mean, where FILE does not say it itself: a device's entry of a trailer, or a whole trailer.
    #[arg(long, value_name = "JSON", requires = "file")]
    pub description: Option<PathBuf>,
    /// Only sections of this name, or of this name behind the last slash.
    #[arg(long, value_name = "NAME")]
    pub section: Option<String>,
    /// Print what describes FILE instead of its values; without FILE, what this build writes. Always JSON.
    #[arg(long, conflicts_with_all = ["verify", "diff", "check_compat"])]
    pub schema: bool,
    /// Compare FILE with the digests in it: every section, and every MiB of RAM. Names the first that is damaged.
    #[arg(long, requires = "file", conflicts_with_all = ["diff", "check_compat"])]
    pub verify: bool,
    /// How to print.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// Compare two files field by field, and RAM page by page.
    #[arg(long, num_args = 2, value_names = ["A", "B"], conflicts_with_all = ["file", "check_compat"])]
    pub diff: Option<Vec<PathBuf>>,
    /// Say whether streams of one build load in another, both ways, and every difference. Takes what --schema printed without FILE.
    #[arg(long, num_args = 2, value_names = ["OLD.json", "NEW.json"], conflicts_with_all = ["file", "section"])]
    pub check_compat: Option<Vec<PathBuf>>,
}

/// For whom.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// People.
    #[default]
    Tree,
    /// Programs.
    Json,
}

impl InspectArguments {
    /// Looks and prints.
    ///
    /// # Errors
    /// A file cannot be read or is not what its description says; files differ; a schema is not compatible.
    pub fn execute(&self) -> anyhow::Result<()> {
        let mut out = Limited::new(BufWriter::new(io::stdout().lock()), OUTPUT_BYTES_MAX);
        let result = self.print(&mut out);
        let flushed = out.flush().context("cannot write to standard output");
        unless_closed(result.and(flushed))
    }

    fn print(&self, out: &mut impl Write) -> anyhow::Result<()> {
        if let Some([old, new]) = self.check_compat.as_deref() {
            return self.check_compat(old, new, out);
        }
        if let Some([a, b]) = self.diff.as_deref() {
            let (first, second) = (open(a, None)?, open(b, None)?);
            let count = Diff::print(&first, &second, |name| self.wants(name), out)
                .with_context(|| format!("cannot compare {} and {}", a.display(), b.display()))?;
            out.flush()?;
            ensure!(count == 0, "{} and {} differ in {count} places", a.display(), b.display());
            return Ok(());
        }
        let Some(path) = &self.file else {
            return self.schema(&inspect::build_schema(), out);
        };
        let description = self.description.as_deref().map(read_description).transpose()?;
        let input = open(path, description)?;
        let failed = || format!("cannot inspect {}", path.display());
        if self.schema {
            return self.description(input.trailer(), out).with_context(failed);
        }
        let contents = match (self.verify, self.format) {
            (true, Format::Tree) => self.walk(&input, &mut Nothing),
            (true, Format::Json) => inspect::write_json(&input, &mut *out, |_| false, true),
            (false, Format::Tree) => {
                self.walk(&input, &mut Chosen { tree: Tree::new(&mut *out), arguments: self })
            }
            (false, Format::Json) => inspect::write_json(&input, &mut *out, |name| self.wants(name), false),
        };
        // What came before an error is on the screen first.
        out.flush()?;
        let contents = contents.with_context(failed)?;
        if self.format == Format::Tree && self.section.is_none() {
            self.layers(path, &input, out).with_context(failed)?;
        }
        ensure!(
            !self.verify || contents.verified,
            "{} holds no digests: it was not written by ferry",
            path.display()
        );
        if self.format == Format::Tree && contents.verified && (self.verify || self.section.is_none()) {
            let sections = contents.sections;
            let mib = contents.blocks.iter().map(|block| block.length_bytes >> 20).sum::<u64>();
            match contents.are_pages_unread {
                true => writeln!(
                    out,
                    "the digests of {sections} sections agree; RAM was not read, --verify does"
                )?,
                false => writeln!(out, "the digests of {sections} sections and {mib} MiB of RAM agree")?,
            }
        }
        if let (false, Some(name)) = (self.verify, &self.section) {
            let known = known(input.trailer());
            ensure!(
                known.iter().any(|known| self.wants(known)),
                "there is no section {name}; there are {}",
                known.join(", ")
            );
        }
        Ok(())
    }

    /// The files that it needs, if it does not hold all.
    fn layers<R: ReadAt>(&self, path: &Path, input: &Input<R>, out: &mut impl Write) -> anyhow::Result<()> {
        let mut finder = Finder::default();
        // What is wrong with the file was told.
        let _told = self.walk(input, &mut finder);
        match finder.state.as_ref().and_then(FileState::parent) {
            Some(parent) => inspect::print_layers(path, parent, self.verify, out),
            None => Ok(()),
        }
    }

    fn walk<R: ReadAt>(&self, input: &Input<R>, visitor: &mut dyn Visitor) -> anyhow::Result<Contents> {
        let (contents, result) = input.walk(visitor);
        result.map(|()| contents)
    }

    fn wants(&self, name: &str) -> bool {
        self.section.as_ref().is_none_or(|wanted| name == wanted || name.rsplit('/').next() == Some(wanted))
    }

    /// Prints a schema, or the sections of it that are wanted.
    fn schema(&self, schema: &Value, out: &mut impl Write) -> anyhow::Result<()> {
        let mut schema = schema.clone();
        if let (Some(name), Some(devices)) = (&self.section, schema["devices"].as_array_mut()) {
            devices.retain(|device| device["name"].as_str().is_some_and(|name| self.wants(name)));
            if devices.is_empty() {
                bail!("there is no section {name}");
            }
        }
        serde_json::to_writer_pretty(&mut *out, &schema)?;
        Ok(writeln!(out)?)
    }

    /// Prints what describes a file, or the sections of it that are wanted.
    fn description(&self, trailer: &Description, out: &mut impl Write) -> anyhow::Result<()> {
        if let Some(name) = &self.section {
            let mut known = sections(trailer).filter_map(|device| device.text("name"));
            ensure!(known.any(|name| self.wants(name)), "there is no section {name}");
        }
        serde_json::to_writer_pretty(&mut *out, &Wanted { arguments: self, trailer })?;
        Ok(writeln!(out)?)
    }

    fn check_compat(&self, old: &Path, new: &Path, out: &mut impl Write) -> anyhow::Result<()> {
        let failed = || format!("cannot compare {} and {}", old.display(), new.display());
        let comparison = inspect::compare(&read_json(old)?, &read_json(new)?).with_context(failed)?;
        match self.format {
            Format::Tree => write!(out, "{comparison}")?,
            Format::Json => writeln!(out, "{}", comparison.to_json())?,
        }
        out.flush()?;
        ensure!(
            comparison.old_in_new.is_empty(),
            "streams of {} do not load in {}",
            old.display(),
            new.display()
        );
        Ok(())
    }
}

/// A trailer with those of its sections that are wanted.
struct Wanted<'a> {
    arguments: &'a InspectArguments,
    trailer: &'a Description,
}

impl Serialize for Wanted<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if self.arguments.section.is_none() {
            return self.trailer.serialize(serializer);
        }
        let mut map = serializer.serialize_map(None)?;
        for (key, value) in self.trailer.root().members() {
            match key {
                "devices" => map.serialize_entry(key, &Sections(self))?,
                _ => map.serialize_entry(key, &value)?,
            }
        }
        map.end()
    }
}

struct Sections<'a>(&'a Wanted<'a>);

impl Serialize for Sections<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let wants = |device: &Node<'_>| device.text("name").is_some_and(|name| self.0.arguments.wants(name));
        serializer.collect_seq(sections(self.0.trailer).filter(wants))
    }
}

fn sections(trailer: &Description) -> impl Iterator<Item = Node<'_>> {
    trailer.root().list("devices").into_iter().flatten()
}

/// Names of the sections in the trailer.
fn known(trailer: &Description) -> Vec<String> {
    let names = sections(trailer).filter_map(|device| device.text("name"));
    names.map(|name| name.escape_debug().to_string()).collect()
}

fn open(path: &Path, description: Option<Description>) -> anyhow::Result<Input<File>> {
    let failed = || format!("cannot inspect {}", path.display());
    let file = File::open(path).with_context(failed)?;
    Input::new(file, description).with_context(failed)
}

fn read_json(path: &Path) -> anyhow::Result<Value> {
    read_with(path, |text| serde_json::from_slice(text))
}

fn read_description(path: &Path) -> anyhow::Result<Description> {
    read_with(path, Description::parse)
}

fn read_with<T>(path: &Path, parse: fn(&[u8]) -> serde_json::Result<T>) -> anyhow::Result<T> {
    let failed = || format!("cannot read {}", path.display());
    let mut text = Vec::new();
    let file = File::open(path).with_context(failed)?;
    file.take(JSON_BYTES_MAX + 1).read_to_end(&mut text).with_context(failed)?;
    ensure!(text.len() as u64 <= JSON_BYTES_MAX, "{} is longer than {JSON_BYTES_MAX} bytes", path.display());
    parse(&text).with_context(failed)
}

/// A tree of the sections that are wanted.
struct Chosen<'a, W> {
    tree: Tree<W>,
    arguments: &'a InspectArguments,
}

impl<W: Write> Visitor for Chosen<'_, W> {
    fn configuration(&mut self, configuration: &stream::Configuration) -> anyhow::Result<()> {
        match self.arguments.section {
            Some(_) => Ok(()),
            None => self.tree.configuration(configuration),
        }
    }

    fn ram(&mut self, blocks: &[inspect::Block], rounds: u64) -> anyhow::Result<()> {
        match self.arguments.section {
            Some(_) => Ok(()),
            None => self.tree.ram(blocks, rounds),
        }
    }

    fn section(&mut self, section: &Section<'_>) -> anyhow::Result<()> {
        if self.arguments.wants(section.name) { self.tree.section(section) } else { Ok(()) }
    }
}

/// Looks at the digests only, of everything.
struct Nothing;

impl Visitor for Nothing {
    fn wants_pages(&self) -> bool {
        true
    }

    fn section(&mut self, _section: &Section<'_>) -> anyhow::Result<()> {
        Ok(())
    }
}
