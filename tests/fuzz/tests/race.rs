//! The guest's other processors: a thread that rewrites the memory which the controller reads, while it reads it. Its moments are new in
//! every run; what must hold, holds in all of them.

use fuzz::guest::{ADMIN, COMMANDS, QUEUES, REGISTERS, play};
use fuzz::guest::{admin_seeds, command_seeds, queue_seeds, register_seeds};
use fuzz::mutate::{Random, mutate};

/// Of each mixture of steps.
const INPUTS: u64 = 300;

#[test]
fn memory_that_changes_under_the_controller_hurts_nobody_else() {
    let mixtures = [
        (REGISTERS, register_seeds()),
        (QUEUES, queue_seeds()),
        (ADMIN, admin_seeds()),
        (COMMANDS, command_seeds()),
    ];
    for (steps, seeds) in mixtures {
        let mut random = Random::new(3);
        for round in 0..INPUTS {
            let mut input = seeds[random.below(seeds.len())].clone();
            if round >= seeds.len() as u64 {
                mutate(&mut input, &seeds[random.below(seeds.len())], &mut random);
            }
            play(steps, &input, Some(random.number()));
        }
    }
}
