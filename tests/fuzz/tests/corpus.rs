//! Every target with its corpus, its seeds and mutations of them: always the same, in a few seconds.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use fuzz::mutate::{Random, mutate};
use fuzz::{TARGETS, Target};

/// For each target.
const MUTATIONS: u64 = 20_000;
/// For each that builds a machine and plays with it, which takes as long as reading ten inputs.
const PLAYED_MUTATIONS: u64 = 2_000;
/// For all of them.
const CORPUS_BYTES_MAX: u64 = 5 << 20;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus")
}

fn corpus(target: &Target) -> Vec<Vec<u8>> {
    let folder = folder().join(target.name);
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
    let mut paths: Vec<_> = entries.map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    assert!(!paths.is_empty(), "{} is empty: cargo run -p fuzz --example seeds", folder.display());
    paths.iter().map(|path| fs::read(path).expect("a file of the corpus")).collect()
}

#[test]
fn corpus_and_its_mutations_are_read_without_a_panic() {
    for target in TARGETS {
        let mut inputs = corpus(target);
        inputs.extend((target.seeds)());
        inputs.iter().for_each(|input| (target.run)(input));
        let mut random = Random::new(1);
        let mutations = if target.name.starts_with("guest_") { PLAYED_MUTATIONS } else { MUTATIONS };
        for _ in 0..mutations {
            let mut input = inputs[random.below(inputs.len())].clone();
            mutate(&mut input, &inputs[random.below(inputs.len())], &mut random);
            (target.run)(&input);
        }
        println!("{}: {} inputs and {mutations} mutations", target.name, inputs.len());
    }
}

#[test]
fn corpus_is_small_and_every_folder_of_it_a_target() {
    let names: BTreeSet<_> = TARGETS.iter().map(|target| target.name.to_owned()).collect();
    let folders =
        fs::read_dir(folder()).expect("the corpus").map(|entry| entry.expect("an entry").file_name());
    let folders: BTreeSet<_> = folders.map(|name| name.to_string_lossy().into_owned()).collect();
    assert_eq!(folders, names);
    let bytes: u64 = TARGETS.iter().flat_map(corpus).map(|input| input.len() as u64).sum();
    assert!(bytes <= CORPUS_BYTES_MAX, "{bytes} bytes");
    for target in TARGETS {
        let file = format!("fuzz/fuzz_targets/{}.rs", target.name);
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(&file);
        assert!(path.exists(), "{file} is missing");
    }
}

#[test]
fn mutations_are_the_same_in_every_run() {
    let mutations = || {
        let (mut random, mut input) = (Random::new(1), b"a stream".to_vec());
        (0..100).for_each(|_| mutate(&mut input, b"another", &mut random));
        input
    };
    assert_eq!(mutations(), mutations());
    assert_ne!(mutations(), b"a stream");
}
