//! Runs the steps of several runs, as many at once as the command line allows.
//!
//! A step can start once the steps whose results it reads have ended. Among those that can, the first in order
//! starts; so with one job, all steps run in order. Steps that run at once share the processors. Their times depend
//! on that, their results do not.

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
    /// Run up to this many steps at once, from different seeds, systems and controls; they share the processors. Faster
    /// for small networks.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = at_least_one)]
    pub jobs: usize,
}

fn at_least_one(word: &str) -> Result<usize, String> {
    word.parse().ok().filter(|&jobs| jobs > 0).ok_or_else(|| "must be a number from 1".to_owned())
}

/// What a step has of the machine.
#[derive(Debug, Clone, Copy)]
pub struct MachineShare {
    /// How many steps share the processors.
    pub steps: usize,
    /// Whether all that the step prints needs its name, since others may run beside it.
    pub is_named: bool,
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
/// That of the first step that failed. No further steps start then, but those still running are waited for.
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
                let Task { run, index, is_first_of_key, .. } = schedule.tasks[number];
                let steps = &runs[run];
                if schedule.all_are(run, TaskState::Waiting)
                    && let Err(error) = steps.run.publish()
                {
                    first_error = Some(error);
                    break;
                }
                schedule.tasks[number].state = TaskState::Running;
                let share = MachineShare { steps: schedule.sharing(jobs), is_named: jobs > 1 };
                let ended = ended.clone();
                scope.spawn(move || {
                    let anew = fresh && is_first_of_key;
                    let step = || steps.run.execute_step(&steps.positions, index, anew, share);
                    // The receiver is there until all steps have ended.
                    let _ = ended.send((number, catch_unwind(AssertUnwindSafe(step))));
                });
            }
            if schedule.running() == 0 {
                break;
            }
            let (number, result) = ends.recv().expect("`ended` is a sender");
            schedule.tasks[number].state = TaskState::Ended;
            let run = schedule.tasks[number].run;
            let result = match result {
                Ok(Ok(())) if schedule.all_are(run, TaskState::Ended) => runs[run].run.publish(),
                Ok(result) => result,
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
#[derive(Debug)]
struct Task {
    /// The run, by index.
    run: usize,
    /// The step, by index among those of the run that the command runs.
    index: usize,
    /// The steps before it that must have ended.
    needs: Vec<usize>,
    /// Whether no step before it has the same result.
    is_first_of_key: bool,
    /// Whether it is long enough to need a part of the processors for itself.
    is_long: bool,
    state: TaskState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TaskState {
    Waiting,
    Running,
    Ended,
}

/// All steps in order.
#[derive(Debug, Default)]
struct Schedule {
    tasks: Vec<Task>,
}

impl Schedule {
    fn of(runs: &[RunSteps]) -> Self {
        let mut schedule = Self::default();
        let mut first_of_key = BTreeMap::new();
        for (run, steps) in runs.iter().enumerate() {
            let numbers: BTreeMap<usize, usize> =
                steps.positions.iter().copied().zip(schedule.tasks.len()..).collect();
            for (index, &position) in steps.positions.iter().enumerate() {
                let number = numbers[&position];
                let earlier = *first_of_key.entry(steps.run.key(position)).or_insert(number);
                let is_first_of_key = earlier == number;
                let inputs = steps.run.inputs(position);
                let inputs = inputs.filter_map(|input| numbers.get(&input).copied());
                schedule.tasks.push(Task {
                    run,
                    index,
                    needs: inputs.chain((!is_first_of_key).then_some(earlier)).collect(),
                    is_first_of_key,
                    is_long: steps.run.arm(position) != Arm::Pixels,
                    state: TaskState::Waiting,
                });
            }
        }
        schedule
    }

    /// The first step that can start.
    fn next(&self) -> Option<usize> {
        self.tasks.iter().position(|task| self.can_start(task))
    }

    fn can_start(&self, task: &Task) -> bool {
        let has_ended = |need: &usize| self.tasks[*need].state == TaskState::Ended;
        task.state == TaskState::Waiting && task.needs.iter().all(has_ended)
    }

    fn running(&self) -> usize {
        self.tasks.iter().filter(|task| task.state == TaskState::Running).count()
    }

    /// How many steps share the processors until a step ends: those that run, and those that can start beside them.
    fn sharing(&self, jobs: usize) -> usize {
        let runs = |task: &Task| task.state == TaskState::Running || self.can_start(task);
        self.tasks.iter().filter(|task| task.is_long && runs(task)).count().clamp(1, jobs)
    }

    /// Whether all steps of a run have this state.
    fn all_are(&self, run: usize, state: TaskState) -> bool {
        self.tasks.iter().filter(|task| task.run == run).all(|task| task.state == state)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two runs of a training, a long and a short reader of it, and a last step that reads the long one. The second
    /// run shares the training with the first.
    fn schedule() -> Schedule {
        let task = |run: usize, index: usize, needs: Vec<usize>| Task {
            run,
            index,
            is_first_of_key: (run, index) != (1, 0),
            is_long: index != 2,
            needs,
            state: TaskState::Waiting,
        };
        let needs = [vec![], vec![0], vec![0], vec![1], vec![0], vec![4], vec![4], vec![5]];
        let tasks = needs.into_iter().enumerate().map(|(at, needs)| task(at / 4, at % 4, needs));
        Schedule { tasks: tasks.collect() }
    }

    fn set(schedule: &mut Schedule, number: usize, state: TaskState) {
        schedule.tasks[number].state = state;
    }

    #[test]
    fn one_job_takes_all_steps_in_order() {
        let mut schedule = schedule();
        for number in 0..8 {
            let run = number / 4;
            assert_eq!(schedule.next(), Some(number));
            assert_eq!(schedule.all_are(run, TaskState::Waiting), number % 4 == 0);
            set(&mut schedule, number, TaskState::Running);
            assert_eq!((schedule.running(), schedule.sharing(1)), (1, 1));
            set(&mut schedule, number, TaskState::Ended);
            assert_eq!(schedule.all_are(run, TaskState::Ended), number % 4 == 3);
        }
        assert_eq!((schedule.next(), schedule.running()), (None, 0));
    }

    #[test]
    fn a_step_waits_for_what_it_reads_and_for_the_same_result() {
        let mut schedule = schedule();
        set(&mut schedule, 0, TaskState::Running);
        assert_eq!(schedule.next(), None, "all others read the training, or have its result");
        set(&mut schedule, 0, TaskState::Ended);
        let mut begun = vec![];
        while let Some(number) = schedule.next() {
            set(&mut schedule, number, TaskState::Running);
            begun.push(number);
        }
        assert_eq!(begun, [1, 2, 4]);
        set(&mut schedule, 4, TaskState::Ended);
        assert_eq!(schedule.next(), Some(5));
        set(&mut schedule, 1, TaskState::Ended);
        assert_eq!(schedule.next(), Some(3));
    }

    #[test]
    fn steps_share_the_processors_with_those_that_can_run_beside_them() {
        let mut schedule = schedule();
        set(&mut schedule, 0, TaskState::Running);
        assert_eq!(schedule.sharing(4), 1, "nothing can run beside the training");
        set(&mut schedule, 0, TaskState::Ended);
        set(&mut schedule, 1, TaskState::Running);
        assert_eq!(
            schedule.sharing(4),
            2,
            "the training of the second run; the short step does not count"
        );
        assert_eq!(schedule.sharing(1), 1);
    }
}
