//! Ranks as processes, which `mpirun` starts from these tests; skipped where it is missing.

use std::env;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use collective::{Communicator, tree};

/// Set in the processes that a test starts: what they do.
const WORK: &str = "ASSORT_TEST_OF_RANKS";

/// Starts so many ranks that do `work`, the test of this name in a process of its own; `None` where MPI
/// is missing.
fn start(test: &str, work: &str, ranks: usize) -> Option<Child> {
    let mut command = Command::new("mpirun");
    command.arg("-n").arg(ranks.to_string()).arg(env::current_exe().expect("this program"));
    command.args(["--exact", test, "--nocapture"]).env(WORK, work);
    for (name, value) in [
        ("OMPI_ALLOW_RUN_AS_ROOT", "1"),
        ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1"),
        ("OMPI_MCA_rmaps_base_oversubscribe", "1"),
        ("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe"),
    ] {
        command.env(name, value);
    }
    match command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn() {
        Ok(child) => Some(child),
        Err(error) => {
            eprintln!("skipped: `mpirun` cannot be started ({error}); install Open MPI");
            None
        }
    }
}

fn is_child() -> bool {
    env::var_os(WORK).is_some()
}

/// Numbers whose sum depends on the order of addition.
fn leaf(number: usize, len: usize) -> Vec<f32> {
    let scale = [1e-7, 1., 3e4, 0.3][number % 4];
    (0..len).map(|at| ((at * 7919 + number * 104_729) % 1013) as f32 * scale - 0.1).collect()
}

/// A digest of a sum over eight leaves and of gathered numbers, the same on all ranks.
fn digest(ranks: &Communicator) -> u64 {
    let mut digest = 0u64;
    let mut add = |number: u64| digest = digest.wrapping_mul(0x100_0000_01b3) ^ number;
    for len in [500, 40_003] {
        let own = ranks.rank() * 8 / ranks.size()..(ranks.rank() + 1) * 8 / ranks.size();
        let sum = tree(own.map(|number| leaf(number, len)), |total, other| {
            total.iter_mut().zip(other).for_each(|(total, other)| *total += other);
        });
        let mut sum = sum.expect("a leaf");
        // At the same time, of other numbers, so that a message taken for another changes the digest. A factor of two
        // is exact.
        let pending = ranks.sum_in_background(sum.iter().map(|number| 2. * number).collect());
        ranks.all_reduce_sum(&mut sum).expect("all run");
        let twice = pending.wait().expect("all run");
        sum.iter().chain(&twice).for_each(|number| add(u64::from(number.to_bits())));
    }
    // In the order of the ranks, each a share of the same eight numbers.
    let own: Vec<u16> = ranks.share(8).map(|at| at as u16).collect();
    ranks.all_gather(&own).expect("all run").iter().for_each(|number| add(u64::from(*number)));
    let lists = ranks.share(8).map(|at| vec![3u8; at]).collect();
    let mut word = ranks.gather(lists).expect("all run").concat();
    ranks.broadcast(&mut word).expect("all run");
    word.iter().for_each(|number| add(u64::from(*number)));
    ranks.barrier().expect("all run");
    digest
}

#[test]
fn processes_compute_the_bits_of_one() {
    if is_child() {
        let ranks = Communicator::of_environment().expect("started by mpirun");
        assert!(ranks.sums_in_background(), "Open MPI and MPICH let several threads send");
        println!("digest {:x}", digest(&ranks));
        return;
    }
    let want = format!("digest {:x}", digest(&Communicator::single()));
    for ranks in [2, 4] {
        let Some(child) = start("processes_compute_the_bits_of_one", "sum", ranks) else { return };
        let output = child.wait_with_output().expect("ended");
        let printed = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{printed}{errors}");
        assert_eq!(printed.matches(&want).count(), ranks, "{printed}{errors}");
    }
}

/// The exit status of ranks, which end soon.
fn status_of(mut child: Child, work: &str) -> ExitStatus {
    let began = Instant::now();
    loop {
        match child.try_wait().expect("started") {
            Some(status) => return status,
            None if began.elapsed() > Duration::from_secs(30) => {
                child.kill().expect("running");
                panic!("{work}: ranks still run after 30 s");
            }
            None => thread::sleep(Duration::from_millis(50)),
        }
    }
}

/// Ranks that all end before they have waited for their sums make them and end MPI as always.
#[test]
fn sums_that_nobody_waits_for_do_not_keep_the_ranks_from_ending() {
    if is_child() {
        let ranks = Communicator::of_environment().expect("started by mpirun");
        for len in [10, 40_003] {
            drop(ranks.sum_in_background(vec![1f32; len]));
        }
        return;
    }
    let test = "sums_that_nobody_waits_for_do_not_keep_the_ranks_from_ending";
    let Some(child) = start(test, "abandoned sums", 4) else { return };
    let status = status_of(child, "abandoned sums");
    assert!(status.success(), "{status}");
}

/// A rank that is killed, or fails, ends the others, which wait for it.
#[test]
fn a_rank_that_dies_ends_the_others() {
    if is_child() {
        let ranks = Communicator::of_environment().expect("started by mpirun");
        ranks.barrier().expect("all run");
        if ranks.rank() == 2 {
            match env::var(WORK).as_deref() {
                Ok("fails") => ranks.abort(5),
                _ => drop(
                    Command::new("kill").args(["-9", &std::process::id().to_string()]).status(),
                ),
            }
        }
        if env::var(WORK).as_deref() == Ok("killed before a sum in the background") {
            ranks.sum_in_background(vec![1f32; 5000]).wait().expect("MPI ends this process");
        }
        ranks.barrier().expect("MPI ends this process");
        return;
    }
    for (work, code) in
        [("killed", None), ("killed before a sum in the background", None), ("fails", Some(5))]
    {
        let Some(child) = start("a_rank_that_dies_ends_the_others", work, 4) else { return };
        let status = status_of(child, work);
        assert!(!status.success(), "{work}");
        if let Some(code) = code {
            assert_eq!(status.code(), Some(code), "{work}");
        }
    }
}
