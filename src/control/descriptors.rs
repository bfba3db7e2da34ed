//! Descriptors that a client has given to the machine, by the names that it gave them: QEMU's `getfd` and `closefd`.
//!
//! They belong to the client's connection and are closed with it. One comes with the bytes of a request, and is kept for the next
//! `getfd` of that client; a second one takes its place.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::{Value, json};
use transport::Received;

use super::commands::Context;
use super::protocol::{Arguments, QmpError};

/// How many a client may have given and not used.
const NAMED_MAX: usize = 16;
/// How many come with one read. QEMU takes one with a request.
const RECEIVED_MAX: usize = 4;

/// Those of one client.
#[derive(Debug, Default)]
pub(super) struct Descriptors(Mutex<Given>);

#[derive(Debug, Default)]
struct Given {
    arrived: Option<OwnedFd>,
    named: BTreeMap<String, OwnedFd>,
}

impl Descriptors {
    fn lock(&self) -> MutexGuard<'_, Given> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads from the client, and keeps the descriptor that comes along.
    pub fn read(&self, stream: &UnixStream, bytes: &mut [u8]) -> io::Result<usize> {
        let mut received = Received::new(RECEIVED_MAX);
        let count = transport::read_with(stream, bytes, &mut received)?;
        if let Some(descriptor) = received.into_descriptors().pop() {
            self.lock().arrived = Some(descriptor);
        }
        Ok(count)
    }

    /// The descriptor of this name, which is gone then.
    pub fn take(&self, name: &str) -> Result<OwnedFd, QmpError> {
        let found = self.lock().named.remove(name);
        found.ok_or_else(|| QmpError::generic(format!("File descriptor named '{name}' not found")))
    }
}

/// `getfd`: names the descriptor that came with the request.
pub(super) fn get(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let name = arguments.string("fdname")?;
    arguments.finish()?;
    let mut given = context.descriptors.lock();
    let descriptor = given
        .arrived
        .take()
        .ok_or_else(|| QmpError::generic("No file descriptor supplied via SCM_RIGHTS"))?;
    if name.starts_with(|first: char| first.is_ascii_digit()) {
        return Err(QmpError::generic("Parameter 'fdname' expects a name not starting with a digit"));
    }
    if given.named.len() == NAMED_MAX && !given.named.contains_key(&name) {
        return Err(QmpError::generic(format!("{NAMED_MAX} file descriptors are there already")));
    }
    given.named.insert(name, descriptor);
    Ok(json!({}))
}

/// `closefd`: the client does without it.
pub(super) fn close(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let name = arguments.string("fdname")?;
    arguments.finish()?;
    context.descriptors.take(&name)?;
    Ok(json!({}))
}
