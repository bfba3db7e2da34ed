//! What a source and its destination have in common.

use std::path::Path;

use crate::{TestBed, Vm};

/// The flags of a machine, without those that say how it starts.
#[derive(Clone, Debug, Default)]
pub struct Machine {
    flags: Vec<String>,
}

impl Machine {
    /// A machine with `memory` (as `--memory` takes it) and nothing else.
    #[must_use]
    pub fn new(memory: &str) -> Self {
        Self::default().flag("--memory", memory)
    }

    /// Adds any flag with its value.
    #[must_use]
    pub fn flag(mut self, name: &str, value: impl Into<String>) -> Self {
        self.flags.extend([name.to_owned(), value.into()]);
        self
    }

    /// Adds a flag without a value.
    #[must_use]
    pub fn switch(mut self, name: &str) -> Self {
        self.flags.push(name.to_owned());
        self
    }

    /// Adds a controller: the value of `--nvme`.
    #[must_use]
    pub fn controller(self, options: &str) -> Self {
        self.flag("--nvme", options)
    }

    /// Adds a namespace: the value of `--ns`.
    #[must_use]
    pub fn namespace(self, options: &str) -> Self {
        self.flag("--ns", options)
    }

    /// Adds a namespace on an image.
    #[must_use]
    pub fn image(self, controller: &str, nsid: u32, path: &Path) -> Self {
        self.namespace(&format!("controller={controller},nsid={nsid},backend=file,path={}", path.display()))
    }

    /// Boots `kernel` on it, in a process called `name`; returns when the guest has started.
    #[must_use]
    pub fn boot(&self, bed: &TestBed, name: &str, kernel: &str, cmdline: &str) -> Vm {
        let flags = self.clone().flag("--kernel", kernel).flag("--cmdline", cmdline).flags;
        let mut vm = Vm::start(bed, name, flags);
        vm.wait_until_it_started();
        vm
    }

    /// Lets it wait for a guest from `uri`, and waits until it does.
    #[must_use]
    pub fn expect(&self, bed: &TestBed, name: &str, uri: &str) -> Vm {
        let mut vm = Vm::start(bed, name, self.clone().flag("--incoming", uri).flags);
        vm.wait_until_it_listens();
        vm
    }

    /// The flags, as `ferry run` takes them.
    #[must_use]
    pub fn flags(&self) -> &[String] {
        &self.flags
    }
}
