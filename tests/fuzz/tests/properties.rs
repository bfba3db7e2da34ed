//! Every target with mutations of its seeds and with garbage, new in every run; proptest keeps what fails and makes it small.

use std::sync::LazyLock;

use fuzz::mutate::{Random, mutate};
use fuzz::{TARGETS, Target};
use proptest::prelude::*;

/// Of each target, for each kind of input.
const CASES: u32 = 256;

/// Made once.
static SEEDS: LazyLock<Vec<Vec<Vec<u8>>>> =
    LazyLock::new(|| TARGETS.iter().map(|target| (target.seeds)()).collect());

fn each(case: impl Fn(&Target, &[Vec<u8>])) {
    TARGETS.iter().zip(SEEDS.iter()).for_each(|(target, seeds)| case(target, seeds));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(CASES) })]

    #[test]
    fn garbage_is_read_by_no_target_with_a_panic(
        bytes in prop::collection::vec(any::<u8>(), 0..2000),
        start in 0..1000_usize,
    ) {
        each(|target, seeds| {
            (target.run)(&bytes);
            // Garbage behind a good start gets further.
            let seed = &seeds[start % seeds.len()];
            (target.run)(&[&seed[..start.min(seed.len())], &bytes].concat());
        });
    }

    #[test]
    fn mutated_seeds_are_read_by_no_target_with_a_panic(numbers in any::<u64>(), which in 0..1000_usize) {
        each(|target, seeds| {
            let mut random = Random::new(numbers);
            let mut input = seeds[which % seeds.len()].clone();
            mutate(&mut input, &seeds[random.below(seeds.len())], &mut random);
            (target.run)(&input);
        });
    }
}
