//! `ferry inspect`: what is in a stream, ours or another VMM's, from its description alone.
//!
//! - [`Input`] is a file with its description; [`Input::walk`] shows it to a [`Visitor`], part by part, without keeping any.
//! - [`Tree`] prints for people, [`write_json`] for programs, [`Diff`] compares two files field by field.
//! - [`print_layers`] follows a snapshot of what has changed to the files that it needs.
//! - [`compare`] holds two schemas against each other: which streams load where. [`build_schema`] is the schema of this build.
//!
//! # Invariants
//!
//! - Nothing that a file says is believed: names are escaped, sizes and depths bounded (by crate `stream`), and the output ends
//!   at [`OUTPUT_BYTES_MAX`]. RAM is counted, never kept.
//! - Printing a file takes at most 1 MiB and 16 times its bytes, and those of its description: counted in the tests of crate `fuzz`.
//!   [`Diff`] keeps the values of one section of both files, and [`compare`] two schemas as trees of JSON, which are up to a hundred
//!   times their text of at most 16 MiB each: it is told what to compare by who runs it, not by who sent a file.
//! - What does not fit its description is an error with the offset in the file; what came before it is printed all the same.
//!
//! # Absent
//!
//! Loading: that a file can be printed does not mean that a machine takes it. Compressed files.

mod compat;
mod diff;
mod input;
mod json;
mod layers;
mod output;
mod schema;
mod text;
mod tree;

#[cfg(test)]
mod tests;

pub use compat::{Comparison, compare};
pub use diff::Diff;
pub use input::{Block, Contents, Input, Section, Visitor};
pub use json::write as write_json;
pub use layers::{Finder, print_layers};
pub use output::{Limited, OUTPUT_BYTES_MAX};
pub use schema::build_schema;
pub use tree::Tree;
