//! Visits every state that a model can reach, breadth first, so that what it finds it shows by the shortest way there.

use std::collections::HashMap;
use std::fmt::{self, Debug};
use std::hash::Hash;
use std::rc::Rc;

/// What can happen, and what must and must not.
pub trait Model {
    type State: Clone + Eq + Hash + Debug;

    fn initial(&self) -> Self::State;

    /// Everything that can happen next.
    fn steps(&self, state: &Self::State) -> Vec<Step<Self::State>>;

    /// Why this state must never be reached, if so.
    fn violation(&self, state: &Self::State) -> Option<String>;

    /// Whether what must happen has happened here.
    fn is_settled(&self, state: &Self::State) -> bool;

    /// Whether what is wanted must still be possible from here.
    fn may_succeed(&self, _: &Self::State) -> bool {
        false
    }

    /// Whether what is wanted has come.
    fn has_succeeded(&self, _: &Self::State) -> bool {
        false
    }
}

/// Something that can happen.
pub struct Step<S> {
    pub what: String,
    /// It need not happen: what must happen must be possible without it.
    pub is_fault: bool,
    pub to: S,
}

/// How much was seen.
#[derive(Clone, Copy, Debug)]
pub struct Explored {
    pub states: usize,
    pub steps: usize,
    pub settled: usize,
}

impl fmt::Display for Explored {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} states, {} steps between them, {} settled states",
            self.states, self.steps, self.settled
        )
    }
}

/// What is wrong, and the steps that lead there.
#[derive(Debug)]
pub struct Counterexample {
    pub reason: String,
    pub steps: Vec<String>,
    pub state: String,
}

impl fmt::Display for Counterexample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, after:", self.reason)?;
        self.steps.iter().try_for_each(|step| writeln!(f, "  {step}"))?;
        write!(f, "{}", self.state)
    }
}

struct Graph<S> {
    states: Vec<Rc<S>>,
    /// How each state was first reached.
    ways: Vec<(usize, String)>,
    /// For each state, those from which it is reached without a fault.
    before: Vec<Vec<usize>>,
}

/// Looks for a state that must not be, and then for one from which what must happen, or what must stay possible, cannot happen any
/// more without a fault.
pub fn explore<M: Model>(model: &M) -> Result<Explored, Box<Counterexample>> {
    let initial = Rc::new(model.initial());
    let mut indices = HashMap::from([(Rc::clone(&initial), 0)]);
    let mut graph = Graph { states: vec![initial], ways: vec![(0, String::new())], before: vec![Vec::new()] };
    let (mut next, mut steps) = (0, 0);
    while let Some(state) = graph.states.get(next).cloned() {
        if let Some(reason) = model.violation(&state) {
            return Err(graph.counterexample(next, reason));
        }
        for Step { what, is_fault, to } in model.steps(&state) {
            steps += 1;
            let index = match indices.get(&to) {
                Some(index) => *index,
                None => {
                    let (index, to) = (graph.states.len(), Rc::new(to));
                    indices.insert(Rc::clone(&to), index);
                    graph.states.push(to);
                    graph.ways.push((next, what));
                    graph.before.push(Vec::new());
                    index
                }
            };
            if !is_fault && index != next {
                graph.before[index].push(next);
            }
        }
        next += 1;
    }
    let all = |holds: &dyn Fn(&M::State) -> bool| graph.states.iter().map(|state| holds(state)).collect();
    let settled: Vec<bool> = all(&|state| model.is_settled(state));
    if let Some(index) = graph.reaches(&settled).iter().position(|reaches| !reaches) {
        return Err(graph.counterexample(index, "it never settles".to_owned()));
    }
    let succeeded: Vec<bool> = all(&|state| model.has_succeeded(state));
    let fails = |(state, reaches): (&Rc<M::State>, bool)| !reaches && model.may_succeed(state);
    if let Some(index) = graph.states.iter().zip(graph.reaches(&succeeded)).position(fails) {
        return Err(graph.counterexample(index, "no further attempt can succeed".to_owned()));
    }
    let settled = settled.iter().filter(|settled| **settled).count();
    Ok(Explored { states: graph.states.len(), steps, settled })
}

impl<S: Debug> Graph<S> {
    /// For each state, whether a state of `goal` is reached from it without a fault.
    fn reaches(&self, goal: &[bool]) -> Vec<bool> {
        let mut reaches = goal.to_vec();
        let mut fresh: Vec<_> = (0..goal.len()).filter(|index| goal[*index]).collect();
        while let Some(index) = fresh.pop() {
            for before in &self.before[index] {
                if !std::mem::replace(&mut reaches[*before], true) {
                    fresh.push(*before);
                }
            }
        }
        reaches
    }

    fn counterexample(&self, index: usize, reason: String) -> Box<Counterexample> {
        let mut steps = Vec::new();
        let mut at = index;
        while at != 0 {
            let (before, what) = &self.ways[at];
            steps.push(what.clone());
            at = *before;
        }
        steps.reverse();
        Box::new(Counterexample { reason, steps, state: format!("{:#?}", self.states[index]) })
    }
}
