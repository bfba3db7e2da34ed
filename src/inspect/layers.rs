//! Which files a snapshot needs that holds only what has changed since another one, and whether they are there.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use engine::{FileParent, FileState};

use super::text::Name;
use super::{Block, Input, Section, Visitor};

/// Prints the files below the one at `path`, whose parent is `parent`, the nearest first; reads all of each to `verify` it.
///
/// # Errors
/// One of them is not what it was, or cannot be read; those before it are printed.
pub fn print_layers(
    path: &Path,
    parent: &FileParent,
    verify: bool,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    writeln!(out, "memory that is not in this file is in:")?;
    let (mut child, mut link) = (path.to_owned(), Some(parent.clone()));
    while let Some(parent) = link {
        let path = parent.beside(&child)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let looked = look(&path, verify).with_context(|| format!("the parent {}", path.display()))?;
        parent
            .check(looked.digest, &looked.state)
            .with_context(|| format!("the parent {}", path.display()))?;
        let pages = looked.pages;
        writeln!(out, "  {}  {pages} pages, digest {:016x}", Name(&name), looked.digest)?;
        (child, link) = (path, looked.state.parent().cloned());
    }
    Ok(())
}

struct Looked {
    digest: u64,
    state: FileState,
    pages: u64,
}

fn look(path: &PathBuf, verify: bool) -> anyhow::Result<Looked> {
    // Not opened before that is known: a pipe would wait for a writer.
    ensure!(fs::metadata(path)?.is_file(), "it is no regular file");
    let input = Input::new(File::open(path)?, None)?;
    let mut finder = Finder { verify, ..Finder::default() };
    let (contents, result) = input.walk(&mut finder);
    result?;
    let state = finder.state.context("it is no file of a guest")?;
    Ok(Looked { digest: contents.digest, state, pages: finder.pages })
}

/// Finds what a file says of the guest in it.
#[derive(Debug, Default)]
pub struct Finder {
    verify: bool,
    /// What it says, if it does.
    pub state: Option<FileState>,
    pages: u64,
}

impl Visitor for Finder {
    fn wants_pages(&self) -> bool {
        self.verify
    }

    fn ram(&mut self, blocks: &[Block], _rounds: u64) -> anyhow::Result<()> {
        self.pages = blocks.iter().map(|block| block.pages).sum();
        Ok(())
    }

    fn section(&mut self, section: &Section<'_>) -> anyhow::Result<()> {
        if let Some(state) = FileState::find(section.name, section.state.bytes(), section.version)? {
            self.state = Some(state);
        }
        Ok(())
    }
}
