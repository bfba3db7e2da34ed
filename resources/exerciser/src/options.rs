//! The words of the command line.

use core::fmt::{self, Display};

/// What the exerciser does after boot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Writes, reads back and compares.
    Verify,
    /// Random reads, for a rate.
    Iops,
    /// No I/O: the controllers are set up, RAM and time are watched.
    Idle,
    /// Prints the words and ends.
    Help,
}

/// How a doorbell is rung.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Doorbells {
    /// A register write each.
    Mmio,
    /// Doorbell Buffer Config: in memory, with a register write where the controller asks for one.
    Shadow,
}

/// How completions are noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// By looking at the phase bit.
    Poll,
    /// By MSI-X: a queue is looked at only after its interrupt.
    Msix,
}

/// Where something of the driver's is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// RAM.
    Ram,
    /// The controller memory buffer.
    Buffer,
    /// The persistent memory region.
    Region,
}

/// What becomes of the persistent memory region.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Region {
    /// It is left alone.
    Off,
    /// It is filled, and checked and rewritten as RAM is.
    Fill,
    /// The same, once it was found as a run before has left it.
    Kept,
}

/// How the machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// ACPI soft off.
    Off,
    /// Reset by the keyboard controller.
    Reset,
    /// Stays, halted.
    Halt,
}

/// The meaning of a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// What to do.
    pub mode: Mode,
    /// I/O queue pairs of each controller.
    pub queues: u16,
    /// Entries of each I/O queue.
    pub depth: u32,
    /// Commands kept in flight on each controller.
    pub inflight: u32,
    /// How doorbells are rung.
    pub doorbells: Doorbells,
    /// How completions are noticed.
    pub notice: Notice,
    /// Where I/O queues are.
    pub queues_in: Home,
    /// Where data of commands are.
    pub data_in: Home,
    /// What becomes of the persistent memory region of each controller.
    pub region: Region,
    /// Halt while there is nothing to do, instead of spinning.
    pub halt_when_idle: bool,
    /// Bytes of each namespace that are used, from its start.
    pub span_bytes: u64,
    /// Largest transfer of one command, in bytes.
    pub transfer_bytes: u32,
    /// Verified I/Os after which the run ends; 0 for no such end.
    pub ios: u64,
    /// Seconds after which the run ends; 0 for no such end.
    pub seconds: u64,
    /// RAM to check, in bytes.
    pub ram_bytes: u64,
    /// RAM that is checked and rewritten, in bytes a second.
    pub dirty_bytes_per_second: u64,
    /// RAM that is only checked, in bytes a second.
    pub check_bytes_per_second: u64,
    /// Asynchronous Event Requests kept with each controller, and checked at the end.
    pub events: u16,
    /// Milliseconds between progress lines.
    pub report_milliseconds: u64,
    /// Milliseconds of running without a completion, with commands in flight, that are an error.
    pub stall_milliseconds: u64,
    /// Local APIC timer interrupts a second; 0 for none.
    pub timer_hz: u32,
    /// Frequency of the time stamp counter; 0 to find it out.
    pub tsc_khz: u64,
    /// Print what CPUID says.
    pub show_cpuid: bool,
    /// Start of the pseudo-random choices.
    pub seed: u64,
    /// How the machine ends.
    pub exit: Exit,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            mode: Mode::Verify,
            queues: 1,
            depth: 64,
            inflight: 8,
            doorbells: Doorbells::Mmio,
            notice: Notice::Poll,
            queues_in: Home::Ram,
            data_in: Home::Ram,
            region: Region::Off,
            halt_when_idle: false,
            span_bytes: 4 << 20,
            transfer_bytes: 16 << 10,
            ios: 0,
            seconds: 0,
            ram_bytes: 0,
            dirty_bytes_per_second: 0,
            check_bytes_per_second: 50 << 20,
            events: 0,
            report_milliseconds: 100,
            stall_milliseconds: 10_000,
            timer_hz: 0,
            tsc_khz: 0,
            show_cpuid: false,
            seed: 1,
            exit: Exit::Off,
        }
    }
}

/// A word as the help shows it.
#[derive(Clone, Copy, Debug)]
pub struct Word {
    /// The part before `=`.
    pub name: &'static str,
    /// What may follow, and the default first.
    pub values: &'static str,
    /// One sentence.
    pub meaning: &'static str,
}

const fn word(name: &'static str, values: &'static str, meaning: &'static str) -> Word {
    Word { name, values, meaning }
}

/// Every word of the command line.
pub const WORDS: &[Word] = &[
    word("mode", "verify|iops|idle", "write, read back and compare; or random reads for a rate; or no I/O"),
    word("queues", "1", "I/O queue pairs of each controller"),
    word("depth", "64", "entries of each I/O queue"),
    word("inflight", "8", "commands kept in flight on each controller"),
    word("doorbells", "mmio|shadow", "register writes, or Doorbell Buffer Config"),
    word("completion", "poll|msix", "look at the phase bit, or only after the queue's interrupt"),
    word("queues_in", "ram|cmb", "I/O queues in RAM, or in the controller memory buffer"),
    word(
        "data_in",
        "ram|cmb|pmr",
        "data (and PRP lists, except with pmr) in RAM, the buffer, the persistent memory region",
    ),
    word(
        "pmr",
        "off|fill|kept",
        "fill half of the region and check it as RAM; or find it as a run before has left it",
    ),
    word("idle", "spin|halt", "what to do while nothing completes (halt needs completion=msix and timer=)"),
    word("span", "4M", "bytes of each namespace that are used"),
    word("size", "16K", "largest transfer of one command"),
    word("ios", "0", "verified I/Os after which the run ends, 0: never"),
    word("seconds", "0", "seconds after which the run ends, 0: never"),
    word("ram", "0", "bytes of RAM to fill and check"),
    word("dirty", "0", "bytes of RAM checked and rewritten each second"),
    word("check", "50M", "bytes of RAM only checked each second"),
    word("events", "0", "Asynchronous Event Requests kept parked, and checked at the end"),
    word("report", "100", "milliseconds between progress lines"),
    word("stall", "10000", "milliseconds of running without a completion that are an error"),
    word("timer", "0", "local APIC timer interrupts each second"),
    word("tsc_khz", "0", "frequency of the time stamp counter, 0: find out"),
    word("cpuid", "off|show", "print features that CPUID tells ring 0 and ring 3"),
    word("seed", "1", "start of the pseudo-random choices"),
    word("exit", "off|reset|halt", "how the machine ends"),
    word("help", "", "print these words and end"),
];

/// A word that cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadWord<'a> {
    /// The word.
    pub word: &'a str,
    /// Why not.
    pub reason: &'static str,
}

impl Display for BadWord<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.word, self.reason)
    }
}

impl Options {
    /// Reads a command line of blank-separated words. A word given twice counts as given last.
    ///
    /// # Errors
    ///
    /// The first word that is unknown, malformed or out of range.
    pub fn parse(line: &str) -> Result<Self, BadWord<'_>> {
        let mut options = Self::default();
        for word in line.split_ascii_whitespace() {
            options.set(word).map_err(|reason| BadWord { word, reason })?;
        }
        if options.halt_when_idle && (options.notice == Notice::Poll || options.timer_hz == 0) {
            return Err(BadWord { word: "idle=halt", reason: "needs completion=msix and a timer" });
        }
        Ok(options)
    }

    fn set(&mut self, word: &str) -> Result<(), &'static str> {
        if word == "help" {
            self.mode = Mode::Help;
            return Ok(());
        }
        let (name, value) = word.split_once('=').ok_or("expected name=value")?;
        match name {
            "mode" => {
                self.mode =
                    choice(value, &[("verify", Mode::Verify), ("iops", Mode::Iops), ("idle", Mode::Idle)])?
            }
            "queues" => self.queues = ranged(value, 1, 65_535)? as u16,
            "depth" => self.depth = ranged(value, 2, 65_536)? as u32,
            "inflight" => self.inflight = ranged(value, 1, 65_535)? as u32,
            "doorbells" => {
                self.doorbells = choice(value, &[("mmio", Doorbells::Mmio), ("shadow", Doorbells::Shadow)])?
            }
            "completion" => self.notice = choice(value, &[("poll", Notice::Poll), ("msix", Notice::Msix)])?,
            "queues_in" => self.queues_in = choice(value, &[("ram", Home::Ram), ("cmb", Home::Buffer)])?,
            "data_in" => {
                self.data_in =
                    choice(value, &[("ram", Home::Ram), ("cmb", Home::Buffer), ("pmr", Home::Region)])?
            }
            "pmr" => {
                self.region =
                    choice(value, &[("off", Region::Off), ("fill", Region::Fill), ("kept", Region::Kept)])?
            }
            "idle" => self.halt_when_idle = choice(value, &[("spin", false), ("halt", true)])?,
            "span" => self.span_bytes = ranged(value, 1, 1 << 40)?,
            "size" => self.transfer_bytes = ranged(value, 512, 1 << 20)? as u32,
            "ios" => self.ios = ranged(value, 0, u64::MAX)?,
            "seconds" => self.seconds = ranged(value, 0, 1_000_000)?,
            "ram" => self.ram_bytes = ranged(value, 0, 4 << 30)?,
            "dirty" => self.dirty_bytes_per_second = ranged(value, 0, 1 << 40)?,
            "check" => self.check_bytes_per_second = ranged(value, 0, 1 << 40)?,
            "events" => self.events = ranged(value, 0, 16)? as u16,
            "report" => self.report_milliseconds = ranged(value, 1, 1_000_000)?,
            "stall" => self.stall_milliseconds = ranged(value, 1, 1_000_000)?,
            "timer" => self.timer_hz = ranged(value, 0, 10_000)? as u32,
            "tsc_khz" => self.tsc_khz = ranged(value, 0, 100_000_000)?,
            "cpuid" => self.show_cpuid = choice(value, &[("off", false), ("show", true)])?,
            "seed" => self.seed = ranged(value, 0, u64::MAX)?,
            "exit" => {
                self.exit =
                    choice(value, &[("off", Exit::Off), ("reset", Exit::Reset), ("halt", Exit::Halt)])?
            }
            // Where other guests write is no choice here.
            "console" => {}
            _ => return Err("unknown word"),
        }
        Ok(())
    }
}

fn choice<T: Copy>(value: &str, choices: &[(&str, T)]) -> Result<T, &'static str> {
    choices.iter().find(|(name, _)| *name == value).map(|(_, chosen)| *chosen).ok_or("not one of the choices")
}

/// A number with an optional K, M or G (powers of 1,024).
fn ranged(value: &str, least: u64, most: u64) -> Result<u64, &'static str> {
    let (digits, unit) = match value.as_bytes().last() {
        Some(b'K') => (&value[..value.len() - 1], 1 << 10),
        Some(b'M') => (&value[..value.len() - 1], 1 << 20),
        Some(b'G') => (&value[..value.len() - 1], 1 << 30),
        _ => (value, 1),
    };
    let number: u64 = digits.parse().map_err(|_| "not a number")?;
    let number = number.checked_mul(unit).ok_or("out of range")?;
    if (least..=most).contains(&number) { Ok(number) } else { Err("out of range") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_empty_line_is_the_defaults() {
        assert_eq!(Options::parse(""), Ok(Options::default()));
    }

    #[test]
    fn words_set_what_they_name() {
        let options =
            Options::parse("  queues=4 doorbells=shadow\tcompletion=msix ram=256M size=64K dirty=1G ")
                .unwrap();
        assert_eq!((options.queues, options.doorbells, options.notice), (4, Doorbells::Shadow, Notice::Msix));
        assert_eq!((options.ram_bytes, options.transfer_bytes), (256 << 20, 64 << 10));
        assert_eq!(options.dirty_bytes_per_second, 1 << 30);
    }

    #[test]
    fn bad_words_are_named_with_the_reason() {
        let reason = |line| Options::parse(line).unwrap_err();
        assert_eq!(reason("queues=1 quiet"), BadWord { word: "quiet", reason: "expected name=value" });
        assert_eq!(reason("colour=red"), BadWord { word: "colour=red", reason: "unknown word" });
        assert_eq!(reason("queues=0").reason, "out of range");
        assert_eq!(reason("depth=65537").reason, "out of range");
        assert_eq!(reason("ios=x").reason, "not a number");
        assert_eq!(reason("ios=K").reason, "not a number");
        assert_eq!(reason("ios=é").reason, "not a number");
        assert_eq!(reason("ram=99999999999999999999G").reason, "not a number");
        assert_eq!(reason("ram=18446744073709551615G").reason, "out of range");
        assert_eq!(reason("mode=write").reason, "not one of the choices");
        assert_eq!(reason("idle=halt completion=msix").reason, "needs completion=msix and a timer");
    }

    #[test]
    fn help_lists_every_word_and_the_defaults_parse() {
        for word in WORDS.iter().filter(|word| word.name != "help") {
            let default = word.values.split('|').next().unwrap();
            let line = std::format!("{}={default}", word.name);
            assert_eq!(Options::parse(&line), Ok(Options::default()), "{line}");
        }
        assert_eq!(Options::parse("help").unwrap().mode, Mode::Help);
    }

    #[test]
    fn the_readme_lists_every_word() {
        let readme = include_str!("../README.md");
        for word in WORDS {
            assert!(readme.contains(&std::format!("| `{}` |", word.name)), "README.md lacks {}", word.name);
        }
    }
}
