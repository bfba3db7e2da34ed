//! `ferry status`, `stop`, `cont`, `cancel`, `confirm`, `reclaim` and `quit`: one command each over a control socket.

use std::fmt;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use indicatif::HumanBytes;
use serde_json::{Value, json};

use super::output::{say, write};
use crate::control::{
    Client, FerryAccess, FerryMember, FerryMigration, FerryStart, FerryStatus, MigrationInfo,
    MigrationStatus, RunState,
};

/// Why a migration whose guest has gone ahead of its memory is not cancelled.
pub(super) const TOO_LATE_TO_CANCEL: &str =
    "too late to cancel: the guest is at its destination already, and its memory follows";

/// Which machine is meant.
#[derive(Clone, Debug, Args)]
pub struct ControlArguments {
    /// Control socket of the machine (its --api).
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,
    /// Answer in JSON.
    #[arg(long)]
    pub json: bool,
}

/// Which machine ends.
#[derive(Clone, Debug, Args)]
pub struct QuitArguments {
    /// The machine.
    #[command(flatten)]
    pub control: ControlArguments,
    /// End it also if a guest that has left still needs memory of this process, and dies with it.
    #[arg(long)]
    pub force: bool,
}

impl QuitArguments {
    /// `ferry quit`.
    ///
    /// # Errors
    /// No machine answers, or it refused.
    pub fn execute(&self) -> anyhow::Result<()> {
        let mut client = Client::connect(&self.control.api)?;
        client.execute("quit", if self.force { json!({ "x-ferry-force": true }) } else { json!({}) })?;
        if self.control.json {
            say!("{}", json!({}))?;
        }
        Ok(())
    }
}

impl ControlArguments {
    /// `ferry status`: what runs, who owns it, how its migration stands.
    ///
    /// # Errors
    /// No machine answers.
    pub fn status(&self) -> anyhow::Result<()> {
        let mut client = Client::connect(&self.api)?;
        let status: FerryStatus = client.query("x-ferry-status")?;
        // Without a migration QMP says `{}`.
        let migration = client.execute("query-migrate", json!({}))?;
        let text = if self.json {
            format!("{}\n", json!({ "x-ferry": status, "migration": migration }))
        } else {
            Report { status, migration: serde_json::from_value(migration).ok() }.to_string()
        };
        write(text)
    }

    /// `ferry stop`.
    ///
    /// # Errors
    /// No machine answers, or it refused.
    pub fn stop(&self) -> anyhow::Result<()> {
        self.run("stop")
    }

    /// `ferry cont`.
    ///
    /// # Errors
    /// No machine answers, or it refused.
    pub fn cont(&self) -> anyhow::Result<()> {
        self.run("cont")
    }

    /// `ferry cancel`.
    ///
    /// # Errors
    /// No machine answers, nothing is under way, or it was too late.
    pub fn cancel(&self) -> anyhow::Result<()> {
        let mut client = Client::connect(&self.api)?;
        // Without a migration QMP says `{}`.
        let info: Option<MigrationInfo> =
            serde_json::from_value(client.execute("query-migrate", json!({}))?).ok();
        if info.is_none_or(|info| info.status.is_final()) {
            bail!("no migration is under way");
        }
        // If the guest has gone ahead of its memory, this changes nothing.
        let ended = client.decide("migrate_cancel")?.info;
        // What became of the guest is said in any case.
        let written = if self.json { say!("{}", serde_json::to_string(&ended)?) } else { Ok(()) };
        match ended.status {
            MigrationStatus::Completed => bail!("too late: the migration has completed"),
            status if status.is_postcopy() => bail!("{TOO_LATE_TO_CANCEL}"),
            _ => written,
        }
    }

    /// `ferry confirm`: the destination of an undecided hand-over has the guest.
    ///
    /// # Errors
    /// No machine answers, it refused, or the destination has answered that it has not.
    pub fn confirm(&self) -> anyhow::Result<()> {
        match self.decide("x-ferry-confirm")?.status {
            status if status == MigrationStatus::Completed || status.is_postcopy() => Ok(()),
            _ => bail!("the destination answered after all, and never ran the guest: it goes on here"),
        }
    }

    /// `ferry reclaim`: the destination of an undecided hand-over never ran the guest and never will.
    ///
    /// # Errors
    /// No machine answers, it refused, or the destination has answered that it has the guest.
    pub fn reclaim(&self) -> anyhow::Result<()> {
        match self.decide("x-ferry-reclaim")?.status {
            status if status == MigrationStatus::Completed || status.is_postcopy() => {
                bail!("the destination answered after all, and has the guest: it never runs here again")
            }
            _ => Ok(()),
        }
    }

    /// Waits until the hand-over is decided and says what the run state is then.
    fn decide(&self, command: &str) -> anyhow::Result<MigrationInfo> {
        let mut client = Client::connect(&self.api)?;
        let decided = client.decide(command)?.info;
        // With --exit-when-migrated nobody is there to be asked.
        match client.execute("query-status", json!({})) {
            Ok(status) => self.show(&status)?,
            Err(_) if decided.status == MigrationStatus::Completed => {}
            Err(error) => return Err(error.into()),
        }
        Ok(decided)
    }

    /// Runs a command that changes the run state and says what that is now.
    fn run(&self, command: &str) -> anyhow::Result<()> {
        let mut client = Client::connect(&self.api)?;
        client.execute(command, json!({}))?;
        let status = client.execute("query-status", json!({}))?;
        self.show(&status)
    }

    /// Says what the run state is.
    fn show(&self, status: &Value) -> anyhow::Result<()> {
        if self.json {
            return say!("{status}");
        }
        say!("{}", status["status"].as_str().context("the machine does not say its run state")?)
    }
}

/// What people read.
struct Report {
    status: FerryStatus,
    migration: Option<MigrationInfo>,
}

/// A value of a QAPI enumeration, as it is written there.
pub(super) fn word(value: impl serde::Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(Value::String(word)) => word,
        _ => "unknown".to_owned(),
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let FerryStatus {
            name,
            process_id,
            status,
            ownership,
            lease,
            blocked_reasons,
            cpu,
            vcpu_exits,
            disks,
            migration,
            start,
        } = &self.status;
        writeln!(f, "{name} (process {process_id}): {}, {}", word(status), word(ownership))?;
        if let Some(lease) = lease {
            writeln!(
                f,
                "  lease {}: {}, generation {}, {}",
                lease.path, lease.state, lease.generation, lease.owner
            )?;
        }
        if let Some(FerryStart { total, first_memory_slot, .. }) = start {
            let milliseconds = |microseconds: u64| microseconds as f64 / 1e3;
            let (total, slot) = (milliseconds(*total), milliseconds(*first_memory_slot));
            writeln!(
                f,
                "  ran {total:.1} ms after the start of the process, {slot:.1} ms of that for KVM's first memory slot"
            )?;
        }
        for reason in blocked_reasons {
            writeln!(f, "  cannot migrate: {reason}")?;
        }
        if let Some(cpu) = cpu {
            let model = cpu.model.as_deref().unwrap_or("as the guest came with it");
            writeln!(f, "  processor: {model}")?;
            if !cpu.unmasked.is_empty() {
                writeln!(
                    f,
                    "  this host does not hold CPUID masks: the guest also sees {}",
                    cpu.unmasked.join(", ")
                )?;
            }
            if !cpu.user_features.is_empty() {
                writeln!(f, "  programs of the guest also see {}", cpu.user_features.join(", "))?;
            }
        }
        writeln!(f, "  vCPUs left the guest {vcpu_exits} times")?;
        for disk in disks {
            if let Some(FerryMember { subsystem, controller_id, access }) = &disk.member {
                writeln!(f, "  disk {}: controller {controller_id} of subsystem {subsystem}", disk.serial)?;
                for FerryAccess { group, state } in access {
                    writeln!(f, "  disk {}: access to group {group} is {}", disk.serial, word(state))?;
                }
            }
            writeln!(
                f,
                "  disk {}: {} commands, {} in flight, {} doorbell exits, {} turns of I/O threads, {} of {} polls with success",
                disk.serial,
                disk.completed,
                disk.in_flight,
                disk.doorbell_exits,
                disk.turns,
                disk.poll_hits,
                disk.polls
            )?;
            writeln!(
                f,
                "  disk {}: {} doorbell events, {} wake-ups, {} calls of io_uring for {} requests, {} interrupts",
                disk.serial,
                disk.doorbell_events,
                disk.wake_ups,
                disk.io_uring_enters,
                disk.io_uring_entries,
                disk.interrupts
            )?;
        }
        if let Some(line) = progress(self.migration.as_ref(), migration.as_ref()) {
            writeln!(f, "  {line}")?;
        }
        if let Some(migration) = migration {
            migration.detail.as_ref().map_or(Ok(()), |detail| writeln!(f, "  {detail}"))?;
            if let Some(why) = migration.postcopy.as_ref().and_then(|postcopy| postcopy.paused.as_ref()) {
                writeln!(f, "  the guest waits for memory, and the link is lost (ferry recover): {why}")?;
            }
        }
        if *status == RunState::Inmigrate {
            let comes = self.migration.as_ref().is_some_and(|info| {
                matches!(
                    info.status,
                    MigrationStatus::Setup | MigrationStatus::Active | MigrationStatus::Device
                )
            });
            writeln!(f, "  {}", if comes { "a guest is on its way" } else { "waits for a guest" })?;
        }
        Ok(())
    }
}

/// How a migration goes, or went, in a line.
fn progress(info: Option<&MigrationInfo>, migration: Option<&FerryMigration>) -> Option<String> {
    let mut line = match (info, migration) {
        (_, Some(migration)) => format!("migration with {}: {}", migration.peer, migration.phase),
        (Some(info), None) => format!("migration: {}", word(info.status)),
        (None, None) => return None,
    };
    if let Some(ram) = info.and_then(|info| info.ram.as_ref()).filter(|ram| ram.remaining > 0) {
        if let Some(rounds) = migration.map(|migration| migration.rounds).filter(|rounds| *rounds > 0) {
            line += &format!(", round {rounds}");
        }
        line += &format!(", {} of {} left", HumanBytes(ram.remaining), HumanBytes(ram.total));
    }
    // The detail says it otherwise.
    let reason = info.and_then(|info| info.error_desc.as_ref());
    if let Some(reason) = reason.filter(|_| migration.is_none_or(|migration| migration.detail.is_none())) {
        line += &format!(": {reason}");
    }
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::RamStats;

    #[test]
    fn a_migration_is_one_line() {
        let ram = RamStats { remaining: 3 << 20, total: 64 << 20, ..RamStats::default() };
        let mut info = MigrationInfo { ram: Some(ram), ..MigrationInfo::new(MigrationStatus::Active) };
        let mut migration = FerryMigration {
            phase: "active".to_owned(),
            peer: "unix:there".to_owned(),
            rounds: 2,
            ..FerryMigration::default()
        };
        let told =
            |info: &MigrationInfo, migration: &FerryMigration| progress(Some(info), Some(migration)).unwrap();
        assert_eq!(
            told(&info, &migration),
            "migration with unix:there: active, round 2, 3.00 MiB of 64.00 MiB left"
        );
        assert_eq!(progress(None, None), None);
        (info.status, info.ram, info.error_desc) = (MigrationStatus::Failed, None, Some("why".to_owned()));
        migration.phase = "failed".to_owned();
        assert_eq!(told(&info, &migration), "migration with unix:there: failed: why");
        migration.detail = Some("why".to_owned());
        assert_eq!(
            told(&info, &migration),
            "migration with unix:there: failed",
            "the detail has its own line"
        );
        assert_eq!(progress(Some(&info), None).unwrap(), "migration: failed: why");
    }
}
