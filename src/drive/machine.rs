//! A virtual machine that is to run in one process after the other.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use transport::Uri;

use super::Ferry;

/// What the processes of one virtual machine have in common.
#[derive(Clone, Debug)]
pub struct Machine {
    /// The `ferry` program.
    pub program: PathBuf,
    /// Where control sockets and migration sockets are made; its path is short enough for them (about 80 bytes).
    pub folder: PathBuf,
    /// Flags that the two sides of a migration share: RAM, vCPUs, controllers, namespaces.
    pub flags: Vec<OsString>,
}

impl Machine {
    /// A machine of these flags, which are split at blanks.
    #[must_use]
    pub fn new(program: &Path, folder: &Path, flags: &str) -> Self {
        let flags = flags.split_whitespace().map(OsString::from).collect();
        Self { program: program.to_owned(), folder: folder.to_owned(), flags }
    }

    /// Starts the process `name`, which boots the guest `kernel` with this command line.
    ///
    /// # Errors
    /// It cannot be started, or ended before it answered.
    pub fn boot(&self, name: &str, kernel: &Path, cmdline: &str) -> anyhow::Result<Ferry> {
        self.start(name, ["--kernel".into(), kernel.into(), "--cmdline".into(), cmdline.into()])
    }

    /// Starts the process `name`, which waits for the guest at a Unix socket of its own. Returns when it listens.
    ///
    /// # Errors
    /// It cannot be started, or ended before it listened.
    pub fn wait_for_guest(&self, name: &str) -> anyhow::Result<Ferry> {
        self.wait_for_guest_at(name, &Uri::Unix(self.folder.join(format!("{name}.migrate"))))
    }

    /// Starts the process `name`, which waits for the guest at `uri`; a TCP port may be 0. Returns when it listens at
    /// [`Ferry::listens_at`].
    ///
    /// # Errors
    /// It cannot be started, or ended before it listened.
    pub fn wait_for_guest_at(&self, name: &str, uri: &Uri) -> anyhow::Result<Ferry> {
        let mut ferry = self.start(name, ["--incoming".into(), uri.to_string().into()])?;
        ferry.wait_until_it_listens()?;
        Ok(ferry)
    }

    /// Starts the process `name` with these flags besides those of the machine. Returns when it answers. It ends with the
    /// thread that calls this.
    ///
    /// # Errors
    /// It cannot be started, or ended before it answered.
    pub fn start(&self, name: &str, flags: impl IntoIterator<Item = OsString>) -> anyhow::Result<Ferry> {
        let flags = self.flags.iter().cloned().chain(flags).chain(["--exit-with-parent".into()]);
        Ferry::start(&self.program, name, &self.folder.join(format!("{name}.api")), flags)
    }
}
