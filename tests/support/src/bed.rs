//! Where a test happens.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use ferry::drive::{Lines, Process};
use rustix::fs::{FlockOperation, flock};
use tempfile::TempDir;

/// So many processes are looked at when a test fails, the latest.
const SAID_MAX: usize = 32;

/// The host's KVM for the duration of a test, and a folder for its files.
#[derive(Debug)]
pub struct TestBed {
    program: PathBuf,
    folder: TempDir,
    said: Mutex<VecDeque<Said>>,
    /// Released last, when all else is gone.
    _lock: File,
}

/// What a process said, kept beyond its end.
#[derive(Debug)]
struct Said {
    name: String,
    console: Lines,
    log: Lines,
}

impl TestBed {
    /// Waits until no other test of this host uses KVM. `program` is the `ferry` to test.
    #[must_use]
    pub fn new(program: impl Into<PathBuf>) -> Self {
        let lock = std::env::temp_dir().join("ferry-tests-kvm.lock");
        let lock =
            OpenOptions::new().create(true).append(true).open(&lock).expect("the lock file can be made");
        flock(&lock, FlockOperation::LockExclusive).expect("the lock file can be locked");
        let kvm = OpenOptions::new().read(true).write(true).open("/dev/kvm");
        drop(kvm.expect("these tests need /dev/kvm"));
        let folder = tempfile::Builder::new().prefix("ferry-test-").tempdir().expect("a scratch folder");
        Self { program: program.into(), folder, said: Mutex::default(), _lock: lock }
    }

    /// The path of a file of this test.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// Makes an empty image of `size_bytes`, without blocks.
    #[must_use]
    pub fn image(&self, name: &str, size_bytes: u64) -> PathBuf {
        let path = self.path(name);
        File::create(&path).and_then(|file| file.set_len(size_bytes)).expect("an image can be made");
        path
    }

    /// The names of all files of this test, in order.
    #[must_use]
    pub fn files(&self) -> Vec<String> {
        let entries = self.folder.path().read_dir().expect("the scratch folder can be read");
        let name = |entry: std::io::Result<std::fs::DirEntry>| {
            entry.expect("an entry").file_name().to_string_lossy().into_owned()
        };
        let mut names: Vec<String> = entries.map(name).collect();
        names.sort();
        names
    }

    /// The program under test.
    #[must_use]
    pub fn program(&self) -> &Path {
        &self.program
    }

    /// Starts `ferry` with `arguments`; `name` is how a failing test calls the process.
    #[must_use]
    pub fn ferry(&self, name: &str, arguments: &[String]) -> Process {
        let process = Process::spawn(name, &self.program, arguments).expect("ferry starts");
        self.remember(&process);
        process
    }

    /// Keeps what `process` says for the case that the test fails.
    pub(crate) fn remember(&self, process: &Process) {
        let Process { console, log, .. } = process;
        let said = Said { name: process.name().to_owned(), console: console.clone(), log: log.clone() };
        let mut all = self.said.lock().expect("no test panics here");
        all.push_back(said);
        if all.len() > SAID_MAX {
            all.pop_front();
        }
    }
}

impl Drop for TestBed {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        for Said { name, console, log } in self.said.lock().iter().flat_map(|said| said.iter()) {
            eprintln!("--- console of {name}\n{}\n--- log of {name}\n{}", console.tail(60), log.tail(60));
        }
    }
}
