//! `ferry run`.

use std::path::PathBuf;

use clap::Args;

use crate::config::{Config, MachineSpec, NamespaceOption, NvmeOption, SerialOutput, Tables};
use crate::io_poll::IoPoll;
use crate::kvm::DirtyTracking;
use crate::memory::HugePages;
use crate::vcpu::{BootProtocol, CpuModel};

/// The machine to run. Its help stands at [`super::Command::Run`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry run --memory 512M --kernel vmlinux --initrd initramfs.cpio \\
      --cmdline 'console=ttyS0' --nvme path=disk.raw,serial=disk0 --api vm.sock
  # A destination has the same flags; its kernel is for the guest's next reset:
  ferry run --memory 512M --kernel vmlinux --initrd initramfs.cpio \\
      --cmdline 'console=ttyS0' --nvme path=disk.raw,serial=disk0 --api new.sock \\
      --incoming unix:/run/move.sock       # then, elsewhere:
  ferry migrate --api vm.sock unix:/run/move.sock

  # From another host; each side proves with its files in /etc/ferry who it is (ca.pem, cert.pem, key.pem):
  ferry run --memory 512M --api new.sock --incoming tcp:0.0.0.0:4444 --tls-dir /etc/ferry
  ferry migrate --api vm.sock --tls-dir /etc/ferry tcp:node2.example:4444       # there
  # Those files, with OpenSSL 3: an authority (keep ca-key.pem apart), then for each host key.pem and cert.pem with its names:
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=ferry-authority \\
      -keyout ca-key.pem -out ca.pem
  openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 365 -subj /CN=node2 -CA ca.pem -CAkey ca-key.pem \\
      -addext subjectAltName=DNS:node2.example,DNS:localhost,IP:127.0.0.1 -addext basicConstraints=critical,CA:FALSE \\
      -keyout key.pem -out cert.pem

  # A guest that can move between all hosts that have SSE4.2, also to those with more:
  ferry run --cpu x86-64-v2 --kernel vmlinux --nvme path=disk.raw,serial=disk0 --api vm.sock

  # A guest that may create namespaces (nvme create-ns) of 10G in all; what it did is there again after a power cycle:
  ferry run --kernel vmlinux --nvme serial=c0,subsystem=/var/lib/c0,capacity=10G

  # Two controllers of one subsystem: two ways of the guest to the same namespaces, but for one of them:
  ferry run --kernel vmlinux --nvme serial=c0 --nvme serial=c1,subsystem-of=c0 \\
      --ns controller=c0,nsid=1,backend=file,path=a.raw \\
      --ns controller=c0,nsid=2,backend=file,path=b.raw,attached=c1

  # Two copies of the guest of a snapshot, each with what it writes in an overlay of its own; the same flags without --incoming and
  # --clone start it anew later:
  ferry run --name a --nvme path=a.qcow2,base=/snapshots/monday.ferry.disk0-1.raw,serial=disk0 \\
      --incoming file:/snapshots/monday.ferry --clone --api a.sock
  ferry run --name b --nvme path=b.qcow2,base=/snapshots/monday.ferry.disk0-1.raw,serial=disk0 \\
      --incoming file:/snapshots/monday.ferry --clone --api b.sock

  # One controller with three namespaces; identifiers may have holes:
  ferry run --kernel vmlinux --nvme serial=c0,queues=8 \\
      --ns controller=c0,nsid=1,backend=file,path=a.raw \\
      --ns controller=c0,nsid=5,backend=memory,size=64M,lba=4096 \\
      --ns controller=c0,nsid=9,backend=file,path=b.raw,ro

  # A guest that brings its disk from a host with which this one shares nothing:
  ferry run --nvme path=new.raw,serial=disk0 --api new.sock --incoming tcp:0.0.0.0:4444 --tls-dir /etc/ferry --with-storage
  ferry migrate --api vm.sock --tls-dir /etc/ferry --with-storage tcp:node2.example:4444       # there

Ctrl-C and SIGTERM end the guest and the process; `ferry status|stop|cont|migrate|quit --api vm.sock` ask it for less.")]
#[allow(rustdoc::broken_intra_doc_links, reason = "brackets of optional parts, as --help shows them")]
pub struct RunArguments {
    /// Name of the virtual machine, for messages and the lease record.
    #[arg(long, default_value = "ferry", value_name = "NAME")]
    pub name: String,
    /// Number of vCPUs, 1 to 64.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub cpus: u8,
    /// Which processor the guest sees when it starts. host has all that this host offers; a baseline has the features of its level of
    /// the x86-64 psABI and what kernels need besides, is the same on all hosts of a vendor, and is refused, with all that is missing,
    /// where the host lacks some. A guest that arrives keeps the processor it has seen, whatever is said here: the host must offer it.
    #[arg(long, value_enum, default_value_t, value_name = "MODEL")]
    pub cpu: CpuModel,
    /// RAM, for example 512M or 4G.
    #[arg(long, default_value = "256M", value_name = "SIZE")]
    pub memory: String,
    /// Which huge pages of 2 MiB RAM lies in; they make memory faster for the guest and while it moves. transparent: those that the host
    /// gives, which it does where /sys/kernel/mm/transparent_hugepage/shmem_enabled says advise, within_size or always. reserved, or the flag alone: only
    /// such as the host has set aside (/proc/sys/vm/nr_hugepages). off: none. Does not matter to the other side of a migration, unless
    /// memory itself is handed over.
    #[arg(long, value_enum, default_value_t, default_missing_value = "reserved", num_args = 0..=1, require_equals = true)]
    pub hugepages: HugePages,
    /// How the pages that the guest writes while it moves are found: by a bitmap of all RAM (log), or by a list of 1 MiB for each vCPU
    /// (ring) [default: auto: the log where KVM can clear it in parts, otherwise rings].
    #[arg(long, value_enum, default_value_t, hide_default_value = true)]
    pub dirty_tracking: DirtyTracking,
    /// Kernel to boot, at the start and after resets: an ELF vmlinux or a bzImage.
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk.
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[arg(long, default_value = "console=ttyS0", value_name = "TEXT")]
    pub cmdline: String,
    /// How the guest learns of its processors and buses.
    #[arg(long, value_enum, default_value_t)]
    pub tables: Tables,
    /// How the kernel is entered [default: by PVH if its file says how, else by Linux' 64-bit protocol].
    #[arg(long, value_enum)]
    pub boot_protocol: Option<BootProtocol>,
    /// Where the serial console goes: stdio, null, file:PATH or unix:PATH.
    #[arg(long, default_value = "stdio", value_name = "WHERE")]
    pub serial: SerialOutput,
    /// An NVMe controller: serial=S[,queues=64][,msix=N][,mdts=N][,cqr][,cmb=SIZE][,pmr=SIZE]; path=P,serial=S also gives it one file namespace,
    /// or with path=P,base=B[,base-format=raw|qcow2],serial=S one in a qcow2 file P that holds only what was written since it was made
    /// over the image B, which is only read (see --clone).
    /// subsystem=DIR[,capacity=SIZE] keeps in DIR what outlives its power (counters, saved features, firmware slots), and
    /// images of the namespaces that the guest creates, SIZE in all [default: 0]; a destination needs the same DIR.
    /// subsystem-of=S makes it one more controller of the subsystem of S, which is declared before it.
    /// What is in the persistent memory region (pmr) is a file in DIR; without DIR it lives as long as the virtual machine, resets and
    /// migrations included.
    #[arg(long, value_name = "OPTIONS")]
    pub nvme: Vec<NvmeOption>,
    /// A namespace: controller=S,nsid=N,backend=file|qcow2|memory|null[,path=|size=][,base=B[,base-format=raw|qcow2]][,lba=512|4096]
    /// [,metadata=8|64[,extended][,pi=0..3[,pi-first]]][,ro][,buffered][,attached=S+S].
    /// It is one of the controller's subsystem, and attached to all controllers of that, or to those of attached=S+S.
    /// With metadata each block has 8 bytes of them (64 only with lba=4096), which are behind all blocks in the image and leave
    /// room for fewer; extended has them transferred at the end of each block instead of in a buffer of their own. pi=1..3 puts
    /// protection information of that type into their last 8 bytes, or with pi-first into the first. Give an image the same
    /// options each time.
    #[arg(long, value_name = "OPTIONS")]
    pub ns: Vec<NamespaceOption>,
    /// Threads that serve the controllers' queues.
    #[arg(long, default_value_t = 1, value_name = "N")]
    pub io_threads: u8,
    /// Microseconds that an I/O thread looks for more work before it sleeps, at most, or off. It adapts to the guest, and with shadow
    /// doorbells saves the guest's exits. [default: 50 if the host has more cores than the machine vCPUs and I/O threads, else off]
    #[arg(long, value_name = "MICROSECONDS|off")]
    pub io_poll: Option<IoPoll>,
    /// Control socket (QMP); it is made with mode 0600.
    #[arg(long, value_name = "PATH")]
    pub api: Option<PathBuf>,
    /// The lease record that decides who owns the guest [default: the first writable image's path + .ferry-lease; DIR/ferry-lease of
    /// --nvme subsystem=DIR where there is none]. Beside a block device there is no default.
    #[arg(long, value_name = "PATH")]
    pub lease: Option<PathBuf>,
    /// Wait for a guest to arrive: unix:PATH, tcp:HOST:PORT, fd:N (a socket, listening or connected, that this process inherits as
    /// descriptor N), or file:PATH to restore a suspended one.
    #[arg(long, value_name = "URI")]
    pub incoming: Option<transport::Uri>,
    /// Wait by TLS 1.3, with ca.pem, cert.pem and key.pem of this folder: a guest comes only from who has a certificate that an
    /// authority of ca.pem has signed. cert.pem has to be valid for the host (name or address) by which the source finds this one,
    /// and for localhost with unix:PATH.
    #[arg(long, value_name = "DIR", requires = "incoming", conflicts_with = "insecure")]
    pub tls_dir: Option<PathBuf>,
    /// Wait for a guest from another host without TLS: whoever is on the network can read and change it, or send one.
    #[arg(long, requires = "incoming")]
    pub insecure: bool,
    /// Run a copy of the guest of a snapshot, which stays as it is. The images of this machine are made anew, from those beside the
    /// snapshot, and have a lease of their own. An image whose base=B is the one beside the snapshot is made as an overlay over that, at
    /// once and whatever the file system; it needs B as it is now for as long as it is used. The others are copies. The guest, as any that
    /// comes out of a snapshot, has another VM generation ID (ACPI), by which its kernel knows to seed its random numbers anew.
    #[arg(long, requires = "incoming")]
    pub clone: bool,
    /// With --clone: copy the images byte by byte where the file system cannot share their blocks.
    #[arg(long, requires = "clone")]
    pub copy_disks: bool,
    /// Note what the guest writes from its start on, so that the file of --incoming file:PATH can be the --parent of its next snapshot,
    /// which then also holds what the guest has only read: KVM does not tell the two apart for a page that is new to it. See
    /// `ferry snapshot --track`.
    #[arg(long, requires = "incoming")]
    pub track: bool,
    /// Read and verify all of the file of --incoming file:PATH before the guest runs, instead of what it touches while it runs.
    #[arg(long, requires = "incoming")]
    pub verify: bool,
    /// Expect a guest that brings its images (ferry migrate --with-storage): those that it may write are made here when one comes that
    /// fits, where nothing is, or nothing in it. Until it runs here they are nobody's, each for itself (PATH.ferry-mark says so beside it),
    /// and if it does not come they are removed. Images that it only reads must be here.
    #[arg(long, requires = "incoming", conflicts_with = "clone")]
    pub with_storage: bool,
    /// With --with-storage: give up what is in the place of the images, for a guest that comes and fits. Files stand beside, as
    /// PATH.given-up, until its first block is here, and are put back if that never comes. Block devices need this flag, and are written
    /// over in place.
    #[arg(long, requires = "with_storage")]
    pub overwrite: bool,
    /// Start a guest from images that one has left for another host. What it did there since is lost; say so only if it does not run
    /// there, and no process there waits for it. That an image is stale is known from its mark (PATH.ferry-mark), in whatever machine it
    /// is used, alone or in another order, and from the lease of the machine that it was in. A block device has no mark. What is only read
    /// (ro) may be stale.
    #[arg(long, conflicts_with = "incoming")]
    pub force_stale: bool,
    /// Start the guest anew though it lies suspended in a file, which can then not be restored any more.
    #[arg(long, conflicts_with = "incoming")]
    pub discard_suspended: bool,
    /// End with the process that started this one, however that ends.
    #[arg(long)]
    pub exit_with_parent: bool,
    /// End with status 0 once the guest has been migrated away.
    #[arg(long)]
    pub exit_when_migrated: bool,
}

impl RunArguments {
    /// The machine that these flags describe.
    ///
    /// # Errors
    /// They do not make one.
    pub fn machine(&self) -> Result<MachineSpec, crate::config::Error> {
        MachineSpec::try_from(Config {
            name: self.name.clone(),
            cpus: self.cpus,
            cpu: self.cpu,
            memory: self.memory.clone(),
            hugepages: self.hugepages,
            dirty_tracking: self.dirty_tracking,
            kernel: self.kernel.clone(),
            initrd: self.initrd.clone(),
            cmdline: self.cmdline.clone(),
            tables: self.tables,
            boot_protocol: self.boot_protocol,
            serial: self.serial.clone(),
            nvme: self.nvme.clone(),
            namespaces: self.ns.clone(),
            io_threads: self.io_threads,
            io_poll: self.io_poll,
            lease: self.lease.clone(),
            incoming: self.incoming.is_some(),
        })
    }
}

impl RunArguments {
    /// Runs the virtual machine until it ends.
    ///
    /// # Errors
    /// It cannot be built, or ended badly.
    pub fn execute(&self) -> anyhow::Result<()> {
        crate::vmm::run(self)
    }
}
