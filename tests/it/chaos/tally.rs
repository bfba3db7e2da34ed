//! What has been seen, in tables: how often each act met each phase, and where the guest was then.

use std::fmt;

use super::decision::Outcome;
use super::draw::{Act, Mode, Phase, Run, Side};

/// Runs of one kind.
#[derive(Clone, Copy, Debug, Default)]
struct Count {
    drawn: u32,
    /// The place was reached.
    met: u32,
    at_source: u32,
    at_destination: u32,
    died: u32,
}

#[derive(Debug, Default)]
pub struct Tally {
    cells: [[Count; Act::ALL.len()]; Phase::ALL.len()],
    modes: [Count; Mode::ALL.len()],
    recovered: u32,
    operators: u32,
    /// Guests that stayed, of which both sides said why: how often the same, and how often not.
    causes: [u32; 2],
}

fn place<T: PartialEq>(all: &[T], one: &T) -> usize {
    all.iter().position(|this| this == one).expect("it is one of them")
}

impl Tally {
    /// A run has ended.
    pub fn add(&mut self, run: &Run, has_met: bool, outcome: Outcome) {
        let cell = &mut self.cells[place(&Phase::ALL, &run.phase)][place(&Act::ALL, &run.act)];
        for count in [cell, &mut self.modes[place(&Mode::ALL, &run.mode)]] {
            count.drawn += 1;
            count.met += u32::from(has_met);
            match outcome {
                Outcome::AtSource => count.at_source += 1,
                Outcome::AtDestination => count.at_destination += 1,
                Outcome::Dead => count.died += 1,
            }
        }
    }

    /// What the operator did in it.
    pub fn add_help(&mut self, recoveries: u32, has_spoken: bool) {
        self.recovered += recoveries;
        self.operators += u32::from(has_spoken);
    }

    /// Both sides said why the guest stayed, and the same or not.
    pub fn add_causes(&mut self, are_one: bool) {
        self.causes[usize::from(!are_one)] += 1;
    }

    /// How many runs came to their place.
    pub fn met(&self) -> u32 {
        self.modes.iter().map(|count| count.met).sum()
    }

    /// Phases in which a side was hardly ever killed or stopped. What happens at any byte need not come to it.
    pub fn missed(&self) -> Vec<String> {
        let mut missed = Vec::new();
        for (phase, cells) in
            Phase::ALL.iter().zip(&self.cells).filter(|(phase, _)| **phase != Phase::Anywhere)
        {
            for side in [Side::Source, Side::Destination] {
                let acts = [Act::Kill(side), Act::Stop(side), Act::StopAndCut(side)];
                let met: u32 = acts.iter().map(|act| cells[place(&Act::ALL, act)].met).sum();
                if met < 2 {
                    missed.push(format!("{phase:?} {side:?}: {met}"));
                }
            }
        }
        missed
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ENDS: [&str; 5] = ["met", "of", "source", "dest.", "died"];
        let ends = |count: &Count| {
            let Count { drawn, met, at_source, at_destination, died } = *count;
            [met, drawn, at_source, at_destination, died].map(|number| format!(" {number:>6}")).concat()
        };
        let heads = |names: &[&str]| names.iter().map(|name| format!(" {name:>6}")).collect::<String>();
        write!(f, "{:<12}", "phase")?;
        for act in Act::ALL {
            write!(f, " {:>9}", act.name())?;
        }
        writeln!(f, " |{}", heads(&ENDS))?;
        for (phase, cells) in Phase::ALL.iter().zip(&self.cells) {
            write!(f, "{:<12}", format!("{phase:?}"))?;
            let mut total = Count::default();
            for cell in cells {
                write!(f, " {:>9}", cell.met)?;
                total.drawn += cell.drawn;
                total.met += cell.met;
                total.at_source += cell.at_source;
                total.at_destination += cell.at_destination;
                total.died += cell.died;
            }
            writeln!(f, " |{}", ends(&total))?;
        }
        writeln!(f, "{:<12}{}", "mode", heads(&ENDS))?;
        for (mode, count) in Mode::ALL.iter().zip(&self.modes) {
            writeln!(f, "{:<12}{}", format!("{mode:?}"), ends(count))?;
        }
        let [same, other] = self.causes;
        writeln!(
            f,
            "guests that stayed: {same} times for one cause at both sides, {other} times one each, the link being lost"
        )?;
        write!(
            f,
            "lost links replaced by an operator: {}; hand-overs decided by one, without a lease: {}",
            self.recovered, self.operators
        )
    }
}
