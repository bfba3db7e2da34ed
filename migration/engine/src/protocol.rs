//! What two processes say to each other.
//!
//! Each message is one frame: its kind in the header, its body a state of crate `vmstate`, version 1 as long as the
//! preamble says 1.x. The order is in `migration.md`; `source` and `destination` hold it.

use stream::frame::Kind;
use vmstate::VmState;

use crate::lease::Id;
use crate::moment::Moment;
use crate::postcopy::{Missing, PageRequest, Recover, RunRequest};
use crate::{Description, RamBlock, RunState};

/// Above what the largest machine has: 30 controllers with 1024 namespaces of four properties each, 64 vCPUs with 256 leaves
/// of CPUID, 1024 RAM blocks.
const PROPERTIES_MAX: usize = 1 << 18;
/// Of a saved description; the largest machine with the longest names needs two thirds of it.
pub(crate) const DESCRIPTION_BYTES_MAX: usize = 16 << 20;
/// Of a hello.
pub(crate) const HELLO_BYTES_MAX: usize = DESCRIPTION_BYTES_MAX + 256;
const REASONS_MAX: usize = 256;
const TEXT_MAX_BYTES: usize = 4096;
/// Of all sentences, as bytes carry them: a list's mark and a length beside each text.
pub(crate) const REASONS_BYTES_MAX: usize = 64 << 10;
/// Of the list of passed blocks, each with its mark, a name of at most 255 bytes and a length.
pub(crate) const MEMORY_BYTES_MAX: usize = transport::DESCRIPTORS_MAX * (1 + 2 + 255 + 8) + 1;
/// Of a list of passed files, each with its mark and a name of at most 255 bytes.
pub(crate) const IMAGE_FILES_BYTES_MAX: usize = 1 + transport::DESCRIPTORS_MAX * (1 + 2 + 255) + 1;
/// A session and a sentence.
pub(crate) const NEVER_BYTES_MAX: usize = 16 + 2 + TEXT_MAX_BYTES;

/// A message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Source: this is what wants to come.
    Hello(Box<Hello>),
    /// Destination: it may, and the machine for it is built.
    Agree(Agree),
    /// Destination: it may not.
    Refuse(Reasons),
    /// Source: a piece of the stream. The bytes stay with the link.
    Stream,
    /// Source: everything was sent.
    Prepare(Prepare),
    /// Destination: everything arrived and is loaded.
    Prepared(Prepared),
    /// Destination: the attempt is over.
    Reject(Reasons),
    /// Source: take it.
    Commit(Commit),
    /// Destination: taken.
    Running(Running),
    /// Destination: not taken, and never will be.
    Never(Never),
    /// Source, on a new link: what became of the COMMIT?
    Query(Query),
    /// Source: the attempt is over.
    Cancel(Reasons),
    /// Source, on a link of its own: it is for guest memory.
    Channel(ChannelHello),
    /// Source: the figures, for the other side's user. After RUNNING it also says that RUNNING arrived, and after RECEIVED that
    /// this did.
    Progress(Progress),
    /// Source: this is guest memory; descriptors that read it go along.
    Memory(MemoryBlocks),
    /// Destination: mapped.
    Mapped,
    /// Source: these are files of images; descriptors by which they can be opened go along.
    ImageFiles(ImageFiles),
    /// Destination: they are those that it would open by their names.
    Identified,
    /// Source: all that was sent is to be in its place before the guest stops.
    Settle(Settle),
    /// Destination: it is.
    Settled,
    /// Both: pages that the destination lacks.
    Missing(Missing),
    /// Both: all of these are named; the destination also repeats it when it has dropped what it had of them.
    Listed,
    /// Destination: somebody waits for this page.
    PageRequest(PageRequest),
    /// Destination: somebody waits for all of these.
    RunRequest(RunRequest),
    /// Source: pages. Head and contents stay with the link.
    Pages,
    /// Source: blocks of an image. Head and contents stay with the link.
    Blocks,
    /// Source, on a new link: the destination's guest still lacks memory.
    Recover(Recover),
    /// Destination: the guest has all of its memory.
    Received,
}

/// Text, cut to what the wire carries.
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "text", version = 1)]
pub struct Text {
    length: u16,
    #[vmstate(len = "length", max = TEXT_MAX_BYTES)]
    bytes: Vec<u8>,
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        let mut end = text.len().min(TEXT_MAX_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        Self { length: end as u16, bytes: text.as_bytes().get(..end).unwrap_or_default().to_vec() }
    }
}

impl From<&Text> for String {
    fn from(text: &Text) -> Self {
        // The peer's words go to terminals and logs: no control characters.
        String::from_utf8_lossy(&text.bytes)
            .chars()
            .map(|character| if character.is_control() { ' ' } else { character })
            .collect()
    }
}

/// One or more sentences.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "reasons", version = 1)]
pub struct Reasons {
    #[vmstate(list, max = REASONS_MAX)]
    reasons: Vec<Text>,
}

impl Reasons {
    /// From sentences; what is beyond the limit is counted, not sent.
    #[must_use]
    pub fn new<S: AsRef<str>>(reasons: &[S]) -> Self {
        // Room for the last sentence and the end of the list.
        let mut room = REASONS_BYTES_MAX - 64;
        let fits = |text: &Text| {
            let left = room.checked_sub(text.bytes.len() + 3);
            room = left.unwrap_or_default();
            left.is_some()
        };
        let texts = reasons.iter().take(REASONS_MAX - 1).map(|reason| Text::from(reason.as_ref()));
        let mut texts: Vec<_> = texts.take_while(fits).collect();
        if reasons.len() > texts.len() {
            texts.push(Text::from(format!("and {} more", reasons.len() - texts.len()).as_str()));
        }
        Self { reasons: texts }
    }

    /// The sentences.
    #[must_use]
    pub fn sentences(&self) -> Vec<String> {
        self.reasons.iter().map(String::from).collect()
    }
}

/// See [`Message::Hello`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "hello", version = 1)]
pub struct Hello {
    /// Of this attempt.
    pub session: Id,
    /// What the source can do beyond version 1.0: bits of [`features`](crate::features).
    pub features: u64,
    /// How many data channels the source would like.
    pub channels: u16,
    /// Bytes of a page.
    pub page_bytes: u32,
    /// Whether the guest has a lease.
    pub has_lease: bool,
    /// Which one.
    pub lease: Id,
    description: Properties,
}

/// A [`Description`] as bytes carry it.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "properties", version = 1)]
pub struct Properties {
    #[vmstate(list, max = PROPERTIES_MAX)]
    properties: Vec<Property>,
}

#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "property", version = 1)]
struct Property {
    name: Text,
    value: Text,
}

/// The mark in the list and two lengths. The mark at the end of the list fits beside a hello's other fields.
const PROPERTY_BYTES_BESIDE_TEXT: usize = 5;

impl Hello {
    /// A hello of this version.
    #[must_use]
    pub fn new(session: Id, lease: Option<Id>, description: Properties) -> Self {
        Self {
            session,
            features: 0,
            channels: 1,
            page_bytes: crate::PAGE_BYTES as u32,
            has_lease: lease.is_some(),
            lease: lease.unwrap_or_default(),
            description,
        }
    }

    /// The source's machine.
    #[must_use]
    pub fn description(&self) -> Description {
        Description::from(&self.description)
    }

    /// The guest's lease.
    #[must_use]
    pub fn lease(&self) -> Option<Id> {
        self.has_lease.then_some(self.lease)
    }
}

impl TryFrom<&Description> for Properties {
    /// Why the other side, or a later reader of the file, would not see the same machine.
    type Error = String;

    fn try_from(description: &Description) -> Result<Self, String> {
        let count = description.iter().count();
        if count > PROPERTIES_MAX {
            return Err(format!(
                "it has {count} properties, more than the {PROPERTIES_MAX} that can be told"
            ));
        }
        let mut bytes = 0;
        let text = |words: &str, name: &str| {
            let text = Text::from(words);
            match String::from(&text) == words {
                true => Ok(text),
                false => Err(format!("property {name:?} is too long or no plain text")),
            }
        };
        let properties = description.iter().map(|(name, value)| {
            bytes += PROPERTY_BYTES_BESIDE_TEXT + name.len() + value.len();
            Ok(Property { name: text(name, name)?, value: text(value, name)? })
        });
        let properties = properties.collect::<Result<_, String>>()?;
        if bytes > DESCRIPTION_BYTES_MAX {
            return Err(format!(
                "its properties have {bytes} bytes, more than the {DESCRIPTION_BYTES_MAX} that can be told"
            ));
        }
        Ok(Self { properties })
    }
}

impl From<&Properties> for Description {
    fn from(properties: &Properties) -> Self {
        let mut description = Self::new();
        for property in &properties.properties {
            description.set(String::from(&property.name), String::from(&property.value));
        }
        description
    }
}

/// See [`Message::Agree`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "agree", version = 1)]
pub struct Agree {
    /// Names the destination process: only it can answer for its sessions.
    pub instance: Id,
    /// Those of them that both use.
    pub features: u64,
    /// Data channels to use.
    pub channels: u16,
    /// What opens them; only where they were granted, since older sources do not know it.
    #[vmstate(subsection)]
    pub key: Option<ChannelKey>,
}

/// What nobody else knows.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "agree/channels", version = 1)]
pub struct ChannelKey {
    /// Random.
    pub key: Id,
}

/// See [`Message::Channel`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "channel", version = 1)]
pub struct ChannelHello {
    /// The attempt.
    pub session: Id,
    /// What came with AGREE.
    pub key: Id,
    /// Which of the channels, from 0.
    pub index: u16,
    /// What goes there.
    pub purpose: u8,
}

impl ChannelHello {
    /// [`purpose`](Self::purpose): guest memory, round by round.
    pub const MEMORY: u8 = 0;
    /// [`purpose`](Self::purpose): pages that the guest at the destination waits for.
    pub const PAGES: u8 = 1;
}

/// See [`Message::Memory`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "memory", version = 1)]
pub struct MemoryBlocks {
    #[vmstate(list, max = transport::DESCRIPTORS_MAX)]
    blocks: Vec<MemoryBlock>,
}

#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "memory-block", version = 1)]
struct MemoryBlock {
    name: Text,
    length_bytes: u64,
}

impl MemoryBlocks {
    /// Of these blocks, in this order.
    #[must_use]
    pub fn new(blocks: &[RamBlock]) -> Self {
        let block = |block: &RamBlock| MemoryBlock {
            name: block.name.as_str().into(),
            length_bytes: block.length_bytes(),
        };
        Self { blocks: blocks.iter().map(block).collect() }
    }

    /// Name and length of each, in the order of the descriptors.
    pub fn iter(&self) -> impl Iterator<Item = (String, u64)> {
        self.blocks.iter().map(|block| (String::from(&block.name), block.length_bytes))
    }
}

/// See [`Message::ImageFiles`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "image-files", version = 1)]
pub struct ImageFiles {
    /// Whether others follow.
    pub more: bool,
    #[vmstate(list, max = transport::DESCRIPTORS_MAX)]
    names: Vec<Text>,
}

impl ImageFiles {
    /// Of these names, in the order of the descriptors.
    #[must_use]
    pub fn new<S: AsRef<str>>(names: &[S], more: bool) -> Self {
        Self { more, names: names.iter().map(|name| name.as_ref().into()).collect() }
    }

    /// The names.
    pub fn iter(&self) -> impl Iterator<Item = String> {
        self.names.iter().map(String::from)
    }
}

/// See [`Message::Prepare`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "prepare", version = 1)]
pub struct Prepare {
    /// Over the device sections and the table of RAM digests.
    pub digest: u64,
    /// Whether the guest was running, or paused.
    pub running: bool,
}

/// See [`Message::Prepared`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "prepared", version = 1)]
pub struct Prepared {
    /// What the destination computed.
    pub digest: u64,
    /// How long loading took, in nanoseconds.
    pub load_ns: u64,
}

/// See [`Message::Settle`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "settle", version = 1)]
pub struct Settle {
    /// What data channels have carried so far, all together: heads, tables and contents. What the link has carried, it carried before
    /// this message.
    pub channel_bytes: u64,
}

/// See [`Message::Commit`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "commit", version = 1)]
pub struct Commit {
    /// The attempt.
    pub session: Id,
    /// What the lease says; 0 without one.
    pub generation: u64,
}

/// See [`Message::Running`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "running", version = 1)]
pub struct Running {
    /// The attempt.
    pub session: Id,
    /// Running, or paused.
    pub running: bool,
    /// From COMMIT until the guest could run, in nanoseconds.
    pub resume_ns: u64,
    /// When that was; only where it was granted, since older sources do not know it.
    #[vmstate(subsection)]
    pub ran: Option<Moment>,
}

/// See [`Message::Never`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "never", version = 1)]
pub struct Never {
    /// The attempt.
    pub session: Id,
    /// Why.
    pub reason: Text,
}

/// See [`Message::Query`].
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "query", version = 1)]
pub struct Query {
    /// The attempt.
    pub session: Id,
    /// Who agreed to it.
    pub instance: Id,
}

/// See [`Message::Progress`].
#[derive(Clone, Debug, Default, PartialEq, Eq, VmState)]
#[vmstate(name = "progress", version = 1)]
pub struct Progress {
    /// All RAM.
    pub total_bytes: u64,
    /// Sent so far.
    pub transferred_bytes: u64,
    /// Left of this round.
    pub remaining_bytes: u64,
    /// Begun.
    pub rounds: u32,
    /// By the guest, in the last round.
    pub dirty_pages_per_second: u64,
    /// By the link.
    pub bytes_per_second: u64,
    /// The stop, as [`crate::Downtime`] has it, in nanoseconds; zero before.
    pub downtime_ns: [u64; 8],
}

impl From<bool> for RunState {
    /// As messages say it: whether the guest runs.
    fn from(running: bool) -> Self {
        if running { Self::Running } else { Self::Paused }
    }
}

impl Message {
    /// For errors.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Hello(_) => "hello",
            Self::Agree(_) => "agree",
            Self::Refuse(_) => "refuse",
            Self::Stream => "stream",
            Self::Prepare(_) => "prepare",
            Self::Prepared(_) => "prepared",
            Self::Reject(_) => "reject",
            Self::Commit(_) => "commit",
            Self::Running(_) => "running",
            Self::Never(_) => "never",
            Self::Query(_) => "query",
            Self::Cancel(_) => "cancel",
            Self::Channel(_) => "channel",
            Self::Progress(_) => "progress",
            Self::Memory(_) => "memory",
            Self::Mapped => "mapped",
            Self::ImageFiles(_) => "image files",
            Self::Identified => "identified",
            Self::Settle(_) => "settle",
            Self::Settled => "settled",
            Self::Missing(_) => "missing",
            Self::Listed => "listed",
            Self::PageRequest(_) => "page request",
            Self::RunRequest(_) => "run request",
            Self::Pages => "pages",
            Self::Blocks => "blocks",
            Self::Recover(_) => "recover",
            Self::Received => "received",
        }
    }

    /// Kind and body.
    pub(crate) fn encode(&self) -> (Kind, Vec<u8>) {
        match self {
            Self::Hello(body) => (Kind::Hello, vmstate::to_bytes(body.as_ref())),
            Self::Agree(body) => (Kind::Agree, vmstate::to_bytes(body)),
            Self::Refuse(body) => (Kind::Refuse, vmstate::to_bytes(body)),
            Self::Stream => (Kind::Stream, Vec::new()),
            Self::Prepare(body) => (Kind::Prepare, vmstate::to_bytes(body)),
            Self::Prepared(body) => (Kind::Prepared, vmstate::to_bytes(body)),
            Self::Reject(body) => (Kind::Reject, vmstate::to_bytes(body)),
            Self::Commit(body) => (Kind::Commit, vmstate::to_bytes(body)),
            Self::Running(body) => (Kind::Running, vmstate::to_bytes(body)),
            Self::Never(body) => (Kind::Never, vmstate::to_bytes(body)),
            Self::Query(body) => (Kind::Query, vmstate::to_bytes(body)),
            Self::Cancel(body) => (Kind::Cancel, vmstate::to_bytes(body)),
            Self::Channel(body) => (Kind::ChannelHello, vmstate::to_bytes(body)),
            Self::Progress(body) => (Kind::Progress, vmstate::to_bytes(body)),
            Self::Memory(body) => (Kind::Memory, vmstate::to_bytes(body)),
            Self::Mapped => (Kind::Mapped, Vec::new()),
            Self::ImageFiles(body) => (Kind::ImageFiles, vmstate::to_bytes(body)),
            Self::Identified => (Kind::Identified, Vec::new()),
            Self::Settle(body) => (Kind::Settle, vmstate::to_bytes(body)),
            Self::Settled => (Kind::Settled, Vec::new()),
            Self::Missing(body) => (Kind::Missing, vmstate::to_bytes(body)),
            Self::Listed => (Kind::Listed, Vec::new()),
            Self::PageRequest(body) => (Kind::PageRequest, vmstate::to_bytes(body)),
            Self::RunRequest(body) => (Kind::RunRequest, vmstate::to_bytes(body)),
            Self::Pages => (Kind::Pages, Vec::new()),
            Self::Blocks => (Kind::Blocks, Vec::new()),
            Self::Recover(body) => (Kind::Recover, vmstate::to_bytes(body)),
            Self::Received => (Kind::Received, Vec::new()),
        }
    }

    /// From a kind and a body that the peer sent.
    pub(crate) fn decode(kind: Kind, body: &[u8]) -> Result<Self, String> {
        fn state<T: VmState>(body: &[u8]) -> Result<T, String> {
            vmstate::from_bytes(body, 1).map_err(|error| format!("{}: {error}", T::NAME))
        }
        Ok(match kind {
            Kind::Hello => Self::Hello(Box::new(state(body)?)),
            Kind::Agree => Self::Agree(state(body)?),
            Kind::Refuse => Self::Refuse(state(body)?),
            Kind::Stream => Self::Stream,
            Kind::Prepare => Self::Prepare(state(body)?),
            Kind::Prepared => Self::Prepared(state(body)?),
            Kind::Reject => Self::Reject(state(body)?),
            Kind::Commit => Self::Commit(state(body)?),
            Kind::Running => Self::Running(state(body)?),
            Kind::Never => Self::Never(state(body)?),
            Kind::Query => Self::Query(state(body)?),
            Kind::Cancel => Self::Cancel(state(body)?),
            Kind::Progress => Self::Progress(state(body)?),
            Kind::Memory => Self::Memory(state(body)?),
            Kind::Mapped if body.is_empty() => Self::Mapped,
            Kind::Mapped => return Err(format!("mapped: {} bytes too many", body.len())),
            Kind::ImageFiles => Self::ImageFiles(state(body)?),
            Kind::Identified if body.is_empty() => Self::Identified,
            Kind::Identified => return Err(format!("identified: {} bytes too many", body.len())),
            Kind::Settle => Self::Settle(state(body)?),
            Kind::Settled => Self::Settled,
            Kind::ChannelHello => Self::Channel(state(body)?),
            Kind::Missing => Self::Missing(state(body)?),
            Kind::Listed => Self::Listed,
            Kind::PageRequest => Self::PageRequest(state(body)?),
            Kind::RunRequest => Self::RunRequest(state(body)?),
            Kind::Pages => Self::Pages,
            Kind::Blocks => Self::Blocks,
            Kind::Recover => Self::Recover(state(body)?),
            Kind::Received => Self::Received,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_words_are_cut_and_control_characters_go() {
        let text = Text::from("ö".repeat(3000).as_str());
        assert_eq!(String::from(&text), "ö".repeat(2048));
        let hostile = Text::from("a\u{1b}[31mb\nc");
        assert_eq!(String::from(&hostile), "a [31mb c");
        let reasons: Vec<_> = (0..1000).map(|n| n.to_string()).collect();
        let sentences = Reasons::new(&reasons).sentences();
        assert_eq!((sentences.len(), sentences.last().map(String::as_str)), (256, Some("and 745 more")));
        let long = Reasons::new(&vec!["x".repeat(TEXT_MAX_BYTES); 100]);
        assert_eq!(long.sentences().last().map(String::as_str), Some("and 85 more"));
        assert!(vmstate::to_bytes(&long).len() <= REASONS_BYTES_MAX);
    }

    #[test]
    fn a_description_that_nobody_could_read_is_not_written() {
        let told = |description: &Description| Properties::try_from(description).map(|_| ());
        let mut description = Description::new();
        description.set("name", "x".repeat(TEXT_MAX_BYTES));
        assert_eq!(told(&description), Ok(()));
        description.set("name", "x".repeat(TEXT_MAX_BYTES + 1));
        assert!(told(&description).unwrap_err().contains("\"name\" is too long"));
        description.set("name", "a\nb");
        assert!(told(&description).unwrap_err().contains("no plain text"));

        let mut description = Description::new();
        (0..PROPERTIES_MAX).for_each(|n| description.set(n.to_string(), ""));
        assert_eq!(told(&description), Ok(()));
        description.set("more", "");
        assert!(told(&description).unwrap_err().contains("262145 properties, more than the 262144"));

        let mut description = Description::new();
        let long = "x".repeat(TEXT_MAX_BYTES - PROPERTY_BYTES_BESIDE_TEXT - 4);
        (1000..1000 + DESCRIPTION_BYTES_MAX / TEXT_MAX_BYTES)
            .for_each(|n| description.set(n.to_string(), &long));
        let properties = Properties::try_from(&description).unwrap();
        assert!(vmstate::to_bytes(&properties).len() <= DESCRIPTION_BYTES_MAX + 1);
        description.set("more", "");
        assert!(told(&description).unwrap_err().contains("bytes, more than the 16777216"));
    }

    /// Whoever listens on sealed links tells messages apart by these. The chaos of the integration tests finds its places so.
    #[test]
    fn sealed_messages_are_known_by_their_lengths() {
        let session = [7; 16];
        let ran = Some(Moment { monotonic_ns: 5 });
        let lengths = [
            Message::PageRequest(PageRequest { block: 3, page: 1 }),
            Message::Prepare(Prepare { digest: 5, running: true }),
            Message::Prepared(Prepared { digest: 5, load_ns: 6 }),
            Message::Commit(Commit { session, generation: 3 }),
            Message::Running(Running { session, running: true, resume_ns: 4, ran: None }),
            Message::Running(Running { session, running: true, resume_ns: 4, ran }),
            Message::Query(Query { session, instance: [9; 16] }),
            Message::Recover(Recover { session, key: [6; 16] }),
            Message::Channel(ChannelHello { session, key: [6; 16], index: 1, purpose: 0 }),
            Message::Progress(Progress::default()),
        ]
        .map(|message| message.encode().1.len());
        assert_eq!(lengths, [10, 9, 16, 24, 25, 53, 32, 32, 35, 108]);
    }

    #[test]
    fn every_message_survives_and_every_cut_one_is_refused() {
        let mut description = Description::new();
        description.set("cpus", 2);
        let description = Properties::try_from(&description).unwrap();
        let reasons = Reasons::new(&["because"]);
        let session = [7; 16];
        for message in [
            Message::Hello(Box::new(Hello::new(session, Some([8; 16]), description))),
            Message::Agree(Agree { instance: [9; 16], features: 0, channels: 1, key: None }),
            Message::Agree(Agree {
                instance: [9; 16],
                features: 1,
                channels: 2,
                key: Some(ChannelKey { key: [6; 16] }),
            }),
            Message::Channel(ChannelHello { session, key: [6; 16], index: 1, purpose: 0 }),
            Message::PageRequest(PageRequest { block: 3, page: 1 << 40 }),
            Message::RunRequest(RunRequest { block: 3, first_page: 1 << 40, count: 64 }),
            Message::Recover(Recover { session, key: [6; 16] }),
            Message::Refuse(reasons.clone()),
            Message::Prepare(Prepare { digest: 5, running: true }),
            Message::Prepared(Prepared { digest: 5, load_ns: 6 }),
            Message::Reject(reasons.clone()),
            Message::Commit(Commit { session, generation: 3 }),
            Message::Running(Running { session, running: false, resume_ns: 4, ran: None }),
            Message::Never(Never { session, reason: "no".into() }),
            Message::Query(Query { session, instance: [9; 16] }),
            Message::Cancel(reasons),
            Message::Progress(Progress { rounds: 3, ..Progress::default() }),
            Message::Memory(MemoryBlocks {
                blocks: vec![MemoryBlock { name: "ram-low".into(), length_bytes: 4096 }],
            }),
            Message::Mapped,
            Message::ImageFiles(ImageFiles::new(&["nvme.a.ns.1.file.0", "nvme.a.ns.1.file.1"], true)),
            Message::Identified,
        ] {
            let (kind, body) = message.encode();
            assert_eq!(Message::decode(kind, &body), Ok(message.clone()), "{}", message.name());
            // What older sources read ends where the part begins that they do not know.
            let known = match &message {
                Message::Agree(agree) if agree.key.is_some() => {
                    Message::Agree(Agree { key: None, ..agree.clone() }).encode().1.len()
                }
                _ => body.len(),
            };
            for cut in (0..body.len()).filter(|cut| *cut != known) {
                assert!(Message::decode(kind, &body[..cut]).is_err(), "{} cut at {cut}", message.name());
            }
            assert!(Message::decode(kind, &[body.as_slice(), &[0]].concat()).is_err(), "{}", message.name());
        }
        assert!(Message::decode(Kind::PageRequest, &[]).is_err());
    }
}
