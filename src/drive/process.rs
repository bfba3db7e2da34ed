//! One driven process.

use std::ffi::OsStr;
use std::fmt;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::retry_on_intr;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use rustix::time::Timespec;

use super::Lines;

/// How long what a process has written may take to be read here after its end. A child that it left behind may keep its
/// console open for ever.
const LAST_WORDS: Duration = Duration::from_secs(1);

/// A running program. Its standard output is its console, its standard input what is typed there, its standard error its log.
/// Dropping it ends the process.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    descriptor: OwnedFd,
    input: Option<ChildStdin>,
    /// Lines of the console.
    pub console: Lines,
    /// Lines of the log.
    pub log: Lines,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit(ExitStatus);

impl Exit {
    /// Whether it ended with status 0.
    #[must_use]
    pub fn success(self) -> bool {
        self.0.success()
    }

    /// Its exit status, unless a signal ended it.
    #[must_use]
    pub fn code(self) -> Option<i32> {
        self.0.code()
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.0.code(), self.0.signal()) {
            (Some(code), _) => write!(f, "status {code}"),
            (None, Some(signal)) => write!(f, "signal {signal}"),
            (None, None) => f.write_str("an unknown status"),
        }
    }
}

impl Process {
    /// Starts `program`; `name` is how messages call it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn<A: AsRef<OsStr>>(
        name: &str,
        program: &Path,
        arguments: impl IntoIterator<Item = A>,
    ) -> anyhow::Result<Self> {
        let mut child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot start {name} ({})", program.display()))?;
        // Not reaped yet, so the number cannot have been given to another process.
        let descriptor = pidfd_open(Pid::from_child(&child), PidfdFlags::empty())
            .with_context(|| format!("cannot hold {name}"))?;
        let input = child.stdin.take();
        let output = child.stdout.take().context("standard output was asked for")?;
        let errors = child.stderr.take().context("standard error was asked for")?;
        let console = Lines::collect(output, &format!("{name}-console"))?;
        let log = Lines::collect(errors, &format!("{name}-log"))?;
        Ok(Self { name: name.to_owned(), child, descriptor, input, console, log })
    }

    /// How messages call it.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its process number.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Types `text` on its console.
    ///
    /// # Errors
    /// It has closed its standard input.
    pub fn type_in(&mut self, text: &str) -> anyhow::Result<()> {
        let input = self.input.as_mut().context("standard input was closed")?;
        input
            .write_all(text.as_bytes())
            .and_then(|()| input.flush())
            .with_context(|| self.describe("cannot type to"))
    }

    /// Waits for a line of the console; see [`Lines::wait_for`].
    ///
    /// # Errors
    /// No such line came in time, or the process ended; with the end of its console and log.
    pub fn wait_for_line<T>(
        &self,
        what: &str,
        from: usize,
        timeout: Duration,
        select: impl FnMut(&str) -> Option<T>,
    ) -> anyhow::Result<(T, usize)> {
        self.console.wait_for(from, timeout, select).ok_or_else(|| {
            if self.console.has_ended() {
                self.log.wait_for_end(LAST_WORDS);
            }
            anyhow!(self.describe(&format!("waited up to {timeout:?} in vain for {what} from")))
        })
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> anyhow::Result<()> {
        pidfd_send_signal(&self.descriptor, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// A handle of its own on the process, to signal it from elsewhere.
    ///
    /// # Errors
    /// No descriptor is left.
    pub(super) fn handle(&self) -> anyhow::Result<OwnedFd> {
        self.descriptor.try_clone().with_context(|| format!("cannot hold {}", self.name))
    }

    /// Whether it has ended, without waiting.
    ///
    /// # Errors
    /// The system cannot tell.
    pub fn has_ended(&mut self) -> anyhow::Result<bool> {
        Ok(self.child.try_wait()?.is_some())
    }

    /// Waits for `time`, to look again at something that no event tells.
    ///
    /// # Errors
    /// It has ended, so there is nothing more to look at; with the end of its console and log.
    pub fn pause(&mut self, time: Duration) -> anyhow::Result<()> {
        match self.poll_end(time)? {
            None => Ok(()),
            Some(exit) => bail!(self.describe(&format!("{exit} ended"))),
        }
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It has not ended in time; with the end of its console and log.
    pub fn wait(&mut self, timeout: Duration) -> anyhow::Result<Exit> {
        match self.poll_end(timeout)? {
            None => bail!(self.describe(&format!("waited {timeout:?} in vain for the end of"))),
            Some(exit) => Ok(exit),
        }
    }

    /// How it ended, if it does so in time.
    fn poll_end(&mut self, timeout: Duration) -> anyhow::Result<Option<Exit>> {
        let timeout = Timespec::try_from(timeout).context("a time that fits")?;
        let mut events = [PollFd::new(&self.descriptor, PollFlags::IN)];
        match retry_on_intr(|| poll(&mut events, Some(&timeout))) {
            Ok(0) => Ok(None),
            Ok(_) => {
                let exit = Exit(self.child.wait()?);
                self.console.wait_for_end(LAST_WORDS);
                self.log.wait_for_end(LAST_WORDS);
                Ok(Some(exit))
            }
            Err(error) => Err(error).context("cannot wait for a process"),
        }
    }

    /// The error that says why it is that `what` happened to this process, with the end of its console and log.
    #[must_use]
    pub fn blame(&self, what: &str, why: &anyhow::Error) -> anyhow::Error {
        anyhow!("{why:#}\n{}", self.describe(what))
    }

    /// `what` this process, with the end of its console and log.
    #[must_use]
    pub fn describe(&self, what: &str) -> String {
        let indent =
            |lines: &Lines| lines.tail(40).lines().map(|line| format!("\n    {line}")).collect::<String>();
        let Self { name, console, log, .. } = self;
        format!("{what} {name}\n  its console:{}\n  its log:{}", indent(console), indent(log))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // An error means that it has ended already.
        let _ = pidfd_send_signal(&self.descriptor, Signal::KILL);
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WATCHDOG: Duration = Duration::from_secs(30);

    fn shell(script: &str) -> Process {
        Process::spawn("shell", Path::new("/bin/sh"), ["-c", script]).unwrap()
    }

    #[test]
    fn a_process_is_talked_to_and_its_end_is_seen() {
        let mut process = shell("echo ready; read word; echo got $word; echo complaint >&2; exit 3");
        let (_, next) =
            process.wait_for_line("ready", 0, WATCHDOG, |line| (line == "ready").then_some(())).unwrap();
        process.type_in("hello\n").unwrap();
        process
            .wait_for_line("an answer", next, WATCHDOG, |line| (line == "got hello").then_some(()))
            .unwrap();
        let exit = process.wait(WATCHDOG).unwrap();
        assert_eq!((exit.code(), exit.success()), (Some(3), false));
        let error = process.wait_for_line("more", 0, WATCHDOG, |_| None::<()>).unwrap_err().to_string();
        assert!(error.contains("got hello") && error.contains("complaint"), "{error}");
    }

    #[test]
    fn a_process_that_does_not_end_is_ended_with_its_owner() {
        let mut process = shell("echo $$; exec cat");
        let select = |line: &str| line.parse::<u32>().ok();
        let (id, _) = process.wait_for_line("its number", 0, WATCHDOG, select).unwrap();
        assert_eq!(id, process.id());
        assert!(!process.has_ended().unwrap());
        assert!(process.wait(Duration::ZERO).is_err());
        process.signal(Signal::TERM).unwrap();
        assert_eq!(process.wait(WATCHDOG).unwrap().to_string(), "signal 15");
        assert!(Process::spawn("nothing", Path::new("/no/such/program"), ["x"]).is_err());
    }
}
