//! Sums in the background: a thread of each rank exchanges messages while the others compute.

use std::ops::AddAssign;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use bytemuck::Pod;

use crate::{CommunicationError, Communicator, End, Links, Result};

type Job = Box<dyn FnOnce(&Communicator) + Send>;

/// The thread of a rank that makes its sums in the background, in the order in which they were begun.
#[derive(Debug)]
pub(crate) struct Background {
    /// Dropped to end the thread.
    jobs: Option<Sender<Job>>,
    /// Only with MPI, which must not end while a thread uses it. Between threads of one process, a rank may end
    /// before the others have begun the sums that this thread waits for; it then ends with them.
    thread: Option<JoinHandle<()>>,
}

impl Background {
    /// - `ranks`: this rank's end of a connection that nothing else uses.
    fn start(ranks: Communicator) -> Self {
        let (jobs, begun) = channel::<Job>();
        let outlives_rank = matches!(ranks.end.links, Links::Threads(_));
        // A plain thread: those of the pool are busy with kernels.
        let thread = thread::Builder::new().name("sums over ranks".to_owned());
        let thread = thread.spawn(move || begun.into_iter().for_each(|job| job(&ranks)));
        let thread = thread.expect("the system starts a thread");
        Self { jobs: Some(jobs), thread: (!outlives_rank).then_some(thread) }
    }

    fn begin(&self, job: Job) {
        if let Some(jobs) = &self.jobs {
            // If the thread has panicked, the job is dropped, and whoever waits for its result learns it.
            let _ = jobs.send(job);
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        self.jobs = None;
        // Other ranks do not begin the sums of one that panics, and the thread would wait for them for ever.
        if let (Some(thread), false) = (self.thread.take(), thread::panicking()) {
            let _ = thread.join();
        }
    }
}

/// A sum in the background, from [`Communicator::sum_in_background`].
#[derive(Debug)]
#[must_use = "the sum is lost unless `wait` returns it"]
pub struct PendingSum<T> {
    result: Receiver<Result<Vec<T>>>,
    end: Arc<End>,
}

impl<T> PendingSum<T> {
    /// The sums over all ranks, once they are known.
    ///
    /// # Errors
    ///
    /// A rank has ended, or has another number of values.
    pub fn wait(self) -> Result<Vec<T>> {
        let clock = Instant::now();
        let ended = || CommunicationError::new("the thread of the sums over ranks has panicked");
        let result = self.result.recv().unwrap_or_else(|_| Err(ended()));
        self.end.waited_since(clock);
        result
    }
}

impl Communicator {
    /// Whether [`sum_in_background`](Self::sum_in_background) returns before its sum is known: there are other
    /// ranks, and MPI lets several threads send at a time.
    pub fn sums_in_background(&self) -> bool {
        self.end.second.is_some()
    }

    /// How many of the sums begun by [`sum_in_background`](Self::sum_in_background) have been made.
    pub fn sums_made(&self) -> usize {
        self.end.made.load(Ordering::Relaxed)
    }

    /// Begins what [`all_reduce_sum`](Self::all_reduce_sum) does, with the same bits. The caller goes on, and may
    /// use the communicator for other operations: their messages are never taken for those of the sum.
    ///
    /// All ranks begin the same sums in the same order, which may be another one than that of their other
    /// operations. Each is made after the one before. A sum that nobody waits for is made too, but holds nobody
    /// up. The first sum starts the thread that makes them.
    ///
    /// Where it is not [possible](Self::sums_in_background), the sum is made before this returns.
    pub fn sum_in_background<T>(&self, mut values: Vec<T>) -> PendingSum<T>
    where
        T: Pod + AddAssign + Send,
    {
        let (found, result) = channel();
        let made = Arc::clone(&self.end.made);
        let job = move |ranks: &Communicator| {
            let sum = ranks.all_reduce_sum(&mut values).map(|()| values);
            made.fetch_add(1, Ordering::Relaxed);
            // Nobody waits any more if a step was abandoned.
            let _ = found.send(sum);
        };
        match self.background() {
            Some(background) => background.begin(Box::new(job)),
            None => job(self),
        }
        PendingSum { result, end: Arc::clone(&self.end) }
    }

    fn background(&self) -> Option<&Background> {
        let links = self.end.second.as_ref()?;
        Some(
            self.end.background.get_or_init(|| {
                Background::start(Self::of(self.rank, self.size, links.clone(), None))
            }),
        )
    }
}
