//! `ferry limits`: shows the limits of a machine's migrations, and changes them while one runs.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Value, json};

use super::output::say;
use crate::control::{Client, Limits};

/// Which machine, and what changes. Its help stands at [`super::Command::Limits`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry limits --api vm.sock
  ferry limits --api vm.sock --downtime-limit 1000 --max-bandwidth 0
  ferry limits --api vm.sock --timeout 60 --on-timeout force --auto-converge
  ferry limits --api vm.sock --auto-converge=false")]
pub struct LimitsArguments {
    /// Control socket of the machine (its --api).
    #[arg(long, value_name = "PATH")]
    pub api: PathBuf,
    #[command(flatten)]
    #[allow(missing_docs, reason = "its documentation would be the help of this command")]
    pub limits: Limits,
    /// Answer in JSON.
    #[arg(long)]
    pub json: bool,
}

impl LimitsArguments {
    /// Changes what was given, then shows all.
    ///
    /// # Errors
    /// No machine answers, or it refused.
    pub fn execute(&self) -> anyhow::Result<()> {
        let mut client = Client::connect(&self.api)?;
        client.set_limits(&self.limits)?;
        let parameters = client.execute("query-migrate-parameters", json!({}))?;
        let capabilities = client.execute("query-migrate-capabilities", json!({}))?;
        if self.json {
            say!("{}", json!({ "parameters": parameters, "capabilities": capabilities }))?;
            return Ok(());
        }
        for (name, value) in parameters.as_object().into_iter().flatten() {
            say!("{name}: {}", plain(value))?;
        }
        for capability in capabilities.as_array().into_iter().flatten() {
            say!("{}: {}", plain(&capability["capability"]), plain(&capability["state"]))?;
        }
        Ok(())
    }
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}
