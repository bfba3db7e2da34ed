//! Looks for inputs that break a target where there is no nightly compiler: `cargo run --release -p fuzz --example hunt -- TARGET ROUNDS [SEED]`.
//! Mutates seeds, the corpus and its own mutations; what breaks the target is written to the folder for temporary files, and named.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::{env, fs};

use anyhow::Context;
use fuzz::TARGETS;
use fuzz::mutate::{Random, mutate};

/// Mutations of mutations that are kept.
const KEPT: usize = 4096;

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let (name, rounds) = (arguments.first(), arguments.get(1).and_then(|rounds| rounds.parse::<u64>().ok()));
    let target = TARGETS.iter().find(|target| Some(target.name) == name.map(String::as_str));
    let (target, rounds) = target.zip(rounds).context("usage: hunt TARGET ROUNDS [SEED]")?;
    let seed = arguments.get(2).map_or(Ok(1), |seed| seed.parse()).context("a seed is a number")?;
    let mut inputs = (target.seeds)();
    for entry in fs::read_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name))? {
        inputs.push(fs::read(entry?.path())?);
    }
    let (mut random, mut broken) = (Random::new(seed), 0_u32);
    for _ in 0..rounds {
        let mut input = inputs[random.below(inputs.len())].clone();
        mutate(&mut input, &inputs[random.below(inputs.len())], &mut random);
        if catch_unwind(AssertUnwindSafe(|| (target.run)(&input))).is_err() {
            let path = env::temp_dir().join(format!("{}-{seed}-{broken}", target.name));
            fs::write(&path, &input)?;
            println!("broken by {}", path.display());
            broken += 1;
        } else if random.below(16) == 0 && input.len() < 4096 {
            if inputs.len() < KEPT {
                inputs.push(input);
            } else {
                let place = random.below(inputs.len());
                inputs[place] = input;
            }
        }
    }
    println!("{}: {rounds} mutations, {broken} broken", target.name);
    Ok(())
}
