//! `ferry namespace add|remove|resize`: namespaces of the host's, while the guest runs.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use serde_json::{Value, json};

use super::output::say;
use crate::config::{BackendSpec, NamespaceOption, NamespaceSpec, parse_size};
use crate::control::Client;

/// What to do with which namespace. Its help stands at [`super::Command::Namespace`].
#[derive(Clone, Debug, Args)]
pub struct NamespaceArguments {
    #[command(subcommand)]
    command: NamespaceCommand,
}

#[derive(Clone, Debug, Subcommand)]
enum NamespaceCommand {
    /// Add a namespace; the guest is told.
    ///
    /// Example: ferry namespace add --api vm.sock controller=c0,nsid=7,backend=file,path=c.raw
    Add(AddArguments),
    /// Take a namespace away, and let its image go.
    ///
    /// Commands in flight end first; what comes after them is refused. A guest that has it mounted loses it, as if a disk were pulled
    /// out. Example: ferry namespace remove --api vm.sock --controller c0 --nsid 7
    Remove(WhichArguments),
    /// Let a namespace grow; the guest is told.
    ///
    /// Without --size it takes the size that its image has by now. Nothing shrinks.
    /// Example: ferry namespace resize --api vm.sock --controller c0 --nsid 7 --size 20G
    Resize(ResizeArguments),
}

#[derive(Clone, Debug, Args)]
struct AddArguments {
    #[command(flatten)]
    machine: MachineArguments,
    /// As for `ferry run --ns`: `controller=S,nsid=N,backend=file|qcow2|null[,path=|size=][,lba=512|4096]
    /// [,metadata=8|64[,extended][,pi=0..3[,pi-first]]][,ro][,buffered][,attached=S+S]`.
    #[arg(value_name = "OPTIONS")]
    namespace: NamespaceOption,
}

#[derive(Clone, Debug, Args)]
struct MachineArguments {
    /// Control socket of the machine (its --api).
    #[arg(long, value_name = "PATH")]
    api: PathBuf,
    /// Answer in JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Debug, Args)]
struct WhichArguments {
    #[command(flatten)]
    machine: MachineArguments,
    /// Serial number of the controller.
    #[arg(long, value_name = "SERIAL")]
    controller: String,
    /// Namespace identifier.
    #[arg(long, value_name = "N")]
    nsid: u32,
}

#[derive(Clone, Debug, Args)]
struct ResizeArguments {
    #[command(flatten)]
    which: WhichArguments,
    /// Make the image file so large, for example 20G.
    #[arg(long, value_name = "SIZE")]
    size: Option<String>,
}

impl NamespaceArguments {
    /// Does it.
    ///
    /// # Errors
    /// No machine answers, or it refused.
    pub fn execute(&self) -> anyhow::Result<()> {
        match &self.command {
            NamespaceCommand::Add(AddArguments { machine, namespace }) => {
                let answer = machine.ask("x-ferry-namespace-add", addition(namespace)?)?;
                let NamespaceOption { controller, namespace } = namespace;
                machine
                    .print(&answer, || format!("namespace {} of {controller} is there", namespace.nsid))?;
            }
            NamespaceCommand::Remove(which) => {
                let answer = which.machine.ask("x-ferry-namespace-remove", which.arguments())?;
                let what = if answer["released"] == json!(true) {
                    "is gone"
                } else {
                    "is gone for the guest; commands are still in flight, and its image is let go when they end"
                };
                let WhichArguments { controller, nsid, .. } = which;
                which.machine.print(&answer, || format!("namespace {nsid} of {controller} {what}"))?;
            }
            NamespaceCommand::Resize(ResizeArguments { which, size }) => {
                let mut arguments = which.arguments();
                if let Some(size) = size {
                    arguments["size"] = json!(parse_size(size)?);
                }
                let answer = which.machine.ask("x-ferry-namespace-resize", arguments)?;
                let bytes = answer["capacity-bytes"].as_u64().context("the machine does not say the size")?;
                let WhichArguments { controller, nsid, .. } = which;
                which
                    .machine
                    .print(&answer, || format!("namespace {nsid} of {controller} has {bytes} bytes"))?;
            }
        }
        Ok(())
    }
}

impl MachineArguments {
    fn ask(&self, command: &str, arguments: Value) -> anyhow::Result<Value> {
        Ok(Client::connect(&self.api)?.execute(command, arguments)?)
    }

    fn print(&self, answer: &Value, words: impl FnOnce() -> String) -> anyhow::Result<()> {
        if self.json { say!("{answer}") } else { say!("{}", words()) }
    }
}

impl WhichArguments {
    fn arguments(&self) -> Value {
        json!({ "controller": self.controller, "nsid": self.nsid })
    }
}

/// What the machine is asked for. It may have another working directory.
fn addition(option: &NamespaceOption) -> anyhow::Result<Value> {
    let NamespaceOption { controller, namespace } = option;
    let NamespaceSpec { nsid, backend, block_bytes, read_only, buffered, metadata, attached } = namespace;
    let mut arguments = json!({
        "controller": controller, "nsid": nsid, "lba": block_bytes, "ro": read_only, "buffered": buffered
    });
    if !attached.is_empty() {
        arguments["attached"] = json!(attached);
    }
    if let Some(metadata) = metadata {
        arguments["metadata"] = json!(metadata.bytes);
        arguments["extended"] = json!(metadata.extended);
        arguments["pi"] = json!(metadata.protection_type);
        arguments["pi-first"] = json!(metadata.protection_first);
    }
    match backend {
        BackendSpec::File(path) | BackendSpec::Qcow2(path) | BackendSpec::Overlay { path, .. } => {
            let is_raw = matches!(backend, BackendSpec::File(_));
            arguments["backend"] = json!(if is_raw { "file" } else { "qcow2" });
            arguments["path"] = json!(absolute(path)?);
            if let BackendSpec::Overlay { base, .. } = backend {
                arguments["base"] = json!(absolute(&base.path)?);
                arguments["base-format"] = json!(base.format.to_string());
            }
        }
        BackendSpec::Null { size_bytes } => {
            arguments["backend"] = json!("null");
            arguments["size"] = json!(size_bytes);
        }
        BackendSpec::Memory { .. } => {
            bail!("a namespace in memory is part of the machine's RAM, and there from its start or never")
        }
    }
    Ok(arguments)
}

fn absolute(path: &Path) -> anyhow::Result<String> {
    let path = std::path::absolute(path).with_context(|| format!("cannot find {}", path.display()))?;
    let Some(path) = path.to_str() else { bail!("{} is not UTF-8", path.display()) };
    Ok(path.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addition_of(text: &str) -> anyhow::Result<Value> {
        addition(&text.parse().unwrap())
    }

    #[test]
    fn what_is_added_is_said_in_full() {
        let file =
            addition_of("controller=c,nsid=7,backend=file,path=/images/a.raw,lba=4096,ro,buffered").unwrap();
        let expected = json!({
            "controller": "c", "nsid": 7, "backend": "file", "path": "/images/a.raw", "lba": 4096, "ro": true,
            "buffered": true
        });
        assert_eq!(file, expected);
        let null = addition_of("controller=c,nsid=8,backend=null,size=1M").unwrap();
        let expected = json!({
            "controller": "c", "nsid": 8, "backend": "null", "size": 1 << 20, "lba": 512, "ro": false,
            "buffered": false
        });
        assert_eq!(null, expected);
        let some = addition_of("controller=c,nsid=8,backend=null,size=1M,attached=c+d").unwrap();
        assert_eq!(some["attached"], json!(["c", "d"]));
        let protected =
            addition_of("controller=c,nsid=8,backend=null,size=1M,metadata=8,extended,pi=2").unwrap();
        let said = ["metadata", "extended", "pi", "pi-first"].map(|name| protected[name].clone());
        assert_eq!(said, [json!(8), json!(true), json!(2), json!(false)]);
        let relative = addition_of("controller=c,nsid=7,backend=file,path=a.raw").unwrap();
        let here = std::env::current_dir().unwrap().join("a.raw");
        assert_eq!(relative["path"], json!(here.to_str().unwrap()), "the machine is elsewhere");
        let over = addition_of("controller=c,nsid=7,backend=qcow2,path=/a,base=/b").unwrap();
        let said = ["backend", "path", "base", "base-format"].map(|name| over[name].clone());
        assert_eq!(said, [json!("qcow2"), json!("/a"), json!("/b"), json!("raw")]);
        let error = addition_of("controller=c,nsid=8,backend=memory,size=1M").unwrap_err().to_string();
        assert!(error.contains("RAM"), "{error}");
    }
}
