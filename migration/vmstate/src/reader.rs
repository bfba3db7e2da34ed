//! A cursor over the bytes of a state that cannot run past their end.

use std::any::{Any, type_name};

use crate::{Error, Problem};

/// The bytes that are still to be read, and the context they are held against.
///
/// Every read checks first; nothing here allocates.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
    more_may_follow: bool,
    context: Option<Context<'a>>,
}

/// What this side knows, of a type that the structs name.
#[derive(Debug, Clone, Copy)]
struct Context<'a> {
    value: &'a dyn Any,
    type_name: &'static str,
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`, which are all there is.
    pub fn new(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes, more_may_follow: false, context: None }
    }

    /// Reads from the start of `bytes`, which more may follow: wherever the answer depends on bytes that are not there yet, the
    /// error is [`Problem::Truncated`].
    pub fn partial(bytes: &'a [u8]) -> Self {
        Reader { rest: bytes, more_may_follow: true, context: None }
    }

    /// The same reader, with what the structs of context `C` are held against.
    #[must_use]
    pub fn with_context<C: Any>(self, context: &'a C) -> Self {
        Reader { context: Some(Context { value: context, type_name: type_name::<C>() }), ..self }
    }

    /// The context that the struct `name` wants.
    pub fn context<C: Any>(&self, name: &'static str) -> Result<&'a C, Error> {
        let missing = || {
            let given = self.context.map(|context| context.type_name);
            Problem::MissingContext { name, wanted: type_name::<C>(), given }.into()
        };
        self.context.and_then(|context| context.value.downcast_ref()).ok_or_else(missing)
    }

    /// Bytes not read yet.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// The next `count` bytes.
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let truncated = Problem::Truncated { needed: count as u64, left: self.rest.len() as u64 };
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let truncated = Problem::Truncated { needed: N as u64, left: self.rest.len() as u64 };
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    /// One byte.
    pub fn byte(&mut self) -> Result<u8, Error> {
        Ok(self.array::<1>()?[0])
    }

    /// The bytes left if they start with `count` bytes that `is_wanted` accepts, one after the other; nothing is read.
    ///
    /// `is_wanted` gets the index of a byte and the byte. It is asked for no byte after the first it does not want, so that bytes
    /// which are still to come matter only if they can change the answer.
    pub(crate) fn peek(
        &self,
        mut is_wanted: impl FnMut(usize, u8) -> Peek,
    ) -> Result<Option<&'a [u8]>, Error> {
        for (index, byte) in self.rest.iter().enumerate() {
            match is_wanted(index, *byte) {
                Peek::Unwanted => return Ok(None),
                Peek::Next => {}
                Peek::Last => return Ok(Some(&self.rest[..=index])),
            }
        }
        if self.more_may_follow {
            return Err(Problem::Truncated {
                needed: self.rest.len() as u64 + 1,
                left: self.rest.len() as u64,
            }
            .into());
        }
        Ok(None)
    }
}

/// What a look at one byte says.
pub(crate) enum Peek {
    /// This is something else.
    Unwanted,
    /// So far it is what was looked for.
    Next,
    /// It is what was looked for, and this was its last byte.
    Last,
}
