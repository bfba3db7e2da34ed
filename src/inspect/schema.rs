//! The schema of this build.

use serde_json::{Value as Json, json};

use crate::machine::schemas;

/// Everything that this build can write into a file: of each kind of section the description, with the keys of a trailer and
/// what only the type knows (`oldest`, `count`, `max`, `since`, ...). Sections of devices are named by the kind of device.
pub fn build_schema() -> Json {
    let [configuration, integrity] = stream::schemas();
    let named = |(name, schema): (&str, vmstate::Schema)| {
        let mut json = schema.to_json();
        json["name"] = json!(name);
        json
    };
    let own = [("ferry", engine::file_schema()), ("integrity", integrity)];
    let devices = own.into_iter().chain(schemas()).map(named);
    json!({
        "page_size": stream::PAGE_BYTES,
        "configuration": configuration.to_json(),
        "devices": devices.collect::<Vec<_>>(),
    })
}
