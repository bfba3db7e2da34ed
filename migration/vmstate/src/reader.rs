//! A cursor over the bytes of a state that cannot run past their end, nor past the memory that so many bytes may take.

use std::any::{Any, TypeId, type_name};

use crate::{Error, Problem};

/// Memory that any load may take. A little less than the 1 MiB that is promised: errors and their paths need some too.
const MEMORY_BASE_BYTES: usize = 0xf_0000;

/// Memory that a load may take for each byte of its input.
const MEMORY_PER_INPUT_BYTE: usize = 16;

/// The bytes that are still to be read, and the context they are held against.
///
/// Every read checks first. Every allocation for what is read comes out of an allowance that depends on the number of bytes alone,
/// so that a state of many empty things costs no more than it may, whatever its description permits.
#[derive(Debug, Clone)]
pub struct Reader<'a> {
    rest: &'a [u8],
    more_may_follow: bool,
    /// Bytes that follow at least what is being read: those of elements that were counted and not come to yet.
    promised: usize,
    context: Option<Context<'a>>,
    allowance: Allowance,
    /// The recursive structs that are being loaded, from the outermost inwards.
    levels: Vec<TypeId>,
}

/// What this side knows, of a type that the structs name.
#[derive(Debug, Clone, Copy)]
struct Context<'a> {
    value: &'a dyn Any,
    type_name: &'static str,
}

/// Memory that may be taken, and how much of that is left.
#[derive(Debug, Clone, Copy)]
struct Allowance {
    limit: usize,
    left: usize,
}

impl<'a> Reader<'a> {
    /// Reads from the start of `bytes`, which are all there is.
    pub fn new(bytes: &'a [u8]) -> Self {
        let limit = MEMORY_PER_INPUT_BYTE.saturating_mul(bytes.len()).saturating_add(MEMORY_BASE_BYTES);
        let allowance = Allowance { limit, left: limit };
        Reader {
            rest: bytes,
            more_may_follow: false,
            promised: 0,
            context: None,
            allowance,
            levels: Vec::new(),
        }
    }

    /// Reads from the start of `bytes`, which more may follow: wherever the answer depends on bytes that are not there yet, the
    /// error is [`Problem::Truncated`]. It needs what the rest of the state takes at least, as far as that is known, so that whoever
    /// waits for so much tries again a few times and not with every element.
    pub fn partial(bytes: &'a [u8]) -> Self {
        Reader { more_may_follow: true, ..Reader::new(bytes) }
    }

    /// The same reader, with what the structs of context `C` are held against.
    #[must_use]
    pub fn with_context<C: Any>(self, context: &'a C) -> Self {
        Reader { context: Some(Context { value: context, type_name: type_name::<C>() }), ..self }
    }

    /// The context, for a struct that names this type.
    pub fn context<C: Any>(&self) -> Result<&'a C, Error> {
        let missing = || {
            let given = self.context.map(|context| context.type_name);
            Problem::MissingContext { wanted: type_name::<C>(), given }.into()
        };
        self.context.and_then(|context| context.value.downcast_ref()).ok_or_else(missing)
    }

    /// Bytes not read yet.
    pub fn left(&self) -> usize {
        self.rest.len()
    }

    /// The next `count` bytes.
    #[inline]
    pub fn take(&mut self, count: usize) -> Result<&'a [u8], Error> {
        let Some((taken, rest)) = self.rest.split_at_checked(count) else {
            return Err(self.lacking(count));
        };
        self.rest = rest;
        Ok(taken)
    }

    /// The next `N` bytes as an array.
    #[inline]
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], Error> {
        let Some((taken, rest)) = self.rest.split_first_chunk::<N>() else {
            return Err(self.lacking(N));
        };
        self.rest = rest;
        Ok(*taken)
    }

    /// One byte.
    #[inline]
    pub fn byte(&mut self) -> Result<u8, Error> {
        Ok(self.array::<1>()?[0])
    }

    /// There are not `count` bytes, and after them would come what is promised.
    #[cold]
    fn lacking(&self, count: usize) -> Error {
        let promised = if self.more_may_follow { self.promised } else { 0 };
        self.truncated(count.saturating_add(promised))
    }

    #[cold]
    fn truncated(&self, needed: usize) -> Error {
        Problem::Truncated { needed: needed as u64, left: self.rest.len() as u64 }.into()
    }

    /// Room for `count` elements that take `least_bytes` each on the wire at least: refused, and nothing is allocated, if there are
    /// not that many bytes, or if so much memory may not be taken for a state of this size.
    pub(crate) fn room<T>(&mut self, count: usize, least_bytes: usize) -> Result<Vec<T>, Error> {
        let needed = count.saturating_mul(least_bytes);
        if needed > self.rest.len() {
            return Err(self.lacking(needed));
        }
        self.spend(count.saturating_mul(size_of::<T>()))?;
        Ok(Vec::with_capacity(count))
    }

    /// So many bytes will follow at least, in elements that are read one by one.
    pub(crate) fn promise(&mut self, bytes: usize) {
        self.promised = self.promised.saturating_add(bytes);
    }

    /// Comes to the next element, of which that many bytes were promised. A load that fails leaves promises open: its reader is done
    /// with.
    #[inline]
    pub(crate) fn keep(&mut self, bytes: usize) {
        self.promised = self.promised.saturating_sub(bytes);
    }

    /// Takes `bytes` of memory out of the allowance.
    #[inline]
    pub(crate) fn spend(&mut self, bytes: usize) -> Result<(), Error> {
        match self.allowance.left.checked_sub(bytes) {
            Some(left) => {
                self.allowance.left = left;
                Ok(())
            }
            None => Err(self.overspent(bytes)),
        }
    }

    /// Gives back memory that has been freed.
    pub(crate) fn refund(&mut self, bytes: usize) {
        self.allowance.left += bytes;
    }

    #[cold]
    fn overspent(&self, bytes: usize) -> Error {
        let Allowance { limit, left } = self.allowance;
        if self.more_may_follow {
            // More bytes allow more memory, so they decide.
            let more = (bytes - left).div_ceil(MEMORY_PER_INPUT_BYTE);
            return self.truncated(self.rest.len().saturating_add(more));
        }
        Problem::TooMuchMemory { limit }.into()
    }

    /// Begins to load a recursive struct that may lie inside itself `maximum` levels deep, the outermost included.
    pub(crate) fn enter<T: 'static>(&mut self, name: &'static str, maximum: u32) -> Result<(), Error> {
        let level = TypeId::of::<T>();
        let deep = self.levels.iter().filter(|outer| **outer == level).count();
        if deep as u64 >= u64::from(maximum) {
            return Err(Problem::TooDeep { name, maximum }.into());
        }
        self.levels.push(level);
        Ok(())
    }

    /// Ends what [`Reader::enter`] began. A load that fails never leaves: its reader is done with.
    pub(crate) fn leave(&mut self) {
        self.levels.pop();
    }

    /// The next byte, which stays.
    #[inline]
    pub(crate) fn first(&self) -> Option<u8> {
        self.rest.first().copied()
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
            return Err(self.truncated(self.rest.len() + 1));
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
