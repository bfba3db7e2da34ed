//! What migrations are measured of: the combinations of what was asked for, and the machine of each.

use std::fmt;
use std::path::Path;

use anyhow::ensure;
use indicatif::HumanBytes;
use serde::Serialize;

use super::copy::Link;
use super::host::available_bytes;
use crate::config::{DEFAULT_QUEUE_PAIRS, display_size};

/// RAM that the exerciser needs for itself; the rest is filled.
pub(super) const GUEST_BYTES: u64 = 32 << 20;
/// What is filled at most: in one piece, and the exerciser reaches the RAM below 3 GiB only. More stays unpopulated.
pub(super) const FILLED_BYTES_MAX: u64 = 5 << 29;
/// Bytes of the first namespace, a file.
pub(super) const DISK_BYTES: u64 = 64 << 20;
/// Bytes of each other namespace that is a file.
const FILE_BYTES: u64 = 1 << 20;
/// Largest number of namespaces: with the holes between them the last has the last identifier.
pub const NAMESPACES_MAX: u32 = 256;
/// Largest number of queue pairs.
pub const QUEUE_PAIRS_MAX: u16 = 256;
/// Commands in flight, on whatever number of queues: the disks have as much to finish at the stop.
const IN_FLIGHT: u16 = 8;

/// What is to be combined. Each list has an element.
#[derive(Clone, Debug)]
pub struct Lists {
    /// The guest's RAM.
    pub memory_bytes: Vec<u64>,
    /// What the guest rewrites of it each second.
    pub dirty_bytes_per_second: Vec<u64>,
    /// Connections for guest memory.
    pub channels: Vec<u16>,
    /// What connects the processes.
    pub transports: Vec<Transport>,
    /// Queue pairs that the guest keeps busy.
    pub queue_pairs: Vec<u16>,
    /// Namespaces of its controller.
    pub namespaces: Vec<u32>,
    /// Measure TCP with TLS too.
    pub tls: bool,
}

impl Default for Lists {
    fn default() -> Self {
        Self {
            memory_bytes: vec![1 << 30],
            dirty_bytes_per_second: vec![0],
            channels: vec![engine::CHANNELS_DEFAULT],
            transports: vec![Transport::Unix],
            queue_pairs: vec![1],
            namespaces: vec![1],
            tls: false,
        }
    }
}

/// A guest, and a way for it to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Case {
    /// The guest's RAM.
    pub memory_bytes: u64,
    /// What the guest is asked to rewrite of it each second.
    pub dirty_bytes_per_second: u64,
    /// How it moves.
    pub transport: Transport,
    /// Whether TLS protects the links.
    pub tls: bool,
    /// Connections for its memory beside that for everything else; none where memory itself is handed over.
    pub channels: Option<u16>,
    /// I/O queue pairs, all busy.
    pub queue_pairs: u16,
    /// Namespaces of the controller.
    pub namespaces: u32,
}

impl Case {
    /// Every combination, the guest with most memory last; where memory is handed over the number of channels makes no cases. Those that
    /// differ in TLS or in the controller alone follow on each other, so that the host is the same for them.
    #[must_use]
    pub fn all(lists: &Lists) -> Vec<Self> {
        let mut cases = Vec::new();
        let mut memory = lists.memory_bytes.clone();
        memory.sort_unstable();
        for memory_bytes in memory {
            for &transport in &lists.transports {
                for &dirty_bytes_per_second in &lists.dirty_bytes_per_second {
                    for channels in transport.channels(&lists.channels) {
                        let machine = Self {
                            memory_bytes,
                            dirty_bytes_per_second,
                            transport,
                            tls: false,
                            channels,
                            queue_pairs: 1,
                            namespaces: 1,
                        };
                        cases.extend(machine.with_controllers(lists));
                    }
                }
            }
        }
        cases
    }

    /// The same with each controller, and each with TLS too, if that is asked for and can be.
    fn with_controllers(self, lists: &Lists) -> impl Iterator<Item = Self> {
        let tls = lists.tls && self.transport == Transport::Tcp;
        let controllers = lists.queue_pairs.iter().flat_map(|&queue_pairs| {
            lists.namespaces.iter().map(move |&namespaces| (queue_pairs, namespaces))
        });
        controllers.flat_map(move |(queue_pairs, namespaces)| {
            let case = Self { queue_pairs, namespaces, ..self };
            std::iter::once(case).chain(tls.then_some(Self { tls: true, ..case }))
        })
    }

    /// Bytes of RAM that the guest fills.
    #[must_use]
    pub fn filled_bytes(&self) -> u64 {
        self.memory_bytes.saturating_sub(GUEST_BYTES).min(FILLED_BYTES_MAX)
    }

    /// How often memory is there at the same time: source, destination, and the two of the reference copy.
    fn copies(&self) -> u64 {
        if self.transport == Transport::Local { 1 } else { 4 }
    }

    /// Whether this host can do it.
    ///
    /// # Errors
    /// It has too little memory, or the guest has.
    pub fn check(&self) -> anyhow::Result<()> {
        ensure!(self.filled_bytes() > 0, "the guest needs more than {} of RAM", HumanBytes(GUEST_BYTES));
        let needed = self.filled_bytes() * self.copies();
        let left = available_bytes().unwrap_or(u64::MAX);
        ensure!(
            needed <= left,
            "{self}: that takes {} of memory, and the host has {} left",
            HumanBytes(needed),
            HumanBytes(left),
        );
        Ok(())
    }

    /// The flags of the machine, and the files that it needs with their bytes; all in `folder`.
    pub(super) fn machine(&self, folder: &Path, number: usize) -> (Vec<String>, Vec<(String, u64)>) {
        let disk = folder.join(format!("disk-{number}.img")).display().to_string();
        let memory = display_size(self.memory_bytes);
        let queue_pairs = self.queue_pairs.max(DEFAULT_QUEUE_PAIRS);
        let mut flags = vec!["--memory".to_owned(), memory];
        flags.extend(["--nvme".to_owned(), format!("serial=bench,queues={queue_pairs}")]);
        let mut files = Vec::new();
        for (index, nsid) in (0..self.namespaces).map(|index| (index, 1 + 4 * index + index % 4)) {
            let file = |path: &str| format!("backend=file,path={path}");
            let backend = match (index, index % 5) {
                (0, _) => {
                    files.push((disk.clone(), DISK_BYTES));
                    file(&disk)
                }
                (_, 0) => {
                    let path = folder.join(format!("disk-{number}-{nsid}.img")).display().to_string();
                    let backend = file(&path);
                    files.push((path, FILE_BYTES));
                    backend
                }
                // What is null keeps nothing, so the guest, which verifies what it wrote, is to leave it alone.
                (_, 1) => "backend=null,size=1G,ro".to_owned(),
                _ => "backend=memory,size=128K".to_owned(),
            };
            flags.extend(["--ns".to_owned(), format!("controller=bench,nsid={nsid},{backend}")]);
        }
        (flags, files)
    }

    /// What the exerciser does.
    pub(super) fn words(&self) -> String {
        let Self { queue_pairs, dirty_bytes_per_second, .. } = *self;
        let filled = self.filled_bytes();
        // Each line takes the guest several milliseconds, so there are few of them.
        format!(
            "queues={queue_pairs} inflight={IN_FLIGHT} ram={filled} dirty={dirty_bytes_per_second} check=0 report=1000"
        )
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { memory_bytes, dirty_bytes_per_second, transport, tls, channels, queue_pairs, namespaces } =
            *self;
        let (memory, dirty) = (display_size(memory_bytes), display_size(dirty_bytes_per_second));
        write!(f, "{memory} of RAM, dirties {dirty}/s, over {}", transport.describe())?;
        if tls {
            f.write_str(" with TLS")?;
        }
        if let Some(channels) = channels {
            write!(f, ", channels: {channels}")?;
        }
        if (queue_pairs, namespaces) != (1, 1) {
            write!(f, ", queue pairs: {queue_pairs}, namespaces: {namespaces}")?;
        }
        Ok(())
    }
}

/// How the two processes are connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// A Unix socket.
    #[default]
    Unix,
    /// TCP over loopback.
    Tcp,
    /// A Unix socket over which the memory itself goes.
    Local,
}

impl Transport {
    fn describe(self) -> &'static str {
        match self {
            Self::Unix => "a Unix socket",
            Self::Tcp => "TCP",
            Self::Local => "a Unix socket, handed over",
        }
    }

    /// As it is typed.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Unix => "unix",
            Self::Tcp => "tcp",
            Self::Local => "local",
        }
    }

    /// What the reference copy goes over, where there is one.
    pub(super) fn link(self) -> Option<Link> {
        match self {
            Self::Unix => Some(Link::Unix),
            Self::Tcp => Some(Link::Tcp),
            Self::Local => None,
        }
    }

    /// Those of `channels` that make a difference.
    fn channels(self, channels: &[u16]) -> Vec<Option<u16>> {
        match self {
            Self::Unix | Self::Tcp => channels.iter().copied().map(Some).collect(),
            Self::Local => vec![None],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cases_are_all_combinations_the_largest_guest_last() {
        let lists = Lists {
            memory_bytes: vec![4 << 30, 256 << 20],
            dirty_bytes_per_second: vec![0, 100 << 20],
            channels: vec![1, 2],
            transports: vec![Transport::Unix, Transport::Local],
            ..Lists::default()
        };
        let text: Vec<String> = Case::all(&lists).iter().map(Case::to_string).collect();
        let one = [
            "256M of RAM, dirties 0/s, over a Unix socket, channels: 1",
            "256M of RAM, dirties 0/s, over a Unix socket, channels: 2",
            "256M of RAM, dirties 100M/s, over a Unix socket, channels: 1",
            "256M of RAM, dirties 100M/s, over a Unix socket, channels: 2",
            "256M of RAM, dirties 0/s, over a Unix socket, handed over",
            "256M of RAM, dirties 100M/s, over a Unix socket, handed over",
        ];
        let other = one.map(|line| line.replace("256M", "4G"));
        assert_eq!(text[..6], one);
        assert_eq!(text[6..], other);
    }

    #[test]
    fn controllers_and_tls_are_compared_side_by_side() {
        let lists = Lists {
            transports: vec![Transport::Unix, Transport::Tcp],
            queue_pairs: vec![1, 64],
            namespaces: vec![1, 256],
            tls: true,
            ..Lists::default()
        };
        let cases = Case::all(&lists);
        let controller = |case: &Case| (case.queue_pairs, case.namespaces, case.tls);
        let controllers = [(1, 1), (1, 256), (64, 1), (64, 256)];
        let unix: Vec<_> = cases[..4].iter().map(controller).collect();
        assert_eq!(unix, controllers.map(|(queue_pairs, namespaces)| (queue_pairs, namespaces, false)));
        let tcp: Vec<_> = cases[4..].iter().map(controller).collect();
        let both = controllers.map(|(one, other)| [(one, other, false), (one, other, true)]);
        assert_eq!(tcp, both.as_flattened());
        assert_eq!(
            cases[11].to_string(),
            "1G of RAM, dirties 0/s, over TCP with TLS, channels: 2, queue pairs: 64, namespaces: 256"
        );
    }

    #[test]
    fn a_guest_fills_what_it_reaches() {
        let case = |memory_bytes| Case { memory_bytes, ..Case::all(&Lists::default())[0] };
        assert_eq!(case(1 << 30).filled_bytes(), (1 << 30) - GUEST_BYTES);
        assert_eq!([4, 8].map(|gibibytes| case(gibibytes << 30).filled_bytes()), [FILLED_BYTES_MAX; 2]);
        let small = case(GUEST_BYTES);
        assert!(small.check().unwrap_err().to_string().contains("needs more than 32.00 MiB"));
    }

    #[test]
    fn a_machine_has_the_namespaces_asked_for() {
        let case = Case::all(&Lists::default())[0];
        let (flags, files) = case.machine(Path::new("/x"), 3);
        let namespace = "controller=bench,nsid=1,backend=file,path=/x/disk-3.img";
        assert_eq!(flags, ["--memory", "1G", "--nvme", "serial=bench,queues=64", "--ns", namespace]);
        assert_eq!(files, [("/x/disk-3.img".to_owned(), DISK_BYTES)]);
        assert!(case.words().starts_with("queues=1 inflight=8 ram=1040187392 "), "{}", case.words());

        let case = Case { queue_pairs: 100, namespaces: NAMESPACES_MAX, ..case };
        let (flags, files) = case.machine(Path::new("/x"), 0);
        assert!(
            flags.contains(&"serial=bench,queues=100".to_owned())
                && case.words().contains("queues=100 inflight=8")
        );
        let count = |word: &str| flags.iter().filter(|flag| flag.contains(word)).count();
        assert_eq!(["nsid=", "null", "memory,", "file"].map(count), [256, 51, 153, 52]);
        assert_eq!(files.len(), 52);
        let last = crate::config::MAX_NSID;
        assert!(flags.iter().any(|flag| flag.contains(&format!("nsid={last},"))), "{flags:?}");
    }
}
