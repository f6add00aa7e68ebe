//! The program in an empty folder, on a machine without cargo: it brings all that it needs.

use std::fs;
use std::path::Path;
use std::process::Output;

use tests::bench::{assort, stderr};

/// Runs a command in `folder`.
fn run(folder: &Path, words: &[&str]) -> Output {
    let mut command = assort();
    command.args(words).current_dir(folder).env_clear();
    let output = command.output().expect("started");
    assert!(output.status.success(), "{words:?}: {}", stderr(&output));
    output
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn an_empty_folder_is_enough_from_the_digits_to_predictions() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path();
    assert!(stdout(&run(folder, &["list"])).lines().any(|line| line.starts_with("digits ")));
    assert!(stdout(&run(folder, &["show", "digits"])).contains("[pretraining]"));
    assert_eq!(fs::read_dir(folder).expect("there").count(), 0, "neither writes anything");

    let mut words = vec!["reproduce", "digits", "--device", "cpu"];
    let short =
        ["pretraining.run.epochs=1", "pretraining.schedule.warmup-epochs=0", "rounds.rounds=0"];
    words.extend(short.iter().flat_map(|set| ["--set", set]));
    let output = run(folder, &words);
    assert!(stdout(&output).contains("1797 images, 10 clusters"), "{}", stdout(&output));
    assert!(stderr(&output).contains("1797 images of 10 classes"), "{}", stderr(&output));
    run(folder, &["report", "digits"]);
    assert!(folder.join("runs/digits/0/report/report.html").is_file());

    let digits = fs::read_dir(folder.join("runs/.embedded")).expect("unpacked").flatten();
    let digits = digits.map(|entry| entry.path().join("digits")).next().expect("a folder");
    let digits = digits.to_str().expect("UTF-8");
    let output = run(folder, &["predict", "digits", "--images", digits, "--device", "cpu"]);
    assert!(stdout(&output).contains("1797 images: ACC"), "{}", stdout(&output));
}

#[test]
fn experiments_beside_the_program_win_over_its_own() {
    let folder = tempfile::tempdir().expect("a folder");
    let own = stdout(&run(folder.path(), &["show", "digits"]));
    let title = "title = \"Mine\"";
    let mine = own.lines().map(|line| if line.starts_with("title = ") { title } else { line });
    fs::create_dir(folder.path().join("configs")).expect("created");
    let text = mine.collect::<Vec<_>>().join("\n");
    fs::write(folder.path().join("configs/digits.toml"), text).expect("written");
    let listed = stdout(&run(folder.path(), &["list"]));
    assert!(listed.lines().any(|line| line.starts_with("digits ") && line.ends_with("Mine")));
}

#[test]
fn every_shell_and_every_command_has_its_page() {
    let folder = tempfile::tempdir().expect("a folder");
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let text = stdout(&run(folder.path(), &["completions", shell]));
        assert!(text.contains("reproduce") && text.contains("pretraining"), "{shell}");
    }
    assert!(stdout(&run(folder.path(), &["man"])).contains("reproduce"));
    assert!(stdout(&run(folder.path(), &["man", "predict"])).contains("images"));
    let version = stdout(&run(folder.path(), &["--version"]));
    assert!(version.starts_with("assort ") && version.contains("computes on"), "{version}");
    let help = stdout(&run(folder.path(), &["--help"]));
    assert!(help.contains("imc-swav") && help.contains("assort reproduce digits"), "{help}");
    assert!(help.lines().all(|line| line.chars().count() <= 80), "{help}");
    let help = stdout(&run(folder.path(), &["cluster", "--help"]));
    assert!(help.contains("Usage: assort cluster [OPTIONS] <PATH>"), "{help}");
    let help = stdout(&run(folder.path(), &["temi", "--help"]));
    assert!(help.contains("Usage: assort temi [OPTIONS]"), "{help}");
    assert!(help.contains("  embeddings  output of embed\n"), "{help}");
    assert!(
        help.contains("  previous    this stage's output of the round before (optional)"),
        "{help}"
    );
}
