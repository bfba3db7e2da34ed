//! Structs that contain themselves, through every kind of collection.

use serde_json::json;

use crate::{Bitmap, Slots, VmState, describe, from_bytes, schema, schema_hash, schema_json, to_bytes};

/// A bus with bridges to further buses behind it.
#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "bus", depth = 4)]
pub(super) struct Bus {
    pub(super) number: u8,
    pub(super) slot_count: u8,
    #[vmstate(len = "slot_count", max = 32, recursive)]
    pub(super) bridges: Slots<Bus>,
}

fn chain(levels: u8) -> Bus {
    let inner = if levels > 1 { [Some(chain(levels - 1))].into_iter().collect() } else { Slots::empty(1) };
    Bus { number: levels, slot_count: 1, bridges: inner }
}

#[test]
fn struct_lies_inside_itself_as_deep_as_it_says() {
    let bytes = to_bytes(&chain(4));
    assert_eq!(bytes, [4, 1, b'1', 3, 1, b'1', 2, 1, b'1', 1, 1, b'0']);
    assert_eq!(from_bytes::<Bus>(&bytes, 1), Ok(chain(4)));
    let error = from_bytes::<Bus>(&to_bytes(&chain(5)), 1).unwrap_err();
    let place = "bridges[0].bridges[0].bridges[0].bridges[0]";
    assert_eq!(error.to_string(), format!("{place}: \"bus\" is nested more than 4 levels deep"));
}

#[test]
fn siblings_are_not_deeper_than_each_other() {
    let bridges = vec![Some(chain(3)); 5].into_iter().collect();
    let wide = Bus { number: 9, slot_count: 5, bridges };
    assert_eq!(from_bytes::<Bus>(&to_bytes(&wide), 1), Ok(wide));
}

#[test]
fn endless_descent_is_an_error() {
    let hostile = [9, 1, b'1'].repeat(100_000);
    let error = from_bytes::<Bus>(&hostile, 1).unwrap_err();
    assert!(error.to_string().ends_with("nested more than 4 levels deep"), "{error}");
}

/// Two that contain each other: one of them says how deep.
#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "folder", depth = 3)]
pub(super) struct Folder {
    #[vmstate(list, max = 4, recursive)]
    pub(super) entries: Vec<Entry>,
}

#[derive(VmState, Debug, Clone, Default, PartialEq)]
#[vmstate(name = "entry")]
pub(super) struct Entry {
    id: u16,
    count: u16,
    #[vmstate(len = "count", max = 4)]
    folders: Vec<Folder>,
}

fn nested(levels: u16) -> Folder {
    let inner = (levels > 1).then(|| nested(levels - 1));
    Folder {
        entries: vec![Entry {
            id: levels,
            count: inner.is_some().into(),
            folders: inner.into_iter().collect(),
        }],
    }
}

#[test]
fn two_structs_lie_inside_each_other() {
    let bytes = to_bytes(&nested(3));
    assert_eq!(from_bytes::<Folder>(&bytes, 1), Ok(nested(3)));
    let error = from_bytes::<Folder>(&to_bytes(&nested(4)), 1).unwrap_err();
    assert!(
        error
            .to_string()
            .starts_with("entries[0].folders[0].entries[0].folders[0].entries[0].folders[0]: \"folder\"")
    );
    // Beginning with the other one, there may be as many.
    let entry = Entry { id: 0, count: 1, folders: vec![nested(3)] };
    assert_eq!(from_bytes::<Entry>(&to_bytes(&entry), 1), Ok(entry));
}

/// A recursive struct inside another one: their levels are counted apart.
#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "forest", depth = 2)]
pub(super) struct Forest {
    pub(super) bus: Bus,
    pub(super) rows: u8,
    pub(super) columns: u8,
    #[vmstate(len = "rows", max = 2, each_len = "columns", each_max = 2, recursive)]
    pub(super) forests: Vec<Slots<Forest>>,
    #[vmstate(len = 3)]
    pub(super) map: Bitmap,
}

#[test]
fn levels_of_different_structs_are_counted_apart() {
    let forest = |bus, rows: Vec<Slots<Forest>>| Forest {
        bus,
        rows: rows.len() as u8,
        columns: rows.first().map_or(0, |row| row.len() as u8),
        forests: rows,
        map: Bitmap::new(3),
    };
    let inner = forest(chain(4), vec![]);
    let outer = forest(chain(4), vec![[Some(inner), None].into_iter().collect()]);
    assert_eq!(from_bytes::<Forest>(&to_bytes(&outer), 1), Ok(outer.clone()));
    let third = forest(chain(1), vec![[Some(outer)].into_iter().collect()]);
    let error = from_bytes::<Forest>(&to_bytes(&third), 1).unwrap_err();
    assert_eq!(
        error.to_string(),
        "forests[0][0].forests[0][0]: \"forest\" is nested more than 2 levels deep"
    );
}

#[test]
fn schema_names_the_recursion_instead_of_unfolding_it() {
    let bridges = &schema_json::<Bus>()["fields"][2];
    assert_eq!((&bridges["type"], &bridges["recursion"]), (&json!("ptr-marker"), &json!("bus")));
    assert_eq!((&bridges["struct"], &schema_json::<Bus>()["depth"]), (&json!(null), &json!(4)));
    // Wherever one begins, both of a pair are unfolded once.
    let folder = &schema_json::<Folder>();
    assert_eq!(folder["fields"][0]["struct"]["fields"][2]["recursion"], "folder");
    let entry = &schema_json::<Entry>();
    assert_eq!(entry["fields"][2]["struct"]["fields"][0]["recursion"], "entry");
    assert_eq!(entry["fields"][2]["struct"]["depth"], 3);
    assert_eq!(serde_json::from_str::<serde_json::Value>(&schema::<Entry>().to_string()).unwrap(), *entry);
    assert_ne!(schema_hash::<Entry>(), schema_hash::<Folder>());
}

#[test]
fn description_unfolds_what_is_there() {
    let description = describe(&chain(2));
    let inner = &description["fields"][3]["struct"];
    assert_eq!(inner["vmsd_name"], "bus");
    assert_eq!(inner["fields"].as_array().unwrap().len(), 3);
}

/// As large as a struct may be that is so deep.
#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "large", depth = 8)]
struct Large {
    bytes: [u8; 8000],
    words: [[u32; 100]; 17],
    #[vmstate(list, max = 1, recursive)]
    inner: Vec<Large>,
}

#[test]
fn deepest_load_fits_the_stack_of_a_thread() {
    let bytes = [&[7; 14800][..], &[1]].concat().repeat(9);
    let smaller = std::thread::Builder::new().stack_size(2 << 20);
    let depth = smaller
        .spawn(move || {
            let error = from_bytes::<Large>(&bytes, 1).unwrap_err();
            error.path.matches("inner[0]").count()
        })
        .unwrap()
        .join()
        .unwrap();
    assert_eq!(depth, 8);
}
