//! A short trial of each kind. `cargo xtask trial crash --minutes 60` goes on for longer.
#![cfg(target_os = "linux")]

use tests::bench::assort;
use tests::trial::{Trial, Until, crash, hostile, mutation};

#[test]
fn killed_damaged_and_crowded_runs_end_with_the_bytes_of_an_undisturbed_one() {
    let program = assort().get_program().to_owned();
    let mut trial = Trial::new(program.as_ref(), 1).expect("an undisturbed run");
    // A signal may come after the end of its command.
    for _ in 0..20 {
        crash::run(&mut trial, Until::rounds(1)).expect("kills");
        if trial.counts.kills.values().sum::<usize>() > 3 {
            break;
        }
    }
    hostile::run(&mut trial, Until::rounds(3)).expect("damage");
    mutation::run(&mut trial, Until::rounds(2000)).expect("mutations");
    let counts = &trial.counts;
    println!("{counts}");
    assert!(counts.is_sound(), "{counts}");
    assert!(counts.kills.values().sum::<usize>() > 3 && !counts.damages.is_empty(), "{counts}");
    assert!(counts.rounds_at_once == 1 && counts.mutations > 1000, "{counts}");
}
