//! One channel's connection: bytes within deadlines, until the attempt is over.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use transport::Connection;
use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

use crate::Error;
use crate::link::{PIECE_BYTES, Step, is_pause};

/// Whether the channels of an attempt are to end, and the first cause. What fails in the others then comes from it.
#[derive(Debug, Default)]
pub(crate) struct Watch {
    over: AtomicBool,
    cause: Mutex<Option<Error>>,
}

impl Watch {
    /// Ends all channels.
    pub fn end(&self) {
        self.over.store(true, Ordering::SeqCst);
    }

    /// Ends all channels for `error`, unless they were to end before.
    pub fn fail(&self, error: Error) {
        let mut cause = self.cause();
        if !self.over.swap(true, Ordering::SeqCst) {
            *cause = Some(error);
        }
    }

    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Why they ended; once.
    pub fn take_cause(&self) -> Option<Error> {
        self.cause().take()
    }

    fn check(&self) -> Result<(), Error> {
        // Whoever ended the channels knows the cause; this is none.
        if self.is_over() { Err(Error::Cancelled) } else { Ok(()) }
    }

    fn cause(&self) -> MutexGuard<'_, Option<Error>> {
        self.cause.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A connection as a channel uses it.
pub(crate) struct Lane {
    connection: Connection,
}

impl Lane {
    /// The connection's timeouts are those of a [`Link`](crate::link::Link), which it was before.
    pub fn new(connection: Connection) -> Self {
        Self { connection }
    }

    /// Sends all of `head` and `memory`.
    pub fn send<B: BitmapSlice>(
        &mut self,
        head: &[u8],
        memory: &[VolatileSlice<'_, B>],
        step: Step<'_>,
        watch: &Watch,
    ) -> Result<(), Error> {
        let total = head.len() + memory.iter().map(VolatileSlice::len).sum::<usize>();
        let pieces = u32::try_from(total.div_ceil(PIECE_BYTES).max(1)).unwrap_or(u32::MAX);
        let step = Step { patience: step.patience * pieces, ..step };
        let since = Instant::now();
        let mut sent = 0;
        while sent < total {
            step.check()?;
            watch.check()?;
            match self.connection.send_memory(head, memory, sent) {
                Ok(0) => return Err(step.closed()),
                Ok(count) => {
                    sent += count;
                    if sent < total {
                        step.patient(since)?;
                    }
                }
                Err(error) if is_pause(&error) => step.patient(since)?,
                Err(source) => return Err(Error::lost(step.doing, source)),
            }
        }
        Ok(())
    }

    /// Fills `memory`. Within a batch (`since` its beginning) the bytes come in time; between two the channel may be silent.
    fn fill<B: BitmapSlice>(
        &mut self,
        memory: &[VolatileSlice<'_, B>],
        since: Option<Instant>,
        step: Step<'_>,
        watch: &Watch,
    ) -> Result<(), Error> {
        let total: usize = memory.iter().map(VolatileSlice::len).sum();
        let (mut filled, mut since) = (0, since);
        while filled < total {
            step.check()?;
            watch.check()?;
            match self.connection.receive_memory(memory, filled) {
                Ok(0) if since.is_none() => return Err(step.closed()),
                Ok(0) => {
                    let source = io::Error::new(io::ErrorKind::UnexpectedEof, "cut within a batch");
                    return Err(Error::Lost { doing: step.doing, source });
                }
                Ok(count) => {
                    filled += count;
                    if filled < total {
                        step.patient(*since.get_or_insert_with(Instant::now))?;
                    }
                }
                Err(error) if is_pause(&error) => since.map_or(Ok(()), |since| step.patient(since))?,
                Err(source) => return Err(Error::lost(step.doing, source)),
            }
        }
        Ok(())
    }
}

/// Where batches come from.
pub(crate) trait Input {
    /// The next bytes. `begins`: a batch begins with them, and nothing is wrong if it takes a while.
    fn read(&mut self, buffer: &mut [u8], begins: bool) -> Result<(), Error>;

    /// The next bytes, straight into guest memory.
    fn read_memory<B: BitmapSlice>(&mut self, memory: &[VolatileSlice<'_, B>]) -> Result<(), Error>;
}

/// A [`Lane`] that is read within `step` until `watch` is over.
pub(crate) struct LaneInput<'a> {
    pub lane: Lane,
    pub step: Step<'a>,
    pub watch: &'a Watch,
    /// When the batch began.
    pub since: Instant,
}

impl Input for LaneInput<'_> {
    fn read(&mut self, buffer: &mut [u8], begins: bool) -> Result<(), Error> {
        let since = (!begins).then_some(self.since);
        self.lane.fill(&[VolatileSlice::from(buffer)], since, self.step, self.watch)?;
        if begins {
            self.since = Instant::now();
        }
        Ok(())
    }

    fn read_memory<B: BitmapSlice>(&mut self, memory: &[VolatileSlice<'_, B>]) -> Result<(), Error> {
        self.lane.fill(memory, Some(self.since), self.step, self.watch)
    }
}
