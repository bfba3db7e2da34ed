//! Limits of migrations, and what is done about a guest that dirties its memory faster than it goes: in the words of the control
//! socket, which are QEMU's where it has some.

use std::time::Duration;

use engine::{Convergence, ThrottleSteps};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::protocol::{Arguments, QmpError};
use super::{Client, Error, MultifdCompression};
use crate::config;

/// The capability that has vCPUs slowed down.
pub(super) const AUTO_CONVERGE: &str = "auto-converge";

/// The part of `query-migrate-parameters` about convergence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct ConvergenceParameters {
    /// vCPUs are slowed down when the guest dirties more than this part of what is sent meanwhile, in percent.
    pub throttle_trigger_threshold: u8,
    /// By how much first, in percent of their time.
    pub cpu_throttle_initial: u8,
    /// By how much more each time.
    pub cpu_throttle_increment: u8,
    /// By how much at most.
    pub max_cpu_throttle: u8,
    /// How many rounds may be made; 0: as many as it takes.
    pub x_ferry_max_rounds: u32,
    /// Seconds that a migration may take until the guest is stopped; 0: as long as it takes.
    pub x_ferry_timeout: u32,
    /// What follows when either is used up.
    pub x_ferry_on_timeout: OnTimeout,
    /// Whether they are slowed down at all: a capability.
    #[serde(skip)]
    pub auto_converge: bool,
}

/// What becomes of a migration that has used up its rounds or its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum OnTimeout {
    /// It fails, and the guest goes on where it is.
    #[default]
    Cancel,
    /// The guest moves, and the rest of its memory follows; refused when the migration begins if the destination cannot. One that runs must
    /// have begun with it, or with --postcopy: otherwise this is refused.
    Postcopy,
    /// The guest is stopped and moves, whatever downtime that costs (at most two minutes).
    Force,
}

impl Default for ConvergenceParameters {
    fn default() -> Self {
        Convergence::default().into()
    }
}

impl From<Convergence> for ConvergenceParameters {
    fn from(convergence: Convergence) -> Self {
        let Convergence { max_rounds, timeout, on_timeout, auto_converge, throttle } = convergence;
        let ThrottleSteps { initial, increment, max, trigger } = throttle;
        Self {
            throttle_trigger_threshold: trigger,
            cpu_throttle_initial: initial,
            cpu_throttle_increment: increment,
            max_cpu_throttle: max,
            x_ferry_max_rounds: max_rounds.unwrap_or(0),
            x_ferry_timeout: timeout.map_or(0, |time| u32::try_from(time.as_secs()).unwrap_or(u32::MAX)),
            x_ferry_on_timeout: match on_timeout {
                engine::OnTimeout::Cancel => OnTimeout::Cancel,
                engine::OnTimeout::Postcopy => OnTimeout::Postcopy,
                engine::OnTimeout::Force => OnTimeout::Force,
            },
            auto_converge,
        }
    }
}

impl From<ConvergenceParameters> for Convergence {
    fn from(parameters: ConvergenceParameters) -> Self {
        let seconds = parameters.x_ferry_timeout;
        Self {
            max_rounds: Some(parameters.x_ferry_max_rounds).filter(|rounds| *rounds > 0),
            timeout: (seconds > 0).then(|| Duration::from_secs(seconds.into())),
            on_timeout: match parameters.x_ferry_on_timeout {
                OnTimeout::Cancel => engine::OnTimeout::Cancel,
                OnTimeout::Postcopy => engine::OnTimeout::Postcopy,
                OnTimeout::Force => engine::OnTimeout::Force,
            },
            auto_converge: parameters.auto_converge,
            throttle: ThrottleSteps {
                initial: parameters.cpu_throttle_initial,
                increment: parameters.cpu_throttle_increment,
                max: parameters.max_cpu_throttle,
                trigger: parameters.throttle_trigger_threshold,
            },
        }
    }
}

impl ConvergenceParameters {
    /// Takes from `arguments` what is to change.
    pub(super) fn change(self, arguments: &mut Arguments) -> Result<Self, QmpError> {
        let mut percent = |name: &str, old: u8, most: u8| match arguments.optional_u64(name)? {
            None => Ok(old),
            Some(value) => {
                u8::try_from(value).ok().filter(|value| (1..=most).contains(value)).ok_or_else(|| {
                    QmpError::generic(format!(
                        "Parameter '{name}' expects an integer in the range of 1 to {most}"
                    ))
                })
            }
        };
        let most = ThrottleSteps::MOST;
        let throttle_trigger_threshold =
            percent("throttle-trigger-threshold", self.throttle_trigger_threshold, 100)?;
        let cpu_throttle_initial = percent("cpu-throttle-initial", self.cpu_throttle_initial, most)?;
        let cpu_throttle_increment = percent("cpu-throttle-increment", self.cpu_throttle_increment, most)?;
        let max_cpu_throttle = percent("max-cpu-throttle", self.max_cpu_throttle, most)?;
        if max_cpu_throttle < cpu_throttle_initial {
            return Err(QmpError::generic(
                "Parameter 'max-cpu-throttle' expects an integer in the range of cpu-throttle-initial to 99",
            ));
        }
        let mut number = |name: &str, old: u32| match arguments.optional_u64(name)? {
            None => Ok(old),
            Some(value) => u32::try_from(value)
                .map_err(|_| QmpError::generic(format!("Parameter '{name}' expects uint32"))),
        };
        let x_ferry_max_rounds = number("x-ferry-max-rounds", self.x_ferry_max_rounds)?;
        let x_ferry_timeout = number("x-ferry-timeout", self.x_ferry_timeout)?;
        let x_ferry_on_timeout = match arguments.optional_string("x-ferry-on-timeout")? {
            None => self.x_ferry_on_timeout,
            Some(way) => serde_json::from_value(Value::String(way.clone())).map_err(|_| {
                QmpError::generic(format!("Parameter 'x-ferry-on-timeout' does not accept value '{way}'"))
            })?,
        };
        Ok(Self {
            throttle_trigger_threshold,
            cpu_throttle_initial,
            cpu_throttle_increment,
            max_cpu_throttle,
            x_ferry_max_rounds,
            x_ferry_timeout,
            x_ferry_on_timeout,
            auto_converge: self.auto_converge,
        })
    }
}

/// Limits that a client changes, for the migration that runs and for later ones of the process. `None`: they stay as they are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::Args)]
pub struct Limits {
    /// Milliseconds that the guest may be stopped; holds for later migrations of this process too [at its start: 300].
    #[arg(long, value_name = "MS")]
    pub downtime_limit: Option<u64>,
    /// Bytes a second, for example 200M, at least 64K; holds for later migrations of this process too [at its start: 0, no
    /// limit].
    #[arg(long, value_name = "SIZE", value_parser = config::parse_size)]
    pub max_bandwidth: Option<u64>,
    /// Connections for guest memory beside that for everything else: 1 to 64, or 0 to send all over one; holds for migrations of this
    /// process that begin later [at its start: 2].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=i64::from(engine::CHANNELS_MAX)))]
    pub channels: Option<u16>,
    /// How the --channels compress: worth it where the network is slower than the processors. With --channels 0 nothing is compressed.
    /// Holds for migrations of this process that begin later [at its start: none].
    #[arg(long, value_enum, value_name = "HOW")]
    pub compress: Option<MultifdCompression>,
    /// Rounds of dirty pages after which a guest that still dirties too many is dealt with as --on-timeout says; holds for later
    /// migrations too [at the start: 0, as many as it takes].
    #[arg(long, value_name = "N")]
    pub max_rounds: Option<u32>,
    /// Seconds after which a guest that is not stopped yet is dealt with as --on-timeout says; holds for later migrations too [at the
    /// start: 0, as long as it takes].
    #[arg(long, value_name = "SECONDS")]
    pub timeout: Option<u32>,
    /// What follows when --max-rounds or --timeout is used up; holds for later migrations too [at the start: cancel].
    #[arg(long, value_enum)]
    pub on_timeout: Option<OnTimeout>,
    /// Slow the vCPUs down, step by step, while the guest dirties its memory faster than it goes; holds for later migrations too [at the
    /// start: false].
    #[arg(long, value_name = "true|false", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub auto_converge: Option<bool>,
}

impl Limits {
    fn parameters(&self) -> Map<String, Value> {
        let Self {
            downtime_limit,
            max_bandwidth,
            channels,
            compress,
            max_rounds,
            timeout,
            on_timeout,
            auto_converge: _,
        } = self;
        let entries = [
            ("downtime-limit", downtime_limit.map(Value::from)),
            ("max-bandwidth", max_bandwidth.map(Value::from)),
            ("multifd-channels", channels.map(Value::from)),
            ("multifd-compression", compress.map(|name| json!(name))),
            ("x-ferry-max-rounds", max_rounds.map(Value::from)),
            ("x-ferry-timeout", timeout.map(Value::from)),
            ("x-ferry-on-timeout", on_timeout.map(|way| json!(way))),
        ];
        entries.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))).collect()
    }
}

impl Client {
    /// Changes limits, of a migration that runs too.
    ///
    /// # Errors
    /// The machine does not take them.
    pub fn set_limits(&mut self, limits: &Limits) -> Result<(), Error> {
        let parameters = limits.parameters();
        if !parameters.is_empty() {
            self.execute("migrate-set-parameters", parameters.into())?;
        }
        if let Some(state) = limits.auto_converge {
            let capabilities = json!({ "capabilities": [{ "capability": AUTO_CONVERGE, "state": state }] });
            self.execute("migrate-set-capabilities", capabilities)?;
        }
        Ok(())
    }
}
