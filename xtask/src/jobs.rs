//! Runs the steps of several runs, as many at once as the command line asks for.
//!
//! A step can start once the steps that it reads are done. Of those that can, the first one in order does, so
//! that one job at a time runs all steps in order. Steps that run together share the processors; results do not
//! depend on that, times do.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::mpsc;
use std::thread;

use anyhow::{Error, Result};

use crate::plan::Arm;
use crate::run::ExperimentRun;

/// How many steps run at once.
#[derive(Debug, Clone, Copy, clap::Args)]
#[group(skip)]
pub struct JobsOption {
    /// Run up to this many steps at once, from different seeds, systems, and the control; they share the processors.
    /// Faster for small networks.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
}

fn at_least_one(word: &str) -> Result<usize, String> {
    word.parse().ok().filter(|&jobs| jobs > 0).ok_or_else(|| "must be a number from 1".to_owned())
}

/// The steps of one run that a command runs, in order.
#[derive(Debug)]
pub struct RunSteps<'a> {
    /// The run.
    pub run: &'a ExperimentRun<'a>,
    /// Positions in its plan. The steps that one of them reads are before it, or finished.
    pub positions: Vec<usize>,
}

/// Runs these steps, and links finished ones.
///
/// - `fresh`: remove the earlier result of each step right before it runs.
///
/// # Errors
///
/// Those of the first step that failed. No step starts after it; those that run are waited for.
pub fn execute(runs: &[RunSteps], fresh: bool, jobs: usize) -> Result<()> {
    let mut schedule = Schedule::of(runs);
    let (mut first_error, mut panicked) = (None, None);
    thread::scope(|scope| {
        let (ended, ends) = mpsc::channel();
        loop {
            while first_error.is_none()
                && panicked.is_none()
                && schedule.running() < jobs
                && let Some(number) = schedule.next()
            {
                let (task, sharing) = (schedule.start(number), schedule.sharing(jobs));
                let steps = &runs[task.run];
                if task.is_first_of_run
                    && let Err(error) = steps.run.publish()
                {
                    schedule.end(number);
                    first_error = Some(error);
                    break;
                }
                let ended = ended.clone();
                scope.spawn(move || {
                    let anew = fresh && task.is_first_of_key;
                    let step =
                        || steps.run.execute_step(&steps.positions, task.index, anew, sharing);
                    // The receiver is there until all steps have ended.
                    let _ = ended.send((number, catch_unwind(AssertUnwindSafe(step))));
                });
            }
            if schedule.running() == 0 {
                break;
            }
            let Ok((number, result)) = ends.recv() else { break };
            let ended_run = schedule.end(number);
            let result = match result {
                Ok(Ok(())) => ended_run.map_or(Ok(()), |run| runs[run].run.publish()),
                Ok(Err(error)) => Err(error),
                Err(panic) => {
                    panicked = Some(panic);
                    Ok(())
                }
            };
            if let Err(error) = result {
                match &first_error {
                    None => {
                        say_that_others_go_on(&error, schedule.running());
                        first_error = Some(error);
                    }
                    Some(_) if error.is::<stage::Interrupted>() => {}
                    // The command ends with the first one and would not name this one.
                    Some(_) => tracing::error!("{error:#}"),
                }
            }
        }
    });
    if let Some(panic) = panicked {
        resume_unwind(panic);
    }
    first_error.map_or(Ok(()), Err)
}

fn say_that_others_go_on(error: &Error, running: usize) {
    if running > 0 && !error.is::<stage::Interrupted>() {
        tracing::error!(
            "a step failed: no further steps will start; waiting for {running} still running"
        );
    }
}

/// One step of one run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Task {
    /// The run, by index.
    run: usize,
    /// The step, by index among those that the command runs of this run.
    index: usize,
    is_first_of_run: bool,
    /// Whether no step before it has the same result.
    is_first_of_key: bool,
    /// Whether it takes long enough to count where steps share the processors.
    is_long: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TaskState {
    Waiting,
    Running,
    Ended,
}

/// The order of all steps, and the state of each.
#[derive(Debug)]
struct Schedule {
    /// Of each step, those before it that must have ended.
    tasks: Vec<(Task, Vec<usize>, TaskState)>,
    runs: usize,
}

impl Schedule {
    fn of(runs: &[RunSteps]) -> Self {
        let mut schedule = Self { tasks: Vec::new(), runs: 0 };
        let mut first_of_key = BTreeMap::new();
        for steps in runs {
            let numbers: BTreeMap<usize, usize> =
                steps.positions.iter().copied().zip(schedule.tasks.len()..).collect();
            schedule.add_run(steps.positions.iter().map(|&position| {
                let mut needs: Vec<usize> = steps
                    .run
                    .inputs(position)
                    .filter_map(|input| numbers.get(&input).copied())
                    .collect();
                let key = steps.run.key(position);
                let earlier = *first_of_key.entry(key).or_insert(numbers[&position]);
                let is_first = earlier == numbers[&position];
                needs.extend((!is_first).then_some(earlier));
                (needs, is_first, steps.run.arm(position) != Arm::Pixels)
            }));
        }
        schedule
    }

    /// Adds the steps of a run: what each needs, whether it is the first with its result, and whether it is long.
    fn add_run(&mut self, steps: impl Iterator<Item = (Vec<usize>, bool, bool)>) {
        let run = self.runs;
        self.runs += 1;
        self.tasks.extend(steps.enumerate().map(|(index, (needs, is_first_of_key, is_long))| {
            let task = Task { run, index, is_first_of_run: false, is_first_of_key, is_long };
            (task, needs, TaskState::Waiting)
        }));
    }

    /// The first step that can start.
    fn next(&self) -> Option<usize> {
        (0..self.tasks.len()).find(|&number| self.can_start(number))
    }

    fn can_start(&self, number: usize) -> bool {
        let (_, needs, state) = &self.tasks[number];
        let has_ended = |need: &usize| self.tasks[*need].2 == TaskState::Ended;
        *state == TaskState::Waiting && needs.iter().all(has_ended)
    }

    fn running(&self) -> usize {
        self.tasks.iter().filter(|(_, _, state)| *state == TaskState::Running).count()
    }

    /// How many steps share the processors while no other step ends: those that run, and those that can start beside
    /// them.
    fn sharing(&self, jobs: usize) -> usize {
        let together = (0..self.tasks.len()).filter(|&number| {
            let (task, _, state) = &self.tasks[number];
            task.is_long && (*state == TaskState::Running || self.can_start(number))
        });
        together.count().clamp(1, jobs)
    }

    /// Whether all steps of a run have this state.
    fn all_are(&self, run: usize, wanted: TaskState) -> bool {
        self.tasks.iter().all(|(task, _, state)| task.run != run || *state == wanted)
    }

    fn start(&mut self, number: usize) -> Task {
        let task = self.tasks[number].0;
        let is_first_of_run = self.all_are(task.run, TaskState::Waiting);
        self.tasks[number].2 = TaskState::Running;
        Task { is_first_of_run, ..task }
    }

    /// Ends a step; returns its run if that was the last one of it.
    fn end(&mut self, number: usize) -> Option<usize> {
        self.tasks[number].2 = TaskState::Ended;
        let run = self.tasks[number].0.run;
        self.all_are(run, TaskState::Ended).then_some(run)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two runs of a training, a long and a short reader of it, and a last step that reads the long one. The second
    /// run shares the training with the first.
    fn schedule() -> Schedule {
        let mut schedule = Schedule { tasks: Vec::new(), runs: 0 };
        let run = |from: usize, training: Vec<usize>| {
            let is_first = training.is_empty();
            let steps = [
                (training, is_first, true),
                (vec![from], true, true),
                (vec![from], true, false),
                (vec![from + 1], true, true),
            ];
            steps.into_iter()
        };
        schedule.add_run(run(0, vec![]));
        schedule.add_run(run(4, vec![0]));
        schedule
    }

    #[test]
    fn one_job_takes_all_steps_in_order() {
        let mut schedule = schedule();
        for number in 0..8 {
            assert_eq!(schedule.next(), Some(number));
            let task = schedule.start(number);
            assert_eq!((task.run, task.index), (number / 4, number % 4));
            assert_eq!(task.is_first_of_run, number % 4 == 0);
            assert_eq!(schedule.end(number), (number % 4 == 3).then_some(number / 4));
        }
        assert_eq!((schedule.next(), schedule.running()), (None, 0));
    }

    #[test]
    fn a_step_waits_for_what_it_reads_and_for_the_same_result() {
        let mut schedule = schedule();
        schedule.start(0);
        assert_eq!(schedule.next(), None, "all others read the training, or have its result");
        schedule.end(0);
        let mut begun = vec![];
        while let Some(number) = schedule.next() {
            schedule.start(number);
            begun.push(number);
        }
        assert_eq!(begun, [1, 2, 4]);
        schedule.end(4);
        assert_eq!(schedule.next(), Some(5));
        schedule.end(1);
        assert_eq!(schedule.next(), Some(3));
    }

    #[test]
    fn steps_share_the_processors_with_those_that_can_run_beside_them() {
        let mut schedule = schedule();
        schedule.start(0);
        assert_eq!(schedule.sharing(4), 1, "nothing can run beside the training");
        schedule.end(0);
        schedule.start(1);
        assert_eq!(
            schedule.sharing(4),
            2,
            "the training of the second run; the short step does not count"
        );
        assert_eq!(schedule.sharing(1), 1);
    }
}
