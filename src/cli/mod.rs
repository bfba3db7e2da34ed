//! The command line: what can be typed, and which part of ferry answers.

mod access;
mod bench;
mod control;
mod demo;
mod inspect;
mod limits;
mod migrate;
mod namespace;
mod output;
mod run;
mod snapshot;

use clap::{Parser, Subcommand};

pub use access::AccessArguments;
pub use bench::BenchArguments;
pub use control::{ControlArguments, QuitArguments};
pub use demo::DemoArguments;
pub use inspect::InspectArguments;
pub use limits::LimitsArguments;
pub use migrate::{MigrateArguments, PostcopyWhen, RecoverArguments};
pub use namespace::NamespaceArguments;
pub use run::RunArguments;
pub use snapshot::SnapshotArguments;

/// ferry: a minimal KVM virtual machine monitor whose NVMe disks migrate.
#[derive(Debug, Parser)]
#[command(version, about, propagate_version = true)]
pub struct Arguments {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a virtual machine, or wait for one to arrive.
    ///
    /// A guest that boots here needs --kernel. A guest that arrives needs --incoming, and otherwise the flags that the
    /// source was started with: the two machines are compared before any memory moves.
    Run(Box<RunArguments>),
    /// Migrate a running machine and wait until it has moved.
    ///
    /// Ctrl-C cancels: the guest then goes on where it is. A second Ctrl-C only stops watching.
    Migrate(MigrateArguments),
    /// Replace the links that a guest whose memory follows it (`ferry migrate --postcopy`) has lost.
    ///
    /// While `ferry status` says postcopy-paused, the guest waits wherever it lacks memory. The source connects again, and waits until all
    /// memory is there. A destination listens where it did, unless it is told another address; it takes only the source that it has
    /// lost. Example: ferry recover --api source.sock
    Recover(RecoverArguments),
    /// Keep what a guest is now in a file, with copies of its disks, and let it go on.
    ///
    /// Memory is written while the guest runs; it stands still for the last pages and for the copies of its images, which share their
    /// blocks with the images where the file system can. File and copies are restored together, once:
    /// `ferry run --incoming file:PATH`, with the copies in the place of the images. Refused for machines with --nvme subsystem=DIR, and
    /// when namespaces were added or removed since the start.
    Snapshot(SnapshotArguments),
    /// Show the limits of a machine's migrations, and change them, while one runs too.
    ///
    /// What is not given stays as it is.
    Limits(LimitsArguments),
    /// Say what a machine does and who owns its guest.
    ///
    /// Example: ferry status --api vm.sock
    Status(ControlArguments),
    /// Pause the guest: its vCPUs and devices stand still until `ferry cont`.
    ///
    /// Commands in flight are finished first. Memory and process stay. Example: ferry stop --api vm.sock
    Stop(ControlArguments),
    /// Let a paused guest go on.
    ///
    /// Example: ferry cont --api vm.sock
    Cont(ControlArguments),
    /// Call off a migration or a snapshot that is under way: the guest stays here.
    ///
    /// Waits until that is so. Too late, and an error, once the guest was handed over. Example: ferry cancel --api vm.sock
    Cancel(ControlArguments),
    /// Say that the destination has the guest of a hand-over that is undecided. It then never runs here again.
    ///
    /// Only without a lease that both sides see (none at all, or the guest takes its images along), when COMMIT was sent and the destination
    /// does not answer, can nothing but an operator tell (`ferry status` says handover-unknown). The destination is asked once more, and its
    /// answer counts for more.
    /// Example: ferry confirm --api vm.sock
    Confirm(ControlArguments),
    /// Say that the destination never ran the guest of a hand-over that is undecided and never will. It then goes on here.
    ///
    /// As for confirm. Make sure first that the destination's process is gone and never ran the guest: a guest that runs twice
    /// destroys its disks. Example: ferry reclaim --api vm.sock
    Reclaim(ControlArguments),
    /// End a machine, as if its power were cut: the guest is not asked.
    ///
    /// Commands in flight are finished and images made stable first. Example: ferry quit --api vm.sock
    Quit(QuitArguments),
    /// Add, remove or resize namespaces while the guest runs.
    ///
    /// They are the host's: those that the guest has created (`--nvme subsystem=DIR`) are the guest's to delete. A machine that moves
    /// afterwards needs a destination with flags for what it has by then. Not while a migration is under way.
    Namespace(NamespaceArguments),
    /// Set how a controller gives access to namespaces that it shares with others (asymmetric namespace access).
    ///
    /// The guest is told, and its multipath driver goes another way, as if a path of a storage array had failed or was taken out of
    /// service. Example: ferry access --api vm.sock --controller c1 --nsid 1 --state inaccessible
    Access(AccessArguments),
    /// Show a guest that checks all its data move between two real processes.
    ///
    /// Boots a test guest with several NVMe namespaces in one `ferry run`, migrates it to a second one while its disk
    /// commands are in flight, and prints what that cost and what the guest verified before and after. Ends with an
    /// error if the guest finds a single byte wrong. Needs /dev/kvm; leaves nothing behind.
    Demo(DemoArguments),
    /// Print what is in a file that a guest was suspended into, or compare two.
    ///
    /// Reads every stream of QEMU's layout, ours or QEMU's own, from the description at its end: the machine, RAM (counted,
    /// not printed), and every field of every section with its value. The file is not trusted: what does not fit its
    /// description is an error that names the byte.
    Inspect(InspectArguments),
    /// Measure, and say on which host.
    ///
    /// Every figure comes from repeated runs, with the median and the spread, and with a reference that was measured
    /// between them: a busy host shows in both.
    Bench(BenchArguments),
}

impl Command {
    /// Does it.
    ///
    /// # Errors
    /// Everything that the user must know, as a chain from what was tried to why it failed.
    pub fn execute(self) -> anyhow::Result<()> {
        match self {
            Self::Run(arguments) => arguments.execute(),
            Self::Migrate(arguments) => arguments.execute(),
            Self::Snapshot(arguments) => arguments.execute(),
            Self::Limits(arguments) => arguments.execute(),
            Self::Status(arguments) => arguments.status(),
            Self::Stop(arguments) => arguments.stop(),
            Self::Cont(arguments) => arguments.cont(),
            Self::Cancel(arguments) => arguments.cancel(),
            Self::Confirm(arguments) => arguments.confirm(),
            Self::Reclaim(arguments) => arguments.reclaim(),
            Self::Quit(arguments) => arguments.execute(),
            Self::Recover(arguments) => arguments.execute(),
            Self::Namespace(arguments) => arguments.execute(),
            Self::Access(arguments) => arguments.execute(),
            Self::Demo(arguments) => arguments.execute(),
            Self::Inspect(arguments) => arguments.execute(),
            Self::Bench(arguments) => arguments.execute(),
        }
    }
}
