//! A field whose attributes agree with each other.

use syn::{Expr, Ident, Path, Type};

/// One field.
pub struct Field {
    pub ident: Ident,
    pub ty: Type,
    pub kind: Kind,
    pub min: Option<Expr>,
    pub since: Option<u32>,
    pub until: Option<u32>,
    pub default: Option<Expr>,
    /// The versions of the struct inside, one for each version of ours that has the field.
    pub versions: Vec<u32>,
    /// The field leads back to this struct.
    pub recursive: bool,
    /// What the context says the value must be.
    pub equal: Option<Path>,
    pub check: Option<Path>,
}

/// How a field is laid out.
pub enum Kind {
    /// On its own.
    Plain { max: Option<Expr> },
    /// On its own, and it holds lengths of later fields.
    Count { max: Option<Expr>, of: Vec<Counts> },
    /// With its length outside.
    Counted { length: Length },
    /// A `Vec` of collections, with its own length and theirs outside.
    Rows { row: Type, length: Length, each: Box<Length> },
    /// With its own end.
    List { item: Type, max: Expr },
    /// An optional part after the fields.
    Subsection { part: Type, needed: Option<Path> },
}

/// What a field that holds lengths says of a later one.
pub struct Counts {
    pub field: Ident,
    pub which: Which,
}

/// Which of its lengths.
pub enum Which {
    /// That of a collection on its own.
    Only,
    /// The number of rows.
    Rows,
    /// The length of each row.
    Each,
}

/// Where the length of a field is.
pub enum Length {
    /// In an earlier field.
    Field { count: Ident, max: Expr },
    /// With the context: the stream does not hold it.
    Context { of: Path, max: Expr },
    /// In the description.
    Constant(Expr),
}

impl Field {
    /// The first and the last version that has the field.
    pub fn span_of_versions(&self, oldest: u32, version: u32) -> (u32, u32) {
        (self.since.unwrap_or(0).max(oldest), self.until.unwrap_or(u32::MAX).min(version))
    }

    /// The largest value, if it is a number and has one.
    pub fn max(&self) -> Option<&Expr> {
        match &self.kind {
            Kind::Plain { max } | Kind::Count { max, .. } => max.as_ref(),
            _ => None,
        }
    }

    /// Its lengths.
    pub fn lengths(&self) -> impl Iterator<Item = &Length> {
        let (length, each) = match &self.kind {
            Kind::Counted { length } => (Some(length), None),
            Kind::Rows { length, each, .. } => (Some(length), Some(&**each)),
            _ => (None, None),
        };
        length.into_iter().chain(each)
    }
}
