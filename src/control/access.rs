//! The command about asymmetric namespace access.

use serde_json::{Value, json};

use super::commands::Context;
use super::operations::{AccessScope, AccessState};
use super::protocol::{Arguments, QmpError};
use crate::config::MAX_NSID;

/// `x-ferry-ana-set`: how a controller gives access to a group, or to that of a namespace.
pub(super) fn set(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let controller = arguments.string("controller")?;
    let scope = match (arguments.optional_u64("group")?, arguments.optional_u64("nsid")?) {
        (Some(group), None) => AccessScope::Group(number("group", group, nvme::ACCESS_GROUPS)?),
        (None, Some(nsid)) => AccessScope::Namespace(number("nsid", nsid, MAX_NSID)?),
        _ => return Err(QmpError::generic("Parameters 'group' and 'nsid': one of them is expected")),
    };
    let state = arguments.string("state")?;
    let state: AccessState = serde_json::from_value(json!(state))
        .map_err(|_| QmpError::generic(format!("Parameter 'state' does not accept value '{state}'")))?;
    arguments.finish()?;
    let group = context.operations.set_access(&controller, scope, state)?;
    Ok(json!({ "group": group }))
}

fn number(name: &str, value: u64, most: u32) -> Result<u32, QmpError> {
    let valid = u32::try_from(value).ok().filter(|value| (1..=most).contains(value));
    valid.ok_or_else(|| QmpError::generic(format!("Parameter '{name}' expects 1 to {most}")))
}
