use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use super::*;

/// Runs `work` on every rank and returns the results in the order of the ranks.
fn on_ranks<R: Send>(size: usize, work: impl Fn(Communicator) -> R + Sync) -> Vec<R> {
    run_all(Communicator::threads(size).expect("a power of two"), work)
}

fn run_all<R: Send>(ranks: Vec<Communicator>, work: impl Fn(Communicator) -> R + Sync) -> Vec<R> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> =
            ranks.into_iter().map(|rank| scope.spawn(move || work(rank))).collect();
        threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
    })
}

/// Numbers whose sum depends on the order of addition.
fn leaf(number: usize, len: usize) -> Vec<f32> {
    let scale = [1e-7, 1., 3e4, 0.3][number % 4];
    (0..len).map(|at| ((at * 7919 + number * 104_729) % 1013) as f32 * scale - 0.1).collect()
}

fn bits(numbers: &[f32]) -> Vec<u32> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

/// The sums over eight leaves, of which each of so many ranks holds neighbours.
fn sums(ranks: usize, len: usize) -> Vec<Vec<u32>> {
    on_ranks(ranks, |rank| {
        let own = rank.rank() * 8 / ranks..(rank.rank() + 1) * 8 / ranks;
        let leaves = own.map(|number| leaf(number, len));
        let mut sum = tree(leaves, |total, other| add(total, &other)).expect("a leaf");
        rank.all_reduce_sum(&mut sum).expect("all run");
        bits(&sum)
    })
}

#[test]
fn a_sum_over_leaves_has_the_same_bits_on_1_2_4_and_8_ranks() {
    // Summed whole, in parts, and in parts of different lengths.
    for len in [500, 20_000, 20_011] {
        let one = sums(1, len).remove(0);
        let mut plain = leaf(0, len);
        (1..8).for_each(|number| add(&mut plain, &leaf(number, len)));
        assert_ne!(bits(&plain), one, "a sum from left to right would pass unseen");
        for ranks in [2, 4, 8] {
            assert!(sums(ranks, len).iter().all(|sum| *sum == one), "{ranks} ranks, {len} numbers");
        }
    }
}

/// Host memory, handled as if it were elsewhere.
struct HostVectors<'a>(&'a Communicator);

impl VectorMemory for HostVectors<'_> {
    type Vector = Vec<f32>;
    type Error = CommunicationError;

    fn len(&self, vector: &Vec<f32>) -> usize {
        vector.len()
    }

    fn part(&self, vector: &Vec<f32>, range: Range<usize>) -> Result<Vec<f32>> {
        Ok(vector[range].to_vec())
    }

    fn concatenate(&self, first: Vec<f32>, second: Vec<f32>) -> Result<Vec<f32>> {
        Ok([first, second].concat())
    }

    fn add(&self, a: &Vec<f32>, b: &Vec<f32>) -> Result<Vec<f32>> {
        let mut sum = a.clone();
        add(&mut sum, b);
        Ok(sum)
    }

    fn exchange(&self, partner: usize, sent: &Vec<f32>, count: usize) -> Result<Vec<f32>> {
        let mut received = vec![0.; count];
        self.0.exchange(partner, sent, &mut received)?;
        Ok(received)
    }
}

#[test]
fn vectors_are_summed_to_the_same_bits_as_host_memory() {
    for (ranks, len) in [(1, 9), (4, 0), (4, 500), (2, 20_000), (4, 20_011), (8, 20_013)] {
        on_ranks(ranks, |rank| {
            let own = leaf(rank.rank(), len);
            let mut expected = own.clone();
            rank.all_reduce_sum(&mut expected).expect("all run");
            let sum = rank.sum_vectors(&HostVectors(&rank), own).expect("all run");
            assert_eq!(bits(&sum), bits(&expected), "{ranks} ranks, {len} numbers");
        });
    }
}

#[test]
fn vectors_are_joined_and_gathered_in_the_order_of_the_ranks() {
    on_ranks(8, |rank| {
        let (memory, digit) = (HostVectors(&rank), rank.rank() as f32 + 1.);
        let join = |lower: Vec<f32>, upper: Vec<f32>| {
            let shift = 10f32.powi(upper[1] as i32);
            Ok(vec![lower[0] * shift + upper[0], lower[1] + upper[1]])
        };
        let digits = rank.join_vectors(&memory, vec![digit, 1.], join).expect("all run");
        assert_eq!(digits, [12_345_678., 8.]);
        let counts: Vec<usize> = (0..8).map(|rank| rank % 3).collect();
        let own = vec![digit; counts[rank.rank()]];
        let all = rank.gather_vectors(&memory, own, &counts).expect("all run");
        assert_eq!(all, [2., 3., 3., 5., 6., 6., 8.]);
    });
}

#[test]
fn joins_are_in_the_order_of_the_ranks() {
    let join = |lower: &mut [u64], upper: &[u64]| lower[0] = 10 * lower[0] + upper[0] % 10;
    let found = on_ranks(2, |rank| {
        let mut digit = [rank.rank() as u64 + 1];
        rank.all_reduce(&mut digit, join).expect("all run");
        digit[0]
    });
    assert_eq!(found, [12, 12]);
}

#[test]
fn values_are_gathered_in_order_and_sent_from_the_first_rank() {
    let found = on_ranks(4, |rank| {
        let own = vec![rank.rank() as u32; rank.rank()];
        let all = rank.all_gather(&own).expect("all run");
        let mut word = own;
        if rank.is_first() {
            word = vec![7, 8];
        }
        rank.broadcast(&mut word).expect("all run");
        rank.barrier().expect("all run");
        (all, word, rank.any(rank.rank() == 2).expect("all run"), rank.any(false).expect("all run"))
    });
    assert_eq!(found, vec![(vec![1, 2, 2, 3, 3, 3], vec![7, 8], true, false); 4]);
    let single = Communicator::single();
    assert_eq!(single.all_gather(&[1u8, 2]).expect("alone"), [1, 2]);
    assert!(single.any(true).expect("alone") && !single.any(false).expect("alone"));
}

#[test]
fn shared_items_are_gathered_in_their_order_on_the_first_rank() {
    for ranks in [1, 2, 4, 8] {
        for items in [0, 1, 3, 8, 13] {
            let list = |item: usize| vec![item as u16; item % 3];
            let found = on_ranks(ranks, |rank| {
                let own = rank.share(items);
                assert!(own.len().abs_diff(items / ranks) <= 1, "{own:?} of {items}");
                rank.gather(own.map(list).collect()).expect("all run")
            });
            assert_eq!(found[0], (0..items).map(list).collect::<Vec<_>>(), "{ranks} ranks");
            assert!(found[1..].iter().all(Vec::is_empty), "{found:?}");
        }
    }
}

#[test]
fn a_rank_that_ends_or_differs_is_named_by_the_others() {
    let errors = on_ranks(2, |rank| match rank.is_first() {
        true => None,
        false => Some(rank.barrier().expect_err("rank 0 has ended").to_string()),
    });
    assert!(errors[1].as_ref().is_some_and(|text| text.contains("rank 0 has ended")), "{errors:?}");
    let errors = on_ranks(2, |rank| {
        let mut numbers = vec![0f32; 1 + rank.rank()];
        rank.all_reduce_sum(&mut numbers).expect_err("other lengths").to_string()
    });
    assert!(errors[0].contains("rank 1 sent 8 bytes"), "{errors:?}");
    let error = Communicator::threads(6).expect_err("not a power of two").to_string();
    assert!(error.contains("6 ranks") && error.contains("such as 8"), "{error}");
}

#[test]
fn sums_in_the_background_have_the_bits_of_others_and_keep_apart_from_them() {
    for size in [1, 2, 4, 8] {
        on_ranks(size, |rank| {
            assert_eq!(rank.sums_in_background(), size > 1);
            let lens = [500, 0, 20_011, 7];
            let leaves = lens.map(|len| leaf(rank.rank(), len));
            let pending = leaves.clone().map(|leaf| rank.sum_in_background(leaf));
            // Begun later, and of the same lengths: a message taken for another would pass the check of its length.
            let sums = lens.map(|len| {
                let mut sum = leaf(rank.rank() + 1, len);
                rank.all_reduce_sum(&mut sum).expect("all run");
                sum
            });
            let all = rank.all_gather(&[rank.rank() as u32]).expect("all run");
            assert_eq!(all.len(), size);
            for ((pending, own), other) in pending.into_iter().zip(leaves).zip(sums) {
                let mut expected = own;
                rank.all_reduce_sum(&mut expected).expect("all run");
                let sum = pending.wait().expect("all run");
                assert_eq!(bits(&sum), bits(&expected), "{size} ranks");
                assert!(size == 1 || sum.is_empty() || bits(&sum) != bits(&other));
            }
            assert_eq!(rank.end.background.get().is_some(), size > 1, "a thread on {size} ranks");
        });
    }
}

#[test]
fn without_a_second_connection_sums_are_made_at_once() {
    let mut ranks = Communicator::threads(2).expect("a power of two");
    for rank in &mut ranks {
        *rank = Communicator::of(rank.rank, rank.size, rank.end.links.clone(), None);
    }
    run_all(ranks, |rank| {
        assert!(!rank.sums_in_background());
        let pending = rank.sum_in_background(vec![1f32, rank.rank() as f32]);
        rank.barrier().expect("all run");
        assert_eq!(pending.wait().expect("all run"), [2., 1.]);
        assert!(rank.end.background.get().is_none(), "a thread");
    });
}

#[test]
fn sums_are_made_while_a_rank_does_other_things() {
    let latency = Duration::from_millis(20);
    let ranks = Communicator::threads_with_latency(2, latency).expect("a power of two");
    run_all(ranks, |rank| {
        let pending: Vec<_> =
            (0..8).map(|number| rank.sum_in_background(vec![number as f32])).collect();
        let begun = Instant::now();
        while rank.sums_made() < pending.len() {
            assert!(begun.elapsed() < Duration::from_secs(60), "nobody makes the sums");
            thread::sleep(Duration::from_millis(1));
        }
        for (number, pending) in pending.into_iter().enumerate() {
            assert_eq!(pending.wait().expect("all run"), [2. * number as f32]);
        }
        // In the foreground every message is waited for.
        let before = rank.waited();
        (0..4).for_each(|_| rank.barrier().expect("all run"));
        assert!(rank.waited() >= before + 4 * latency);
    });
}

#[test]
fn sums_in_the_background_end_with_their_ranks() {
    // The first rank ends before its sum is made, and the other before it has begun one.
    let errors = on_ranks(2, |rank| match rank.is_first() {
        true => {
            drop(rank.sum_in_background(vec![1f32]));
            None
        }
        false => {
            rank.barrier().expect_err("rank 0 has ended");
            // Rank 0 has sent its share of the first sum before it ended, but not that of the second.
            let _ = rank.sum_in_background(vec![1f32]).wait();
            Some(
                rank.sum_in_background(vec![1f32])
                    .wait()
                    .expect_err("rank 0 has ended")
                    .to_string(),
            )
        }
    });
    let error = errors[1].as_deref().expect("of rank 1");
    assert!(error.contains("rank 0 has ended while rank 1 waited for it"), "{error}");
    // The same words as in the foreground; a sum of other lengths is refused alike.
    let errors = on_ranks(2, |rank| {
        let numbers = vec![0f32; 1 + rank.rank()];
        rank.sum_in_background(numbers).wait().expect_err("other lengths").to_string()
    });
    assert!(errors[0].contains("rank 1 sent 8 bytes"), "{errors:?}");
}

#[test]
fn abandoned_sums_hold_nobody_up() {
    let both = Barrier::new(2);
    on_ranks(2, |rank| {
        // One rank begins a sum that the other never begins, and both end.
        if rank.is_first() {
            drop(rank.sum_in_background(vec![1f32; 10]));
        }
        both.wait();
    });
    // Later sums are made after those that nobody waits for.
    on_ranks(4, |rank| {
        drop(rank.sum_in_background(vec![1f32; 10]));
        let sum = rank.sum_in_background(vec![rank.rank() as f32]).wait();
        assert_eq!(sum.expect("all run"), [6.]);
    });
}
