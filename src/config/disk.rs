//! `--nvme` and `--ns`: controllers and their namespaces.

use std::path::{Path, PathBuf};
use std::str::FromStr;

use block::{Base, BaseFormat};

use super::{Error, Options};

/// I/O queue pairs of a controller unless said otherwise.
pub const DEFAULT_QUEUE_PAIRS: u16 = 64;
/// Largest number of I/O queue pairs: all identifiers but that of the admin queue.
pub const MAX_QUEUE_PAIRS: u16 = u16::MAX;
/// Largest number of MSI-X vectors (PCI 3.0, 6.8.2).
pub const MAX_VECTORS: u16 = 2048;
/// MDTS unless said otherwise: 2^7 pages of 4 KiB, 512 KiB.
pub const DEFAULT_MDTS: u8 = 7;
/// Largest MDTS: 2^9 pages, 2 MiB; larger transfers gain nothing and cost memory per command in flight.
pub const MAX_MDTS: u8 = 9;
/// Largest controller memory buffer and persistent memory region: an eighth of the window in which BARs are assigned.
pub const MAX_BUFFER_BYTES: u64 = 64 << 20;
/// Largest namespace identifier.
pub const MAX_NSID: u32 = 1024;
/// Bytes of a serial number ("NVM Express Base 2.0, 5.17.2.1": SN).
pub const MAX_SERIAL_BYTES: usize = 20;

/// A controller as declared: `serial=S[,queues=N][,msix=N][,mdts=N][,cqr][,cmb=SIZE][,pmr=SIZE][,subsystem=DIR[,capacity=SIZE]]`, or short
/// `path=P,serial=S[,base=B[,base-format=F]][,lba=N][,metadata=N[,extended][,pi=N[,pi-first]]][,ro][,buffered]` for a controller with one
/// file namespace; `subsystem-of=S` makes it one more of a subsystem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NvmeOption {
    /// The controller.
    pub controller: ControllerSpec,
}

/// A namespace as declared: `controller=S,nsid=N,backend=file|qcow2|memory|null[,path=|size=][,base=B[,base-format=raw|qcow2]]
/// [,lba=512|4096][,metadata=8|64[,extended][,pi=0..3[,pi-first]]][,ro][,buffered][,attached=S+S]`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceOption {
    /// Serial of a controller of its subsystem.
    pub controller: String,
    /// The namespace.
    pub namespace: NamespaceSpec,
}

/// A controller.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControllerSpec {
    /// Serial number, printable ASCII, unique in the machine.
    pub serial: String,
    /// I/O queue pairs that it offers.
    pub queue_pairs: u16,
    /// MSI-X vectors: at least one per queue pair and one for the admin queue, as long as there are so many.
    pub vectors: u16,
    /// Maximum data transfer size, as the power of two of 4 KiB pages.
    pub mdts: u8,
    /// Queues must be physically contiguous (CAP.CQR).
    pub contiguous_queues: bool,
    /// Size of the controller memory buffer, 0 for none.
    pub buffer_bytes: u64,
    /// Serial of the first controller of its subsystem, if that is another one.
    pub subsystem_of: Option<String>,
    /// Size of the persistent memory region, 0 for none.
    pub region_bytes: u64,
    /// Where it keeps what outlives its power, if it does.
    pub subsystem: Option<SubsystemSpec>,
    /// The namespaces of its subsystem, by ascending identifier; holes are normal. Those of a subsystem are all with its first controller.
    pub namespaces: Vec<NamespaceSpec>,
}

/// Non-volatile memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SubsystemSpec {
    /// A folder.
    pub directory: PathBuf,
    /// Bytes that namespaces which the guest creates may have in all.
    pub capacity_bytes: u64,
}

/// A namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamespaceSpec {
    /// Identifier, from 1.
    pub nsid: u32,
    /// Where its bytes live.
    pub backend: BackendSpec,
    /// Logical block size in bytes: 512 or 4096.
    pub block_bytes: u32,
    /// Whether writes are refused.
    pub read_only: bool,
    /// Whether a file is used through the page cache even where it need not be.
    pub buffered: bool,
    /// Metadata of its blocks, if they have some.
    pub metadata: Option<MetadataSpec>,
    /// Serials of the controllers that it is attached to at first; empty: all of the subsystem.
    pub attached: Vec<String>,
}

/// Metadata of the blocks of a namespace ("NVM Command Set 1.0, 5.2, 5.3").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MetadataSpec {
    /// Bytes of each block: 8, or with blocks of 4096 bytes also 64.
    pub bytes: u16,
    /// They are transferred at the end of each block, not in a buffer of their own.
    pub extended: bool,
    /// Type of protection information, 0 for none.
    pub protection_type: u8,
    /// It is the first eight bytes of the metadata, not the last.
    pub protection_first: bool,
}

impl MetadataSpec {
    /// Checks what was said of the metadata of blocks of `block_bytes`.
    ///
    /// # Errors
    /// What is wrong with it, in the terms of the options.
    pub fn new(
        block_bytes: u32,
        bytes: Option<u64>,
        extended: bool,
        protection_type: u64,
        protection_first: bool,
    ) -> Result<Option<Self>, String> {
        if protection_type > 3 {
            return Err(format!("pi={protection_type} is not between 0 and 3"));
        }
        if protection_first && protection_type == 0 {
            return Err("pi-first is about protection information: say which with pi=1..3".to_owned());
        }
        let bytes = match bytes {
            None if extended || protection_type != 0 => {
                return Err("extended and pi are about metadata: say how many with metadata=…".to_owned());
            }
            None => return Ok(None),
            Some(8) => 8,
            Some(64) if block_bytes == 4096 => 64,
            Some(bytes) => {
                return Err(format!("metadata={bytes} is neither 8 nor, with lba=4096, 64"));
            }
        };
        // At most 3.
        Ok(Some(Self { bytes, extended, protection_type: protection_type as u8, protection_first }))
    }
}

/// Where the bytes of a namespace live.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackendSpec {
    /// A raw image file or block device; its size is the capacity.
    File(PathBuf),
    /// A qcow2 file; the format says its capacity.
    Qcow2(PathBuf),
    /// A qcow2 file that holds only what was written since it was made, over an image that is only read.
    Overlay {
        /// The file.
        path: PathBuf,
        /// The image.
        base: Base,
    },
    /// Memory of this process; it migrates with guest RAM.
    Memory {
        /// Capacity in bytes.
        size_bytes: u64,
    },
    /// No contents at all, for measurements.
    Null {
        /// Capacity in bytes.
        size_bytes: u64,
    },
}

impl BackendSpec {
    /// The file that may be written, if it is one.
    #[must_use]
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::File(path) | Self::Qcow2(path) | Self::Overlay { path, .. } => Some(path),
            Self::Memory { .. } | Self::Null { .. } => None,
        }
    }
}

impl ControllerSpec {
    /// Serial of the first controller of its subsystem: what the subsystem has as its own.
    #[must_use]
    pub fn first_of_subsystem(&self) -> &str {
        self.subsystem_of.as_deref().unwrap_or(&self.serial)
    }
}

impl FromStr for NvmeOption {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut options = Options::parse("--nvme", text)?;
        let serial = options.text("serial")?.ok_or_else(|| options.error("serial=… is missing"))?;
        if serial.len() > MAX_SERIAL_BYTES || !serial.bytes().all(|byte| (0x21..0x7f).contains(&byte)) {
            return Err(options.error("a serial has 1 to 20 printable ASCII characters"));
        }
        let queue_pairs = options.number("queues")?.unwrap_or(DEFAULT_QUEUE_PAIRS);
        if queue_pairs == 0 {
            return Err(options.error(format!("queues={queue_pairs} is not between 1 and {MAX_QUEUE_PAIRS}")));
        }
        let least = queue_pairs.saturating_add(1).min(MAX_VECTORS);
        let vectors = options.number("msix")?.unwrap_or(least);
        if !(least..=MAX_VECTORS).contains(&vectors) {
            return Err(options.error(format!(
                "msix={vectors} is not between {least} (one per queue pair and one for the admin queue) and {MAX_VECTORS}"
            )));
        }
        let mdts = options.number("mdts")?.unwrap_or(DEFAULT_MDTS);
        if !(1..=MAX_MDTS).contains(&mdts) {
            return Err(options.error(format!("mdts={mdts} is not between 1 and {MAX_MDTS}")));
        }
        let contiguous_queues = options.flag("cqr")?;
        let buffer_bytes = memory_bytes(&mut options, "cmb")?;
        let region_bytes = memory_bytes(&mut options, "pmr")?;
        let mut namespaces = Vec::new();
        if let Some(path) = options.text("path")? {
            let (block_bytes, metadata, read_only) = block_options(&mut options)?;
            let path = PathBuf::from(path);
            let (backend, buffered) = match base(&mut options)? {
                Some(base) => (BackendSpec::Overlay { path, base }, false),
                None => (BackendSpec::File(path), options.flag("buffered")?),
            };
            let attached = Vec::new();
            namespaces.push(NamespaceSpec {
                nsid: 1,
                backend,
                block_bytes,
                read_only,
                buffered,
                metadata,
                attached,
            });
        }
        let subsystem_of = options.text("subsystem-of")?;
        let capacity_bytes = options.size("capacity")?;
        let subsystem = match options.text("subsystem")? {
            None if capacity_bytes.is_some() => {
                return Err(options.error("capacity=… is that of a folder: say which with subsystem=DIR"));
            }
            None => None,
            Some(directory) => Some(SubsystemSpec {
                directory: directory.into(),
                capacity_bytes: capacity_bytes.unwrap_or(0),
            }),
        };
        if let (Some(first), Some(_)) = (&subsystem_of, &subsystem) {
            return Err(options.error(format!("a subsystem has one folder: give it to {first:?}")));
        }
        options.finish(
            "serial, queues, msix, mdts, cqr, cmb, pmr, subsystem-of, subsystem and capacity; with path also lba, metadata, extended, pi, pi-first, ro, and buffered or base and base-format",
        )?;
        let controller = ControllerSpec {
            serial,
            queue_pairs,
            vectors,
            mdts,
            contiguous_queues,
            buffer_bytes,
            subsystem_of,
            region_bytes,
            subsystem,
            namespaces,
        };
        Ok(Self { controller })
    }
}

impl FromStr for NamespaceOption {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut options = Options::parse("--ns", text)?;
        let controller =
            options.text("controller")?.ok_or_else(|| options.error("controller=… is missing"))?;
        let nsid = options.number("nsid")?.ok_or_else(|| options.error("nsid=… is missing"))?;
        if !(1..=MAX_NSID).contains(&nsid) {
            return Err(options.error(format!("nsid={nsid} is not between 1 and {MAX_NSID}")));
        }
        let kind = options.text("backend")?.ok_or_else(|| options.error("backend=… is missing"))?;
        let backend = match kind.as_str() {
            "file" | "qcow2" => {
                let path = options.text("path")?;
                let path = path.ok_or_else(|| options.error(format!("backend={kind} needs path=…")))?.into();
                match (kind.as_str(), base(&mut options)?) {
                    ("file", None) => BackendSpec::File(path),
                    ("file", Some(_)) => {
                        return Err(options.error("an image over a base is qcow2: say so with backend=qcow2"));
                    }
                    (_, Some(base)) => BackendSpec::Overlay { path, base },
                    (_, None) => BackendSpec::Qcow2(path),
                }
            }
            "memory" | "null" => {
                let size = options.size("size")?;
                let size_bytes = size.ok_or_else(|| options.error(format!("backend={kind} needs size=…")))?;
                if kind == "memory" {
                    BackendSpec::Memory { size_bytes }
                } else {
                    BackendSpec::Null { size_bytes }
                }
            }
            _ => return Err(options.error(format!("backend={kind} is none of file, qcow2, memory and null"))),
        };
        let (block_bytes, metadata, read_only) = block_options(&mut options)?;
        if let BackendSpec::Memory { size_bytes } | BackendSpec::Null { size_bytes } = backend
            && (size_bytes == 0 || size_bytes % 4096 != 0)
        {
            return Err(options.error("size must be a multiple of 4096 above 0"));
        }
        let buffered = matches!(backend, BackendSpec::File(_)) && options.flag("buffered")?;
        let attached = options.text("attached")?;
        let attached: Vec<String> =
            attached.iter().flat_map(|list| list.split('+')).map(str::to_owned).collect();
        options.finish(
            "controller, nsid, backend, path, size, lba, metadata, extended, pi, pi-first, ro and attached; with a file also buffered, with qcow2 base and base-format",
        )?;
        let namespace = NamespaceSpec { nsid, backend, block_bytes, read_only, buffered, metadata, attached };
        Ok(Self { controller, namespace })
    }
}

/// What an image lies over.
fn base(options: &mut Options) -> Result<Option<Base>, Error> {
    let (path, format) = (options.text("base")?, options.text("base-format")?);
    let format = match format.as_deref() {
        None | Some("raw") => BaseFormat::Raw,
        Some("qcow2") => BaseFormat::Qcow2,
        Some(other) => return Err(options.error(format!("base-format={other} is neither raw nor qcow2"))),
    };
    match path {
        Some(path) => Ok(Some(Base { path: path.into(), format })),
        None if format != BaseFormat::default() => {
            Err(options.error("base-format=… is that of a base: say which with base=PATH"))
        }
        None => Ok(None),
    }
}

/// The size of memory of the controller, 0 for none.
fn memory_bytes(options: &mut Options, name: &str) -> Result<u64, Error> {
    let length_bytes = options.size(name)?.unwrap_or(0);
    let possible = length_bytes.is_power_of_two() && (4096..=MAX_BUFFER_BYTES).contains(&length_bytes);
    if length_bytes != 0 && !possible {
        return Err(options.error(format!("{name} is not a power of two from 4K to 64M")));
    }
    Ok(length_bytes)
}

/// Block size, metadata, and whether writes are refused.
fn block_options(options: &mut Options) -> Result<(u32, Option<MetadataSpec>, bool), Error> {
    let block_bytes = options.number("lba")?.unwrap_or(512);
    if block_bytes != 512 && block_bytes != 4096 {
        return Err(options.error(format!("lba={block_bytes} is neither 512 nor 4096")));
    }
    let (bytes, extended) = (options.number("metadata")?, options.flag("extended")?);
    let (protection_type, first) = (options.number("pi")?.unwrap_or(0), options.flag("pi-first")?);
    let metadata = MetadataSpec::new(block_bytes, bytes, extended, protection_type, first)
        .map_err(|reason| options.error(reason))?;
    Ok((block_bytes, metadata, options.flag("ro")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_short_form_is_a_controller_with_one_file_namespace() {
        let option: NvmeOption = "path=/images/a=b.raw,serial=disk0".parse().unwrap();
        assert_eq!(option.controller.queue_pairs, 64);
        assert_eq!(option.controller.vectors, 65);
        assert_eq!(option.controller.namespaces.len(), 1);
        assert_eq!(option.controller.namespaces[0].nsid, 1);
        assert_eq!(option.controller.namespaces[0].backend, BackendSpec::File("/images/a=b.raw".into()));
    }

    #[test]
    fn an_image_over_a_base_is_an_overlay() {
        let over = |format| BackendSpec::Overlay {
            path: "a.qcow2".into(),
            base: Base { path: "/images/b".into(), format },
        };
        let short = |more: &str| {
            let text = format!("path=a.qcow2,serial=s,base=/images/b{more}");
            text.parse::<NvmeOption>().unwrap().controller.namespaces.remove(0).backend
        };
        assert_eq!(short(""), over(BaseFormat::Raw), "nobody guesses what a guest may have written there");
        assert_eq!(short(",base-format=raw"), over(BaseFormat::Raw));
        assert_eq!(short(",base-format=qcow2"), over(BaseFormat::Qcow2));
        let text = "controller=c,nsid=2,backend=qcow2,path=a.qcow2,base=/images/b,base-format=qcow2";
        let option: NamespaceOption = text.parse().unwrap();
        assert_eq!(option.namespace.backend, over(BaseFormat::Qcow2));
    }

    #[test]
    fn more_queues_than_vectors_share_them() {
        for (text, queue_pairs, vectors) in [
            ("serial=s,queues=2047", 2047, 2048),
            ("serial=s,queues=2048", 2048, 2048),
            ("serial=s,queues=65535,msix=2048", 65_535, 2048),
            ("serial=s,queues=8,msix=2048", 8, 2048),
        ] {
            let option: NvmeOption = text.parse().unwrap();
            assert_eq!(
                (option.controller.queue_pairs, option.controller.vectors),
                (queue_pairs, vectors),
                "{text}"
            );
        }
    }

    #[test]
    fn the_form_of_queues_and_the_memory_buffer_are_the_controllers() {
        let plain: NvmeOption = "serial=s".parse().unwrap();
        assert_eq!((plain.controller.contiguous_queues, plain.controller.buffer_bytes), (false, 0));
        let option: NvmeOption = "serial=s,cqr,cmb=1M".parse().unwrap();
        assert_eq!((option.controller.contiguous_queues, option.controller.buffer_bytes), (true, 1 << 20));
        assert_eq!(option.controller.region_bytes, 0);
        let option: NvmeOption = "serial=s,pmr=64M".parse().unwrap();
        assert_eq!((option.controller.buffer_bytes, option.controller.region_bytes), (0, 64 << 20));
    }

    #[test]
    fn a_folder_is_given_with_or_without_capacity() {
        let subsystem = |text: &str| text.parse::<NvmeOption>().unwrap().controller.subsystem;
        let folder = |capacity_bytes| Some(SubsystemSpec { directory: "/var/d".into(), capacity_bytes });
        assert_eq!(subsystem("serial=s"), None);
        assert_eq!(subsystem("serial=s,subsystem=/var/d"), folder(0));
        assert_eq!(subsystem("serial=s,subsystem=/var/d,capacity=3M"), folder(3 << 20));
    }

    #[test]
    fn a_controller_says_whose_subsystem_it_is_in_and_a_namespace_whose_it_is() {
        let option: NvmeOption = "serial=b,subsystem-of=a".parse().unwrap();
        assert_eq!(option.controller.subsystem_of.as_deref(), Some("a"));
        let attached = |text: &str| text.parse::<NamespaceOption>().unwrap().namespace.attached;
        assert_eq!(attached("controller=a,nsid=1,backend=null,size=1M,attached=a+c"), ["a", "c"]);
        assert!(attached("controller=a,nsid=1,backend=null,size=1M").is_empty(), "all");
    }

    #[test]
    fn namespaces_of_each_backend() {
        let option: NamespaceOption =
            "controller=c,nsid=7,backend=memory,size=1M,lba=4096,ro".parse().unwrap();
        let NamespaceSpec { nsid, backend, block_bytes, read_only, buffered, metadata, .. } =
            option.namespace;
        assert_eq!(
            (nsid, backend, block_bytes, read_only, buffered, metadata),
            (7, BackendSpec::Memory { size_bytes: 1 << 20 }, 4096, true, false, None)
        );
        let option: NamespaceOption = "controller=c,nsid=1,backend=file,path=p,buffered".parse().unwrap();
        assert!(option.namespace.buffered);
        let option: NamespaceOption = "controller=c,nsid=2,backend=qcow2,path=p,ro".parse().unwrap();
        assert_eq!(option.namespace.backend, BackendSpec::Qcow2("p".into()));
        let option: NamespaceOption = "controller=c,nsid=1024,backend=null,size=1T".parse().unwrap();
        assert_eq!(option.namespace.backend, BackendSpec::Null { size_bytes: 1 << 40 });
    }

    #[test]
    fn blocks_have_metadata_and_protection_information_in_them() {
        let metadata = |text: &str| {
            let text = format!("controller=c,nsid=7,backend=null,size=1M{text}");
            text.parse::<NamespaceOption>().unwrap().namespace.metadata
        };
        let plain = MetadataSpec { bytes: 8, extended: false, protection_type: 0, protection_first: false };
        assert_eq!(metadata(",metadata=8"), Some(plain));
        assert_eq!(metadata(",metadata=8,pi=0"), Some(plain));
        let large = MetadataSpec { bytes: 64, extended: true, protection_type: 3, protection_first: true };
        assert_eq!(metadata(",lba=4096,metadata=64,extended,pi=3,pi-first"), Some(large));
        let short: NvmeOption = "serial=s,path=p,metadata=8,pi=1".parse().unwrap();
        assert_eq!(
            short.controller.namespaces[0].metadata,
            Some(MetadataSpec { protection_type: 1, ..plain })
        );
    }

    #[test]
    fn every_mistake_is_refused() {
        for text in [
            "queues=4",
            "serial=",
            "serial=with space",
            "serial=123456789012345678901",
            "serial=s,queues=0",
            "serial=s,queues=65536",
            "serial=s,queues=4096,msix=2047",
            "serial=s,queues=8,msix=2049",
            "serial=s,queues=8,msix=8",
            "serial=s,mdts=10",
            "serial=s,cmb=2K",
            "serial=s,cmb=12K",
            "serial=s,cmb=128M",
            "serial=s,pmr=2K",
            "serial=s,pmr=12K",
            "serial=s,pmr=128M",
            "serial=s,capacity=1M",
            "serial=s,subsystem=",
            "serial=s,subsystem-of=",
            "serial=s,subsystem-of=t,subsystem=d",
            "serial=s,subsystem-of=t,capacity=1M",
            "serial=s,subsystem=d,capacity=much",
            "serial=s,lba=512",
            "serial=s,path=p,lba=520",
            "serial=s,base=b",
            "serial=s,path=p,base=b,buffered",
            "serial=s,path=p,base=b,base-format=vmdk",
            "serial=s,path=p,base-format=qcow2",
        ] {
            assert!(text.parse::<NvmeOption>().is_err(), "{text}");
        }
        for text in [
            "nsid=1,backend=null,size=4096",
            "controller=c,nsid=0,backend=null,size=4096",
            "controller=c,nsid=1025,backend=null,size=4096",
            "controller=c,nsid=1,backend=tape",
            "controller=c,nsid=1,backend=file",
            "controller=c,nsid=1,backend=qcow2",
            "controller=c,nsid=1,backend=qcow2,path=p,buffered",
            "controller=c,nsid=1,backend=file,path=p,base=b",
            "controller=c,nsid=1,backend=null,size=4096,base=b",
            "controller=c,nsid=1,backend=memory,path=p",
            "controller=c,nsid=1,backend=memory,size=1000",
            "controller=c,nsid=1,backend=memory,size=4096,buffered",
            "controller=c,nsid=1,backend=file,path=p,size=1M",
            "controller=c,nsid=1,backend=null,size=4096,metadata=16",
            "controller=c,nsid=1,backend=null,size=4096,metadata=64",
            "controller=c,nsid=1,backend=null,size=4096,pi=1",
            "controller=c,nsid=1,backend=null,size=4096,extended",
            "controller=c,nsid=1,backend=null,size=4096,metadata=8,pi=4",
            "controller=c,nsid=1,backend=null,size=4096,metadata=8,pi-first",
        ] {
            assert!(text.parse::<NamespaceOption>().is_err(), "{text}");
        }
    }
}
