//! Loads batches of views in threads, ahead of the step that needs them.
//!
//! Each thread makes whole batches, in order, and waits when it is [`AHEAD`] batches beyond what
//! was taken. A view depends on seed, epoch, row, how often the row occurred before in the epoch,
//! and the number of the view. So a batch is bit-identical for any number of threads, and after
//! resuming an interrupted epoch.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZero;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow, ensure};
use stage::random::stream;

use crate::Images;
use crate::decoded::Wish;
use crate::images::DecodeBuffer;
use crate::views::{Input, Pipeline, Workspace};

/// Finished batches that may wait, besides the one that each thread makes.
pub const AHEAD: usize = 2;

/// Views of a few pictures, the input of one step.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The pictures, as rows of `images.safetensors`, B.
    pub rows: Vec<u32>,
    /// The pictures that the views show, of `rows`: all, or those of this rank.
    pub own: Range<usize>,
    /// By view, the normalised values `(O, height, width, channels)` of the O pictures in `own`.
    pub views: Vec<Vec<f32>>,
    /// By view, rows of pixels and pixels in a row.
    pub sizes: Vec<[usize; 2]>,
    /// Rows of pixels of the first view.
    pub height: usize,
    /// Pixels in a row of the first view.
    pub width: usize,
    /// 1 grey, 3 red, green, blue.
    pub channels: usize,
}

impl Batch {
    /// Extents of the first view: `(O, height, width, channels)`.
    pub fn shape(&self) -> (usize, usize, usize, usize) {
        (self.own.len(), self.height, self.width, self.channels)
    }

    /// Extents of the view `view`, which may be a smaller crop than the first.
    pub fn shape_of(&self, view: usize) -> (usize, usize, usize, usize) {
        let [height, width] = self.sizes[view];
        (self.own.len(), height, width, self.channels)
    }
}

/// An iterator over batches in order. It ends after the first error. Asking for the first batch
/// starts the threads; dropping the loader stops them.
#[derive(Debug)]
pub struct Loader {
    ring: Arc<Ring>,
    maker: Arc<Maker>,
    /// The number of threads, and the running ones: none before the first batch.
    count: usize,
    threads: Vec<JoinHandle<()>>,
    next: usize,
    wish: Wish,
}

/// What the threads share with the loader.
#[derive(Debug)]
struct Ring {
    state: Mutex<LoaderState>,
    /// Notified when a batch was finished or taken, or the threads are to stop.
    changed: Condvar,
}

#[derive(Debug, Default)]
struct LoaderState {
    /// The batch that the next free thread makes.
    claimed: usize,
    /// How many were taken.
    taken: usize,
    finished: BTreeMap<usize, Result<Batch>>,
    stopped: bool,
}

/// Makes a batch from its rows.
#[derive(Debug)]
struct Maker {
    images: Images,
    batches: Vec<Vec<u32>>,
    /// For each row of each batch, how often it occurred before.
    occurrences: Vec<Vec<u32>>,
    /// For each batch, the pictures to make views of.
    own: Vec<Range<usize>>,
    /// The pipeline of each view, and the input that it fills.
    views: Vec<(Pipeline, Input)>,
    seed: u64,
    epoch: u64,
}

impl Loader {
    /// A loader of one batch for each list of rows, with one view by each pipeline, made by
    /// `threads` threads.
    ///
    /// The draws of view `v` of a row come from `stage::random::stream(seed, "views", [epoch, row,
    /// v, n])`, where `n` counts from 0 how often the row came before in `batches`: samplers may
    /// take an image several times. Memory holds at most `threads +` [`AHEAD`] batches.
    ///
    /// # Errors
    ///
    /// The pictures have other channels than the input, a row does not exist, or the variable
    /// [`crate::decoded::VARIABLE`] has an unknown value.
    pub fn new(
        images: &Images,
        batches: Vec<Vec<u32>>,
        pipelines: Vec<Pipeline>,
        input: &Input,
        seed: u64,
        epoch: u64,
        threads: usize,
    ) -> Result<Self> {
        Self::resume(images, batches, 0, pipelines, input, seed, epoch, threads)
    }

    /// A loader of the un-augmented pictures of these rows, in order, made by as many threads as the
    /// machine has: for evaluating a network.
    ///
    /// # Errors
    ///
    /// As [`Loader::new`].
    pub fn clean(images: &Images, rows: &[u32], input: &Input) -> Result<Self> {
        const AT_ONCE: usize = 256;
        let batches = rows.chunks(AT_ONCE).map(<[u32]>::to_vec).collect();
        // Nothing is random: seed and epoch do not matter.
        Self::new(images, batches, vec![input.clean()], input, 0, 0, Self::threads())
    }

    /// Checks that a network with this input takes these pictures, and decodes none of them.
    ///
    /// # Errors
    ///
    /// The pictures have other channels than the input.
    pub fn check(images: &Images, input: &Input) -> Result<()> {
        ensure!(
            images.channels() == input.channels,
            "`{}` has pictures of {} channels but the network takes {}; prepare the images again \
             with `channels = {}` in table `[prepare]`",
            images.data_set().path.display(),
            images.channels(),
            input.channels,
            input.channels
        );
        Ok(())
    }

    /// As many threads as the machine has.
    pub fn threads() -> usize {
        thread::available_parallelism().map_or(1, NonZero::get)
    }

    /// Like [`Loader::new`], but skips the first `done` batches, which an interrupted epoch has used.
    /// The others are unchanged.
    ///
    /// # Errors
    ///
    /// As [`Loader::new`].
    #[expect(
        clippy::too_many_arguments,
        reason = "one more than `new`, and no two belong together"
    )]
    pub fn resume(
        images: &Images,
        batches: Vec<Vec<u32>>,
        done: usize,
        pipelines: Vec<Pipeline>,
        input: &Input,
        seed: u64,
        epoch: u64,
        threads: usize,
    ) -> Result<Self> {
        let views = pipelines.into_iter().map(|pipeline| (pipeline, input.clone())).collect();
        Self::crops(images, batches, done, views, seed, epoch, threads)
    }

    /// Like [`Loader::resume`], with views of several sizes: pipelines, each with the input that it
    /// fills.
    ///
    /// # Errors
    ///
    /// As [`Loader::new`].
    pub fn crops(
        images: &Images,
        batches: Vec<Vec<u32>>,
        done: usize,
        views: Vec<(Pipeline, Input)>,
        seed: u64,
        epoch: u64,
        threads: usize,
    ) -> Result<Self> {
        let (_, input) = views.first().context("a loader without a view")?;
        Self::check(images, input)?;
        if let Some(&row) = batches.iter().flatten().find(|&&row| row as usize >= images.len()) {
            images.id(row)?;
        }
        let wish = Wish::of_environment()?;
        let done = done.min(batches.len());
        let occurrences = occurrences(&batches);
        let images = images.clone();
        let own = batches.iter().map(|batch| 0..batch.len()).collect();
        let maker = Arc::new(Maker { images, batches, occurrences, own, views, seed, epoch });
        let state = LoaderState { claimed: done, taken: done, ..LoaderState::default() };
        let ring = Arc::new(Ring { state: Mutex::new(state), changed: Condvar::new() });
        Ok(Self { ring, maker, count: threads.max(1), threads: Vec::new(), next: done, wish })
    }

    /// Makes views of a part of each batch alone. They are the same as without this call.
    ///
    /// - `own`: from the number of pictures in a batch to the part.
    ///
    /// # Panics
    ///
    /// If a batch was asked for before.
    pub fn only(mut self, own: impl Fn(usize) -> Range<usize>) -> Self {
        let maker = Arc::get_mut(&mut self.maker).expect("no batch was asked for before");
        maker.own = maker.batches.iter().map(|batch| own(batch.len())).collect();
        self
    }

    /// Opens or makes the decoded copy, and starts the threads.
    fn start(&mut self) -> Result<()> {
        self.maker.images.use_decoded_copy(self.wish, self.count)?;
        for _ in 0..self.count.min(self.maker.batches.len() - self.next) {
            let (ring, maker) = (self.ring.clone(), self.maker.clone());
            let limit = self.count + AHEAD;
            let thread = thread::Builder::new()
                .name("views".into())
                .spawn(move || work(&ring, &maker, limit))
                .context("starting a thread that makes views")?;
            self.threads.push(thread);
        }
        Ok(())
    }
}

/// Counts, for each row of each batch, how often it occurred before.
fn occurrences(batches: &[Vec<u32>]) -> Vec<Vec<u32>> {
    let mut seen: HashMap<u32, u32> = HashMap::new();
    let mut next = |row: &u32| {
        let count = seen.entry(*row).or_default();
        *count += 1;
        *count - 1
    };
    batches.iter().map(|batch| batch.iter().map(&mut next).collect()).collect()
}

/// Makes batches until none is left or the threads are to stop.
fn work(ring: &Ring, maker: &Maker, limit: usize) {
    let (mut memory, mut workspace) = (DecodeBuffer::default(), Workspace::default());
    while let Some(number) = ring.claim(maker.batches.len(), limit) {
        // A thread that ended without a result would leave the loader waiting forever.
        let batch =
            catch_unwind(AssertUnwindSafe(|| maker.make(number, &mut memory, &mut workspace)))
                .unwrap_or_else(|_| Err(anyhow!("the thread that made batch {number} panicked")));
        ring.lock().finished.insert(number, batch);
        ring.changed.notify_all();
    }
}

impl Ring {
    fn lock(&self) -> MutexGuard<'_, LoaderState> {
        // The state is valid after every statement, so a panic elsewhere cannot corrupt it.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&self, state: MutexGuard<'a, LoaderState>) -> MutexGuard<'a, LoaderState> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the next batch to make, once there is room for it.
    fn claim(&self, batches: usize, limit: usize) -> Option<usize> {
        let mut state = self.lock();
        while !state.stopped && state.claimed < batches && state.claimed >= state.taken + limit {
            state = self.wait(state);
        }
        let number = state.claimed;
        if state.stopped || number >= batches {
            return None;
        }
        state.claimed += 1;
        Some(number)
    }

    fn take(&self, number: usize) -> Result<Batch> {
        let mut state = self.lock();
        loop {
            if let Some(batch) = state.finished.remove(&number) {
                state.taken = number + 1;
                drop(state);
                self.changed.notify_all();
                return batch;
            }
            state = self.wait(state);
        }
    }
}

impl Maker {
    fn make(
        &self,
        number: usize,
        memory: &mut DecodeBuffer,
        workspace: &mut Workspace,
    ) -> Result<Batch> {
        let (rows, own) = (&self.batches[number], self.own[number].clone());
        let empty = |(_, input): &(Pipeline, Input)| kernels::zeros(own.len() * input.values());
        let mut views: Vec<Vec<f32>> = self.views.iter().map(empty).collect();
        for (place, position) in own.clone().enumerate() {
            let row = rows[position];
            let picture = self.images.pixels(row, memory)?;
            for (view, (pipeline, input)) in self.views.iter().enumerate() {
                let occurrence = u64::from(self.occurrences[number][position]);
                let counters = [self.epoch, u64::from(row), view as u64, occurrence];
                let mut rng = stream(self.seed, "views", &counters);
                let range = place * input.values()..(place + 1) * input.values();
                let out = &mut views[view][range];
                pipeline.apply(picture, input, &mut rng, workspace, out).with_context(|| {
                    let path = self.images.data_set().path.display();
                    format!("view {} of picture {row} of `{path}`", view + 1)
                })?;
            }
        }
        let sizes: Vec<_> = self.views.iter().map(|(_, i)| [i.height, i.width]).collect();
        let ([height, width], channels) = (sizes[0], self.views[0].1.channels);
        Ok(Batch { rows: rows.clone(), own, views, sizes, height, width, channels })
    }
}

impl Iterator for Loader {
    type Item = Result<Batch>;

    fn next(&mut self) -> Option<Self::Item> {
        let end = self.maker.batches.len();
        if self.next == end {
            return None;
        }
        let started = if self.threads.is_empty() { self.start() } else { Ok(()) };
        let batch = started.and_then(|()| self.ring.take(self.next));
        self.next = if batch.is_ok() { self.next + 1 } else { end };
        Some(batch)
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        self.ring.lock().stopped = true;
        self.ring.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A panic was already caught and returned as an error.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use stage::{DataTable, Job, Split};

    use super::*;
    use crate::images::{StoredPicture, write};
    use crate::picture::tests::example;
    use crate::views::{Filter, Operation};

    const ROWS: u32 = 20;

    /// Twenty pictures, neither square nor alike.
    fn images(folder: &std::path::Path) -> Images {
        let path = folder.join("images.safetensors");
        let source = |i: usize| {
            let source = StoredPicture::raw(example(6 + i % 3, 9 + i, 3), 3).expect("sound");
            (source, Split::Train)
        };
        write(&path, 3, (0..ROWS as usize).map(source).collect()).expect("written");
        Images::open(&path).expect("sound")
    }

    fn input() -> Input {
        Input {
            height: 4,
            width: 5,
            channels: 3,
            mean: vec![0.5, 0.4, 0.3],
            std: vec![0.2, 0.25, 0.3],
            clean: vec![Operation::Resize { pixels: 4, filter: Filter::Bicubic }],
        }
    }

    fn pipeline() -> Pipeline {
        Pipeline {
            operations: vec![
                Operation::ResizedCrop { scale: [0.2, 1.], aspect: [0.75, 1.25] },
                Operation::Noise { deviation: 0.1 },
            ],
        }
    }

    fn batches() -> Vec<Vec<u32>> {
        (0..ROWS).collect::<Vec<_>>().chunks(3).map(<[u32]>::to_vec).collect()
    }

    fn load(images: &Images, batches: Vec<Vec<u32>>, seed: u64, threads: usize) -> Vec<Batch> {
        let pipelines = vec![pipeline(), pipeline()];
        Loader::new(images, batches, pipelines, &input(), seed, 7, threads)
            .expect("started")
            .collect::<Result<_>>()
            .expect("made")
    }

    #[test]
    fn parts_of_a_batch_have_the_views_of_the_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path());
        // A picture that comes again is another view, also where an other part has the first.
        let batches = || vec![vec![3, 7, 3, 9, 4], vec![7, 3, 5, 5, 6]];
        let whole = load(&images, batches(), 1, 2);
        let parts = [0..2, 2..5].map(|part: Range<usize>| {
            let loader = Loader::new(&images, batches(), vec![pipeline(); 2], &input(), 1, 7, 2)
                .expect("started");
            loader.only(|_| part.clone()).collect::<Result<Vec<_>>>().expect("made")
        });
        for (number, whole) in whole.iter().enumerate() {
            assert_eq!(parts[1][number].shape().0, 3);
            for view in 0..2 {
                let joined = parts.each_ref().map(|part| part[number].views[view].clone()).concat();
                assert_eq!(joined, whole.views[view]);
            }
            assert_eq!(parts[0][number].rows, whole.rows);
        }
    }

    #[test]
    fn batches_are_in_order_and_equal_for_any_number_of_threads() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path());
        let one = load(&images, batches(), 1, 1);
        assert_eq!(one.iter().map(|batch| batch.rows.clone()).collect::<Vec<_>>(), batches());
        assert_eq!(one[6].views[1].len(), 2 * 4 * 5 * 3);
        assert_ne!(one[0].views[0], one[0].views[1]);
        for threads in [0, 2, 3, 8] {
            assert_eq!(load(&images, batches(), 1, threads), one, "{threads} threads");
        }
        assert_ne!(load(&images, batches(), 2, 1), one);
        assert!(load(&images, vec![], 1, 2).is_empty());
    }

    #[test]
    fn clean_batches_have_all_pictures_in_order() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let images = images(folder.path());
        let rows = [7, 2, 11];
        let input = Input { width: 4, ..input() };
        let batches = Loader::clean(&images, &rows, &input)?.collect::<Result<Vec<_>>>()?;
        assert_eq!(batches.len(), 1);
        assert_eq!((batches[0].rows.as_slice(), batches[0].shape()), (&rows[..], (3, 4, 4, 3)));
        let alone = Loader::clean(&images, &rows[1..2], &input)?.next().expect("a batch")?;
        let values = input.values();
        assert_eq!(alone.views[0], batches[0].views[0][values..2 * values]);
        Ok(())
    }

    #[test]
    fn a_view_does_not_depend_on_its_batch() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path());
        let together = load(&images, vec![vec![4, 11, 2]], 1, 1);
        let alone = load(&images, vec![vec![11]], 1, 1);
        let values = input().values();
        for view in [0, 1] {
            assert_eq!(alone[0].views[view], together[0].views[view][values..2 * values]);
        }
    }

    #[test]
    fn one_batch_has_crops_of_several_sizes() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let images = images(folder.path());
        let small = Input { height: 2, width: 3, ..input() };
        let views = vec![(pipeline(), input()), (pipeline(), small), (pipeline(), input())];
        let batches = vec![vec![4, 11], vec![2]];
        let made: Vec<Batch> =
            Loader::crops(&images, batches.clone(), 1, views, 1, 7, 2)?.collect::<Result<_>>()?;
        assert_eq!(made.len(), 1);
        let [batch] = made.as_slice() else { panic!("one batch") };
        assert_eq!(batch.shape_of(0), (1, 4, 5, 3));
        assert_eq!(batch.shape_of(1), (1, 2, 3, 3));
        assert_eq!(batch.shape_of(2), batch.shape());
        for view in 0..3 {
            let (n, h, w, c) = batch.shape_of(view);
            assert_eq!(batch.views[view].len(), n * h * w * c);
        }
        // The draws of a view do not depend on the sizes beside it.
        assert_eq!(batch.views[0], load(&images, batches, 1, 1)[1].views[0]);
        assert!(Loader::crops(&images, vec![vec![1]], 0, vec![], 1, 7, 2).is_err());
        Ok(())
    }

    #[test]
    fn a_repeated_row_gets_new_views_and_a_resumed_epoch_the_same_ones() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path());
        let order = vec![vec![5, 3], vec![5, 5], vec![3, 1]];
        let whole = load(&images, order.clone(), 1, 2);
        let values = input().values();
        let of_five = [
            &whole[0].views[0][..values],
            &whole[1].views[0][..values],
            &whole[1].views[0][values..],
            &load(&images, vec![vec![5]], 1, 1)[0].views[0],
        ];
        assert!(of_five[0] != of_five[1] && of_five[0] != of_five[2] && of_five[1] != of_five[2]);
        assert_eq!(of_five[0], of_five[3]);
        for done in 0..5 {
            let pipelines = vec![pipeline(), pipeline()];
            let rest: Vec<Batch> =
                Loader::resume(&images, order.clone(), done, pipelines, &input(), 1, 7, 2)
                    .expect("started")
                    .collect::<Result<_>>()
                    .expect("made");
            assert_eq!(rest, whole[done.min(3)..]);
        }
    }

    #[test]
    fn a_picture_that_cannot_be_used_is_named_and_ends_the_batches() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path());
        let cut = Pipeline { operations: vec![Operation::CentreCrop { pixels: 7 }] };
        let wide = Input { height: 7, width: 7, ..input() };
        let mut loader =
            Loader::new(&images, batches(), vec![cut], &wide, 1, 0, 2).expect("started");
        let error = loader.find_map(Result::err).expect("some pictures have 6 rows");
        let error = format!("{error:#}");
        assert!(
            error.contains("images.safetensors") && error.contains("resize-shorter"),
            "{error}"
        );
        assert!(loader.next().is_none());
    }

    #[test]
    fn nothing_is_decoded_before_the_first_batch_is_asked_for() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("images.safetensors");
        let source = |i: usize| {
            let file = crate::picture::tests::png(&example(6, 9 + i, 3));
            (StoredPicture::file(file, 3).expect("sound"), Split::Train)
        };
        write(&path, 3, (0..4).map(source).collect()).expect("written");
        let copy = crate::decoded::path_beside(&path);
        let data = DataTable { clusters: 2, train_on: vec![Split::Train], score_on: vec![] };
        let job = Job::new("example", &path, folder.path(), data);
        let images = Images::of_job(&job).expect("sound");
        let loader = || {
            let views = vec![pipeline()];
            let loader = Loader::new(&images, vec![vec![0, 1], vec![2]], views, &input(), 1, 0, 2);
            let mut loader = loader.expect("sound");
            loader.wish = Wish::Always;
            loader
        };
        drop(loader());
        assert!(!copy.exists());
        job.interrupt.raise();
        let mut stopped = loader();
        let error = stopped.next().expect("an error").expect_err("interrupted");
        assert!(error.is::<stage::Interrupted>() && stopped.next().is_none(), "{error:#}");
        assert!(!copy.exists());
        let images = Images::open(&path).expect("sound");
        let first = Loader::new(&images, vec![vec![0]], vec![pipeline()], &input(), 1, 0, 2);
        let mut first = first.expect("sound");
        first.wish = Wish::Always;
        first.next().expect("a batch").expect("made");
        assert!(copy.exists());
    }

    #[test]
    fn foreign_rows_and_channels_are_refused_at_once() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path());
        let start = |rows, input: &Input| {
            Loader::new(&images, vec![rows], vec![pipeline()], input, 1, 0, 1).map(|_| ())
        };
        let error = start(vec![0, ROWS], &input()).expect_err("no such row").to_string();
        assert!(error.contains("row 20"), "{error}");
        let grey = Input { channels: 1, mean: vec![0.], std: vec![1.], ..input() };
        let error = start(vec![0], &grey).expect_err("other channels").to_string();
        assert!(error.contains("channels = 1"), "{error}");
    }

    #[test]
    fn a_loader_that_is_dropped_early_stops_its_threads() {
        let folder = tempfile::tempdir().expect("a folder");
        let images = images(folder.path());
        let many = (0..10_000).map(|i| vec![i % ROWS]).collect();
        let mut loader =
            Loader::new(&images, many, vec![pipeline()], &input(), 1, 0, 3).expect("started");
        loader.next().expect("a batch").expect("made");
        let ring = loader.ring.clone();
        assert_eq!(loader.threads.len(), 3);
        drop(loader);
        // Only this handle is left: every thread has ended.
        assert_eq!(Arc::strong_count(&ring), 1);
        assert!(ring.lock().claimed <= 1 + 3 + AHEAD);
    }
}
