//! Commands about namespaces of the host's.

use block::{Base, BaseFormat};
use serde_json::{Value, json};

use super::commands::Context;
use super::protocol::{Arguments, QmpError};
use crate::config::{BackendSpec, MAX_NSID, MetadataSpec, NamespaceOption, NamespaceSpec};

/// `x-ferry-namespace-add`.
pub(super) fn add(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let controller = arguments.string("controller")?;
    let nsid = nsid(&mut arguments)?;
    let backend = match arguments.string("backend")?.as_str() {
        "file" => BackendSpec::File(arguments.string("path")?.into()),
        "qcow2" => {
            let path = arguments.string("path")?.into();
            match base(&mut arguments)? {
                Some(base) => BackendSpec::Overlay { path, base },
                None => BackendSpec::Qcow2(path),
            }
        }
        "null" => BackendSpec::Null { size_bytes: arguments.u64("size")? },
        other => {
            return Err(QmpError::generic(format!("Parameter 'backend' does not accept value '{other}'")));
        }
    };
    let block_bytes = match arguments.optional_u64("lba")? {
        None => 512,
        Some(bytes @ (512 | 4096)) => bytes as u32,
        Some(_) => return Err(QmpError::generic("Parameter 'lba' expects 512 or 4096")),
    };
    let (bytes, extended) =
        (arguments.optional_u64("metadata")?, arguments.optional_bool("extended")?.unwrap_or(false));
    let (pi, first) =
        (arguments.optional_u64("pi")?.unwrap_or(0), arguments.optional_bool("pi-first")?.unwrap_or(false));
    let metadata = MetadataSpec::new(block_bytes, bytes, extended, pi, first).map_err(QmpError::generic)?;
    let read_only = arguments.optional_bool("ro")?.unwrap_or(false);
    let buffered = arguments.optional_bool("buffered")?.unwrap_or(false);
    let attached = arguments.optional_strings("attached")?;
    arguments.finish()?;
    let namespace = NamespaceSpec { nsid, backend, block_bytes, read_only, buffered, metadata, attached };
    context.operations.add_namespace(&NamespaceOption { controller, namespace })?;
    Ok(json!({}))
}

/// What a qcow2 image lies over.
fn base(arguments: &mut Arguments) -> Result<Option<Base>, QmpError> {
    let format = match arguments.optional_string("base-format")?.as_deref() {
        None | Some("raw") => BaseFormat::Raw,
        Some("qcow2") => BaseFormat::Qcow2,
        Some(other) => {
            return Err(QmpError::generic(format!(
                "Parameter 'base-format' does not accept value '{other}'"
            )));
        }
    };
    let path = arguments.optional_string("base")?;
    Ok(path.map(|path| Base { path: path.into(), format }))
}

/// `x-ferry-namespace-remove`: whether the image was let go already.
pub(super) fn remove(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let controller = arguments.string("controller")?;
    let nsid = nsid(&mut arguments)?;
    arguments.finish()?;
    let released = context.operations.remove_namespace(&controller, nsid)?;
    Ok(json!({ "released": released }))
}

/// `x-ferry-namespace-resize`.
pub(super) fn resize(context: &Context, mut arguments: Arguments) -> Result<Value, QmpError> {
    let controller = arguments.string("controller")?;
    let nsid = nsid(&mut arguments)?;
    let size_bytes = arguments.optional_u64("size")?;
    arguments.finish()?;
    let capacity_bytes = context.operations.resize_namespace(&controller, nsid, size_bytes)?;
    Ok(json!({ "capacity-bytes": capacity_bytes }))
}

fn nsid(arguments: &mut Arguments) -> Result<u32, QmpError> {
    let nsid = arguments.u64("nsid")?;
    let valid = u32::try_from(nsid).ok().filter(|nsid| (1..=MAX_NSID).contains(nsid));
    valid.ok_or_else(|| QmpError::generic(format!("Parameter 'nsid' expects 1 to {MAX_NSID}")))
}
