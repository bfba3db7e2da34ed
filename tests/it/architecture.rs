//! The rules of the house that a machine can check: who may know whom, where `unsafe` lives, how long a file is.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// For every crate of the workspace, the crates of ours that it may depend on.
const MAY_KNOW: [(&str, &[&str]); 18] = [
    ("nvme-spec", &[]),
    ("vmstate-derive", &[]),
    ("vmstate", &["vmstate-derive"]),
    ("dirty-bitmap", &[]),
    ("bus", &["dirty-bitmap", "vmstate"]),
    ("pci", &["bus", "vmstate"]),
    ("block", &["bus", "vmstate"]),
    ("legacy", &["bus", "vmstate"]),
    ("nvme", &["block", "bus", "nvme-spec", "pci", "vmstate"]),
    ("virtio", &["bus", "pci", "vmstate"]),
    ("stream", &["vmstate"]),
    ("transport", &[]),
    ("engine", &["dirty-bitmap", "stream", "transport", "vmstate"]),
    ("exerciser", &["nvme-spec"]),
    ("certificates", &[]),
    (
        "ferry",
        &[
            "block",
            "bus",
            "engine",
            "exerciser",
            "legacy",
            "nvme",
            "nvme-spec",
            "pci",
            "stream",
            "transport",
            "virtio",
            "vmstate",
        ],
    ),
    ("support", &["exerciser", "ferry", "stream", "transport"]),
    (
        "fuzz",
        &[
            "block",
            "bus",
            "dirty-bitmap",
            "engine",
            "ferry",
            "legacy",
            "nvme",
            "nvme-spec",
            "pci",
            "stream",
            "transport",
            "virtio",
            "vmstate",
        ],
    ),
];

/// Tests that count memory: an allocator is `unsafe` to write.
const COUNTING_ALLOCATORS: &str = "/tests/memory.rs";

/// Files and folders that may hold `unsafe`.
const UNSAFE_HOMES: [&str; 7] = [
    "src/kvm/",
    "src/memory",
    "src/userfault.rs",
    "devices/block/src/uring",
    "migration/transport/src/given.rs",
    "migration/transport/src/memory.rs",
    "resources/exerciser/",
];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every package of the workspace with what it depends on outside its tests, as `cargo metadata` tells.
fn packages() -> BTreeMap<String, BTreeSet<String>> {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version=1", "--no-deps", "--locked", "--offline", "--manifest-path"])
        .arg(root().join("Cargo.toml"))
        .output()
        .expect("cargo starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let metadata: Value = serde_json::from_slice(&output.stdout).expect("cargo writes JSON");
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let packages = metadata["packages"].as_array().expect("a list of packages").iter();
    packages
        .map(|package| {
            let dependencies = package["dependencies"].as_array().expect("a list of dependencies").iter();
            let dependencies = dependencies.filter(|dependency| dependency["kind"] != "dev");
            (text(&package["name"]), dependencies.map(|dependency| text(&dependency["name"])).collect())
        })
        .collect()
}

#[test]
fn crates_know_only_whom_they_may_know() {
    let allowed: BTreeMap<_, BTreeSet<_>> =
        MAY_KNOW.into_iter().map(|(name, known)| (name, known.iter().copied().collect())).collect();
    for (name, dependencies) in packages() {
        let known =
            allowed.get(&*name).unwrap_or_else(|| panic!("{name} has no place in the architecture yet"));
        for dependency in dependencies.iter().filter(|name| allowed.contains_key(&***name)) {
            assert!(known.contains(&**dependency), "{name} must not depend on {dependency}");
        }
        assert_eq!(dependencies.contains("kvm-ioctls"), name == "ferry", "only ferry knows KVM: {name}");
    }
}

fn rust_files(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a folder of the project").map(|entry| entry.expect("an entry"))
    {
        let path = entry.path();
        let name = entry.file_name();
        if path.is_dir() && name != "target" && !name.to_string_lossy().starts_with('.') {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            files.push(path);
        }
    }
}

fn project_files() -> Vec<(String, String)> {
    let mut files = Vec::new();
    rust_files(root(), &mut files);
    assert!(files.len() > 50, "the project's files are found");
    let relative = |path: &Path| path.strip_prefix(root()).expect("below the root").display().to_string();
    files.iter().map(|path| (relative(path), fs::read_to_string(path).expect("a text file"))).collect()
}

#[test]
fn unsafe_code_lives_in_its_named_homes() {
    for (path, text) in project_files() {
        let home =
            UNSAFE_HOMES.iter().any(|home| path.starts_with(home)) || path.ends_with(COUNTING_ALLOCATORS);
        let code = text.lines().map(|line| line.split("//").next().unwrap_or_default());
        let unsafe_lines = code.filter(|line| {
            ["unsafe {", "unsafe impl", "unsafe fn", "unsafe extern"].iter().any(|word| line.contains(word))
        });
        assert!(
            home || path.starts_with("tests/it/") || unsafe_lines.count() == 0,
            "{path} holds unsafe code"
        );
    }
}

#[test]
fn no_file_holds_more_than_one_can_read() {
    for (path, text) in project_files() {
        assert!(text.lines().count() <= 700, "{path} has more than 700 lines: it has two concerns");
    }
}
