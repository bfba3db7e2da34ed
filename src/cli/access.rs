//! `ferry access`: how a controller gives access to namespaces that several share.

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use serde_json::json;

use super::control::word;
use super::output::say;
use crate::control::{AccessState, Client};

/// Which access is set. Its help stands at [`super::Command::Access`].
#[derive(Clone, Debug, Args)]
#[command(group = clap::ArgGroup::new("which").args(["group", "nsid"]).required(true))]
pub struct AccessArguments {
    /// Control socket of the machine (its --api).
    #[arg(long, value_name = "PATH")]
    api: PathBuf,
    /// Answer in JSON.
    #[arg(long)]
    json: bool,
    /// Serial number of the controller.
    #[arg(long, value_name = "SERIAL")]
    controller: String,
    /// ANA group, 1 to 16: that of namespace n is (n - 1) mod 16 + 1.
    #[arg(long, value_name = "N")]
    group: Option<u32>,
    /// A namespace: its group is meant.
    #[arg(long, value_name = "N")]
    nsid: Option<u32>,
    /// How the controller gives access from now on.
    #[arg(long, value_enum)]
    state: AccessState,
}

impl AccessArguments {
    /// Does it.
    ///
    /// # Errors
    /// No machine answers, or it refused.
    pub fn execute(&self) -> anyhow::Result<()> {
        let Self { controller, state, .. } = self;
        let mut arguments = json!({ "controller": controller, "state": state });
        for (name, number) in [("group", self.group), ("nsid", self.nsid)] {
            if let Some(number) = number {
                arguments[name] = json!(number);
            }
        }
        let answer = Client::connect(&self.api)?.execute("x-ferry-ana-set", arguments)?;
        if self.json {
            say!("{answer}")?;
        } else {
            let group = answer["group"].as_u64().context("the machine does not say the group")?;
            say!("{controller} gives access to group {group}: {}", word(state))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use crate::cli::Arguments;

    #[test]
    fn a_group_is_named_by_its_number_or_by_a_namespace() {
        let parse = |more: &str| {
            let command = format!("ferry access --api a --controller c --state inaccessible {more}");
            Arguments::try_parse_from(command.split_whitespace()).map_err(|error| error.to_string())
        };
        assert!(parse("--nsid 1").is_ok() && parse("--group 1").is_ok());
        let neither = parse("").unwrap_err();
        assert!(neither.contains("--group <N>|--nsid <N>"), "{neither}");
        let both = parse("--nsid 1 --group 1").unwrap_err();
        assert!(both.contains("cannot be used with"), "{both}");
    }
}
