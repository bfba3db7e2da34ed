//! The commands: each takes its arguments apart, asks the machine, and puts the answer into QEMU's shape.

use std::path::{Path, PathBuf};

use engine::{ImageCopy, PostcopyStart, SnapshotOptions, Word};
use serde::Serialize;
use serde_json::{Value, json};

use super::convergence::AUTO_CONVERGE;
use super::descriptors::{self, Descriptors};
use super::event::EventBus;
use super::operations::{MigrationInfo, MigrationParameters, MigrationTarget, Operations, RunState};
use super::protocol::{Arguments, QmpError, version};
use super::{access, namespaces};

/// Longest downtime that may be asked for, in milliseconds (QEMU's bound).
const MAX_DOWNTIME_LIMIT: u64 = 2_000_000;

/// What commands work on.
pub(super) struct Context<'a> {
    pub operations: &'a dyn Operations,
    pub events: &'a EventBus,
    /// What this client has given.
    pub descriptors: Descriptors,
}

type Command = fn(&Context, Arguments) -> Result<Value, QmpError>;

/// Every command but `qmp_capabilities`, which belongs to the session.
const COMMANDS: [(&str, Command); 26] = [
    ("query-version", query_version),
    ("query-commands", query_commands),
    ("query-status", query_status),
    ("stop", stop),
    ("cont", cont),
    ("system_reset", system_reset),
    ("quit", quit),
    ("migrate", migrate),
    ("getfd", descriptors::get),
    ("closefd", descriptors::close),
    ("migrate_cancel", migrate_cancel),
    ("migrate-start-postcopy", start_postcopy),
    ("migrate-recover", recover),
    ("query-migrate", query_migrate),
    ("migrate-set-parameters", set_parameters),
    ("query-migrate-parameters", query_parameters),
    ("migrate-set-capabilities", set_capabilities),
    ("query-migrate-capabilities", query_capabilities),
    ("x-ferry-status", ferry_status),
    ("x-ferry-snapshot", snapshot),
    ("x-ferry-confirm", confirm),
    ("x-ferry-reclaim", reclaim),
    ("x-ferry-namespace-add", namespaces::add),
    ("x-ferry-namespace-remove", namespaces::remove),
    ("x-ferry-namespace-resize", namespaces::resize),
    ("x-ferry-ana-set", access::set),
];

/// The names of [`COMMANDS`].
pub(crate) fn names() -> impl Iterator<Item = &'static str> {
    COMMANDS.iter().map(|(name, _)| *name)
}

/// Runs one command.
pub(super) fn execute(context: &Context, name: &str, arguments: Arguments) -> Result<Value, QmpError> {
    match COMMANDS.iter().find(|(known, _)| *known == name) {
        Some((_, command)) => command(context, arguments),
        None => Err(QmpError::command_not_found(format!("The command {name} has not been found"))),
    }
}

/// Most commands return an empty object.
fn nothing() -> Result<Value, QmpError> {
    Ok(json!({}))
}

fn to_json(report: impl Serialize) -> Result<Value, QmpError> {
    serde_json::to_value(report)
        .map_err(|error| QmpError::generic(format!("the answer cannot be written: {error}")))
}

fn query_version(_: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    Ok(version())
}

fn query_commands(_: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    Ok(names().chain(["qmp_capabilities"]).map(|name| json!({ "name": name })).collect())
}

fn query_status(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    let status = context.operations.run_state();
    Ok(json!({ "running": status == RunState::Running, "status": status }))
}

fn stop(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    context.operations.stop()?;
    nothing()
}

fn cont(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    context.operations.cont()?;
    nothing()
}

fn system_reset(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    context.operations.system_reset()?;
    nothing()
}

fn quit(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let force = arguments.optional_bool("x-ferry-force")?.unwrap_or(false);
    arguments.finish()?;
    context.operations.quit(force)?;
    nothing()
}

fn migrate(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let uri = arguments.string("uri")?;
    // QEMU documents `detach` as ignored: the command never waits.
    arguments.optional_bool("detach")?;
    if arguments.optional_bool("resume")? == Some(true) {
        arguments.finish()?;
        context.operations.migrate_recover(Some(&uri))?;
        return nothing();
    }
    let postcopy = arguments.optional_string("x-ferry-postcopy")?;
    let postcopy = postcopy.map(|start| postcopy_start(&start)).transpose()?;
    // QEMU has objects for credentials, made before; here they are a folder, read each time.
    let tls_dir = arguments.optional_string("x-ferry-tls-dir")?.map(PathBuf::from);
    let insecure = arguments.optional_bool("x-ferry-insecure")?.unwrap_or(false);
    let local = arguments.optional_bool("x-ferry-local")?.unwrap_or(false);
    let storage = arguments.optional_bool("x-ferry-with-storage")?.unwrap_or(false);
    arguments.finish()?;
    let descriptor = uri.strip_prefix("fd:").map(|name| context.descriptors.take(name)).transpose()?;
    let target = MigrationTarget { uri, postcopy, tls_dir, insecure, descriptor, local, storage };
    context.operations.migrate(target)?;
    nothing()
}

fn snapshot(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let path = arguments.string("path")?;
    let copy_disks = arguments.optional_bool("copy-disks")?.unwrap_or(false);
    let parent = arguments.optional_string("parent")?.map(PathBuf::from);
    let track = arguments.optional_bool("track")?.unwrap_or(false);
    arguments.finish()?;
    let images = if copy_disks { ImageCopy::Bytes } else { ImageCopy::Reflink };
    context.operations.snapshot(Path::new(&path), SnapshotOptions { images, parent, track })?;
    nothing()
}

/// When memory follows, as `migrate` is told.
fn postcopy_start(name: &str) -> Result<PostcopyStart, QmpError> {
    match name {
        "after-first-round" => Ok(PostcopyStart::AfterFirstRound),
        "now" => Ok(PostcopyStart::AtOnce),
        name => Err(QmpError::generic(format!(
            "Parameter 'x-ferry-postcopy' does not accept value '{name}': after-first-round or now"
        ))),
    }
}

fn start_postcopy(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    context.operations.migrate_start_postcopy()?;
    nothing()
}

/// QEMU has it for destinations only, and always with an address.
fn recover(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let uri = arguments.optional_string("uri")?;
    arguments.finish()?;
    context.operations.migrate_recover(uri.as_deref())?;
    nothing()
}

fn migrate_cancel(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    context.operations.migrate_cancel()?;
    nothing()
}

fn query_migrate(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    let blocked_reasons = context.operations.migration_blockers();
    match context.operations.migration() {
        Some(info) => to_json(MigrationInfo { blocked_reasons, ..info }),
        None if blocked_reasons.is_empty() => nothing(),
        // Before the first migration QEMU says this alone, without a status.
        None => Ok(json!({ "blocked-reasons": blocked_reasons })),
    }
}

fn set_parameters(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let downtime_limit = arguments.optional_u64("downtime-limit")?;
    let max_bandwidth = arguments.optional_u64("max-bandwidth")?;
    let multifd_channels = arguments.optional_u64("multifd-channels")?;
    let multifd_compression = arguments.optional_string("multifd-compression")?;
    let old = context.operations.migration_parameters();
    let convergence = old.convergence.change(&mut arguments)?;
    arguments.finish()?;
    if downtime_limit.is_some_and(|limit| limit > MAX_DOWNTIME_LIMIT) {
        return Err(QmpError::generic(
            "Parameter 'downtime-limit' expects an integer in the range of 0 to 2000 seconds",
        ));
    }
    let least = engine::Parameters::MAX_BANDWIDTH_LEAST;
    if max_bandwidth.is_some_and(|limit| (1..least).contains(&limit)) {
        return Err(QmpError::generic(format!(
            "Parameter 'max-bandwidth' expects 0 (no limit) or at least {least} bytes per second"
        )));
    }
    let multifd_channels = multifd_channels.map(|count| {
        let count = u16::try_from(count).ok().filter(|count| *count <= engine::CHANNELS_MAX);
        count.ok_or_else(|| {
            QmpError::generic(format!(
                "Parameter 'multifd-channels' expects 0 (no channels of its own for memory) to {}",
                engine::CHANNELS_MAX
            ))
        })
    });
    let multifd_compression = multifd_compression.map(|name| {
        let unknown =
            |_| QmpError::generic(format!("Parameter 'multifd-compression' does not accept value '{name}'"));
        name.parse::<engine::Compression>().map_err(unknown)
    });
    let (multifd_channels, multifd_compression) =
        (multifd_channels.transpose()?, multifd_compression.transpose()?);
    context.operations.set_migration_parameters(MigrationParameters {
        downtime_limit: downtime_limit.unwrap_or(old.downtime_limit),
        max_bandwidth: max_bandwidth.unwrap_or(old.max_bandwidth),
        convergence,
        multifd_channels: multifd_channels.unwrap_or(old.multifd_channels),
        multifd_compression: multifd_compression.map_or(old.multifd_compression, Into::into),
    })?;
    nothing()
}

fn query_parameters(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    to_json(context.operations.migration_parameters())
}

/// Those that can be changed here are what [`query_capabilities`] lists. They may change while a migration runs.
fn set_capabilities(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let (mut events, mut auto_converge, mut postcopy) = (None, None, None);
    for mut entry in arguments.objects("capabilities")? {
        let capability = entry.string("capability")?;
        let state = entry.bool("state")?;
        entry.finish()?;
        match capability.as_str() {
            "events" => events = Some(state),
            AUTO_CONVERGE => auto_converge = Some(state),
            "postcopy-ram" => postcopy = Some(state),
            _ => {
                return Err(QmpError::generic(format!(
                    "Parameter 'capability' does not accept value '{capability}'"
                )));
            }
        }
    }
    arguments.finish()?;
    if let Some(on) = postcopy {
        context.operations.set_postcopy_ram(on);
    }
    if let Some(on) = events {
        context.events.set_migration_events(on);
    }
    if let Some(on) = auto_converge {
        let mut parameters = context.operations.migration_parameters();
        parameters.convergence.auto_converge = on;
        context.operations.set_migration_parameters(parameters)?;
    }
    nothing()
}

fn query_capabilities(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    Ok(json!([
        { "capability": "events", "state": context.events.migration_events() },
        {
            "capability": AUTO_CONVERGE,
            "state": context.operations.migration_parameters().convergence.auto_converge,
        },
        { "capability": "postcopy-ram", "state": context.operations.postcopy_ram() },
    ]))
}

fn ferry_status(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    to_json(context.operations.ferry_status())
}

/// The operator knows that the destination has the guest.
fn confirm(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    context.operations.decide_handover(Word::Confirm)?;
    nothing()
}

/// The operator knows that the destination never ran the guest and never will.
fn reclaim(context: &Context, arguments: Arguments) -> Result<Value, QmpError> {
    arguments.finish()?;
    context.operations.decide_handover(Word::Reclaim)?;
    nothing()
}
