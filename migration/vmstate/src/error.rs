//! Why a state could not be loaded, and where in it.

use std::fmt;

/// A load that failed: where in the state, and why.
///
/// Prints as `sq[3].size: 70000 is above 65536`. The path is built while the error travels outwards, so a successful load pays
/// nothing for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Error {
    /// Field names and indexes from the outermost struct inwards; empty when the whole state is meant.
    pub path: String,
    /// What is wrong there.
    pub problem: Problem,
}

/// What can be wrong with a saved state.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// The bytes end inside a field.
    #[error("needs {needed} bytes but only {left} are left")]
    Truncated {
        /// Bytes the field needs.
        needed: u64,
        /// Bytes that remain.
        left: u64,
    },
    /// The description has been read wholly and bytes remain.
    #[error("{bytes} bytes are left over")]
    LeftOver {
        /// How many.
        bytes: usize,
    },
    /// A bool that is neither 0 nor 1.
    #[error("{0:#04x} is not a bool")]
    NotBool(u8),
    /// A number or a count above its stated maximum.
    #[error("{value} is above {maximum}")]
    AboveMaximum {
        /// The value read.
        value: i128,
        /// The largest allowed.
        maximum: i128,
    },
    /// A number below its stated minimum.
    #[error("{value} is below {minimum}")]
    BelowMinimum {
        /// The value read.
        value: i128,
        /// The smallest allowed.
        minimum: i128,
    },
    /// A slot of a sparse array that is marked neither empty (`'0'`) nor present (`'1'`).
    #[error("slot marker {0:#04x} is neither '0' nor '1'")]
    SlotMarker(u8),
    /// A list element that starts with neither 0x01 nor the end mark 0x00.
    #[error("list marker {0:#04x} is neither 0x01 nor 0x00")]
    ListMarker(u8),
    /// A list with more elements than its stated maximum.
    #[error("the list has more than {maximum} elements")]
    ListTooLong {
        /// The largest number allowed.
        maximum: usize,
    },
    /// A bitmap whose last word has bits set beyond its length.
    #[error("bits are set beyond the {bits} bits of the map")]
    BitBeyond {
        /// Length of the map in bits.
        bits: usize,
    },
    /// The state was written by a newer version of this description.
    #[error("version {version} of {name:?} is too new: {newest} is the newest this build reads")]
    TooNew {
        /// The description's name.
        name: &'static str,
        /// The version in the stream.
        version: u32,
        /// The newest we read.
        newest: u32,
    },
    /// The state was written by a version that is no longer read.
    #[error("version {version} of {name:?} is too old: {oldest} is the oldest this build reads")]
    TooOld {
        /// The description's name.
        name: &'static str,
        /// The version in the stream.
        version: u32,
        /// The oldest we read.
        oldest: u32,
    },
    /// A subsection that this description does not have.
    #[error("unknown subsection {0:?}")]
    UnknownSubsection(String),
    /// A subsection that comes twice.
    #[error("subsection {0:?} comes twice")]
    RepeatedSubsection(&'static str),
    /// A struct that contains itself more often than its description says.
    #[error("{name:?} is nested more than {maximum} levels deep")]
    TooDeep {
        /// The description's name.
        name: &'static str,
        /// The levels that are allowed.
        maximum: u32,
    },
    /// A state that would take more memory than its size justifies.
    #[error("takes more than {limit} bytes of memory, which is the most that a state of this size may")]
    TooMuchMemory {
        /// The memory that is allowed.
        limit: usize,
    },
    /// A value that must be this side's and is not.
    #[error("{value} differs from this side's {ours}")]
    Different {
        /// The value read.
        value: Box<str>,
        /// What the context says.
        ours: Box<str>,
    },
    /// A struct whose context the caller did not give: a mistake of the program, not of the state.
    #[error("loading this needs a context {wanted}, {}", given.map_or_else(|| "and there is none".into(), |given| format!("and there is a {given}")))]
    MissingContext {
        /// The type that the struct names.
        wanted: &'static str,
        /// The type that was given, if one was.
        given: Option<&'static str>,
    },
    /// A `check` of the description refused the value.
    #[error("{0}")]
    Refused(String),
}

impl Error {
    /// The error without a place.
    pub fn new(problem: Problem) -> Self {
        Error { path: String::new(), problem }
    }

    /// The same error, seen from the struct whose field `name` it concerns.
    #[must_use]
    pub fn in_field(mut self, name: &str) -> Self {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("{name}{dot}{}", self.path);
        self
    }

    /// The same error, seen from the array whose element `index` it concerns.
    #[must_use]
    pub fn at_index(mut self, index: usize) -> Self {
        let dot = if self.path.is_empty() || self.path.starts_with('[') { "" } else { "." };
        self.path = format!("[{index}]{dot}{}", self.path);
        self
    }
}

impl From<Problem> for Error {
    fn from(problem: Problem) -> Self {
        Error::new(problem)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        self.problem.fmt(f)
    }
}

// The problem is part of the message, not a `source`: printing an error chain says it once.
impl std::error::Error for Error {}
