use rand::rngs::StdRng;
use rand::seq::{IndexedRandom, SliceRandom};
use rand::{RngExt, SeedableRng};

use super::*;

fn id(picture: char) -> Id {
    let mut id = Id::default();
    id[..4].copy_from_slice(&u32::from(picture).to_be_bytes());
    id
}

/// A run of one cluster per text, with a picture per character; the first has the highest score.
fn run(clusters: &[&str]) -> ClusteredPictures {
    let (mut pictures, mut assignment, mut scores) = (Vec::new(), Vec::new(), Vec::new());
    for (cluster, text) in (0..).zip(clusters) {
        for (rank, picture) in (1u8..).zip(text.chars()) {
            pictures.push(picture);
            assignment.push(cluster);
            scores.push(1. / f32::from(rank));
        }
    }
    let ids = pictures.iter().map(|&picture| id(picture)).collect();
    let names = pictures.iter().map(|picture| format!("{picture}.jpg")).collect();
    ClusteredPictures::new(clusters.len(), assignment, &scores, ids, names).expect("a run")
}

/// The pictures of each cluster that is shown with its name, then the marked ones: `3 Beaches: ab`.
fn shown(corrections: &Corrections, run: &ClusteredPictures) -> Vec<String> {
    let found = corrections.resolve(run);
    let pictures = |wanted: Membership| -> String {
        let places = found.memberships.iter().zip(&run.names);
        let mut names: Vec<&str> =
            places.filter(|(own, _)| **own == wanted).map(|(_, name)| &name[..1]).collect();
        names.sort();
        names.concat()
    };
    let mut lines = Vec::new();
    for (number, name) in (0..).zip(&found.names) {
        if found.shown_as[number as usize] == number {
            let name = name.as_ref().map_or(String::new(), |name| format!(" {name}"));
            lines.push(format!("{number}{name}: {}", pictures(Membership::Cluster(number))));
        }
    }
    for mark in [PictureMark::Wrong, PictureMark::Outlier] {
        let marked = pictures(Membership::Marked(mark));
        lines.extend((!marked.is_empty()).then(|| format!("{}: {marked}", mark.word())));
    }
    lines
}

/// Corrections of every kind.
fn example(run: &ClusteredPictures) -> Result<Corrections> {
    let mut corrections = Corrections::default();
    corrections.rename(run, 0, Some(" Beaches "))?;
    corrections.merge(run, &[2, 1])?;
    corrections.move_pictures(run, &[1], 2)?;
    corrections.mark(run, &[0], PictureMark::Wrong)?;
    corrections.mark(run, &[5], PictureMark::Outlier)?;
    Ok(corrections)
}

const EXAMPLE: [&str; 3] = ["abc", "de", "fg"];

#[test]
fn a_file_is_read_as_written_and_a_missing_one_has_no_corrections() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("new/corrections.toml");
    let (mut run, mut names) =
        (run(&EXAMPLE), ["\u{1b}[31m\r\n", "\"'\\", "'''\n\"\"\"\u{202e}"].iter());
    for name in &mut run.names[..3] {
        *name = (*names.next().expect("three")).to_owned();
    }
    assert_eq!(Corrections::open(&path)?, Corrections::default());
    for corrections in [Corrections::default(), example(&run)?] {
        corrections.write(&path)?;
        assert_eq!(Corrections::open(&path)?, corrections);
        assert_eq!(corrections.is_empty(), corrections == Corrections::default());
    }
    Ok(())
}

/// A file as a person would write it, with comments, in another order.
fn written_by_hand() -> String {
    format!(
        "format-version = 1 # by hand\n[[picture]]\nid = \"{}\"\nname = \"holiday/1.jpg\"\ncluster = 7\n\
         [[picture]]\nid = \"{}\"\nname = \"2\"\nmark = \"outlier\"\n[[merge]]\nclusters = [3, 7]\n\
         [[cluster]]\nnumber = 7\nexemplars = [\"{}\"]\n\
         [[cluster]]\nnumber = 3\nname = \"Strände\"\nexemplars = [\"{}\", \"{}\"]\n",
        hex(&id('d')),
        hex(&id('e')),
        hex(&id('f')),
        hex(&id('b')).to_uppercase(),
        hex(&id('a'))
    )
}

#[test]
fn a_file_written_by_hand_is_applied() -> Result<()> {
    let corrections = Corrections::of_text(&written_by_hand())?;
    assert_eq!(Corrections::of_text(&corrections.to_text())?, corrections);
    let run = run(&["de", "abc", "fg"]);
    assert_eq!(shown(&corrections, &run), ["0: ", "1 Strände: abcdfg", "outlier: e"]);
    let found = corrections.resolve(&run);
    assert_eq!(found.shown_as, [0, 1, 1]);
    assert_eq!((found.moved, found.not_applied.len()), (1, 0));
    assert_eq!(
        found.summary().expect("corrections"),
        "Corrections by hand: 1 cluster named, 1 cluster merged into another one, 1 picture moved, \
         1 picture marked as outlier."
    );
    assert_eq!(Corrections::default().resolve(&run).summary(), None);
    // Pictures that came later, of clusters 2, 0 and 1.
    let later = found.of_other_pictures(&[2, 0, 1]);
    assert_eq!(later.memberships, [1, 0, 1].map(Membership::Cluster));
    assert_eq!((later.moved, &later.names), (0, &found.names));
    Ok(())
}

#[test]
fn an_unusable_file_is_refused_with_its_path_and_reason() -> Result<()> {
    let sound = written_by_hand();
    let exemplar = format!("\"{}\"", hex(&id('f')));
    let (picture, long) = (hex(&id('e')), format!("\"{}\"", "x".repeat(101)));
    let many: Vec<String> = (0u8..17).map(|n| format!("\"{}\"", hex(&[n; 32]))).collect();
    let replaced = |from: &str, to: &str| {
        assert!(sound.contains(from), "{from}");
        sound.replacen(from, to, 1)
    };
    let cases = [
        ("x".to_owned(), "TOML"),
        (replaced("format-version = 1", ""), "`format-version` is missing"),
        (replaced("format-version = 1", "format-version = 2"), "newer program"),
        (format!("more = 1\n{sound}"), "unknown field `more`"),
        (replaced("mark = ", "marked = "), "unknown field `marked`"),
        (replaced("\"outlier\"", "\"odd\""), "unknown variant `odd`"),
        (replaced("mark = \"outlier\"", ""), "picture `2` needs `cluster` or `mark`"),
        (replaced("cluster = 7", "cluster = 7\nmark = \"wrong\""), "and not both"),
        (replaced("cluster = 7", "cluster = 4"), "`holiday/1.jpg` names cluster 4"),
        (replaced(&picture, &hex(&id('d'))), "two [[picture]] of id 00000064"),
        (replaced(&picture, "+f"), "`+f` is not an id"),
        (replaced("number = 7", "number = 3"), "two [[cluster]] of number 3"),
        (replaced("number = 7", "number = -7"), "-7"),
        (replaced(&exemplar, ""), "cluster 7 needs 1 to 16 different exemplars"),
        (replaced(&exemplar, &format!("{exemplar}, {exemplar}")), "16 different"),
        (replaced(&exemplar, &many.join(", ")), "16 different"),
        (replaced(&exemplar, "\"no\""), "the exemplars of cluster 7"),
        (replaced("[3, 7]", "[3, 8]"), "a [[merge]] names cluster 8"),
        (replaced("[3, 7]", "[3]"), "two or more clusters"),
        (replaced("[3, 7]", "[3, 3]"), "cluster 3 is in a [[merge]] twice"),
        (
            replaced("[3, 7]", "[3, 7]\n[[merge]]\nclusters = [7, 3]"),
            "cluster 7 is in a [[merge]] twice",
        ),
        (replaced("[3, 7]", "[7, 3]"), "cluster 3 is shown as cluster 7"),
        (
            replaced("number = 7", "number = 7\nname = \"Strände\""),
            "two clusters have the name `Strände`",
        ),
        (replaced("\"Strände\"", "\"\""), "1 to 100 characters"),
        (replaced("\"Strände\"", &long), "not 101"),
        (replaced("\"Strände\"", "\" x\""), "no spaces around it"),
        (replaced("\"Strände\"", "\"a\\u001bb\""), r"`a\u001bb`"),
        (replaced("\"Strände\"", "\"a\u{202e}b\""), "direction"),
    ];
    let folder = tempfile::tempdir()?;
    let path = folder.path().join(Corrections::FILE);
    for (text, want) in cases {
        fs::write(&path, &text)?;
        let error = format!("{:#}", Corrections::open(&path).expect_err(want));
        assert!(error.contains(want), "`{want}` is not in: {error}");
        assert!(error.contains("corrections.toml` are not usable"), "{error}");
    }
    fs::remove_file(&path)?;
    fs::create_dir(&path)?;
    assert!(Corrections::open(&path).is_err(), "a folder");
    Ok(())
}

#[test]
fn every_edit_shows() -> Result<()> {
    let run = run(&EXAMPLE);
    let mut corrections = example(&run)?;
    assert_eq!(shown(&corrections, &run), ["0 Beaches: c", "2: bdeg", "wrong: a", "outlier: f"]);
    corrections.unmark(&run, &[0, 1])?;
    corrections.unmerge(&run, 1)?;
    assert_eq!(shown(&corrections, &run), ["0 Beaches: abc", "1: de", "2: g", "outlier: f"]);
    corrections.rename(&run, 0, None)?;
    corrections.unmark(&run, &[5])?;
    assert!(corrections.is_empty(), "{}", corrections.to_text());
    Ok(())
}

#[test]
fn the_number_of_a_merged_cluster_means_the_cluster_that_it_is_shown_as() -> Result<()> {
    let run = run(&["a", "b", "c", "d", "e"]);
    let mut corrections = Corrections::default();
    corrections.rename(&run, 1, Some("B"))?;
    corrections.rename(&run, 3, Some("D"))?;
    corrections.merge(&run, &[0, 1])?;
    assert_eq!(shown(&corrections, &run)[0], "0 B: ab", "the first name that there is");
    corrections.merge(&run, &[2, 1, 3])?;
    assert_eq!(shown(&corrections, &run), ["2 B: abcd", "4: e"]);
    corrections.rename(&run, 3, Some("All"))?;
    corrections.move_pictures(&run, &[4], 0)?;
    assert_eq!(shown(&corrections, &run), ["2 All: abcde", "4: "]);
    let error = corrections.merge(&run, &[3, 0]).expect_err("one already").to_string();
    assert!(error.contains("two or more different clusters, not [3, 0]"), "{error}");
    corrections.unmerge(&run, 0)?;
    assert_eq!(shown(&corrections, &run), ["0: a", "1: b", "2 All: ce", "3: d", "4: "]);
    corrections.rename(&run, 0, Some("B"))?;
    assert!(corrections.unmerge(&run, 0).is_err(), "not merged");
    Ok(())
}

#[test]
fn a_picture_is_moved_or_marked_and_moving_it_back_is_no_correction() -> Result<()> {
    let run = run(&EXAMPLE);
    let mut corrections = Corrections::default();
    corrections.mark(&run, &[0], PictureMark::Wrong)?;
    corrections.move_pictures(&run, &[0], 1)?;
    assert_eq!(shown(&corrections, &run), ["0: bc", "1: ade", "2: fg"]);
    corrections.mark(&run, &[0], PictureMark::Outlier)?;
    assert_eq!(shown(&corrections, &run), ["0: bc", "1: de", "2: fg", "outlier: a"]);
    corrections.move_pictures(&run, &[0], 0)?;
    assert!(corrections.is_empty(), "{}", corrections.to_text());
    Ok(())
}

#[test]
fn an_edit_that_fails_changes_nothing() -> Result<()> {
    let run = run(&["abc", "de", "fg", ""]);
    let mut corrections = example(&run)?;
    let before = corrections.clone();
    let long = "x".repeat(101);
    for (name, want) in [
        (" ", "1 to 100 characters"),
        (&*long, "not 101"),
        ("a\nb", r"`a\u000ab`"),
        ("\u{2066}a", r"\u2066"),
        ("Beaches", "cluster 0 has the name `Beaches` already"),
    ] {
        let error = format!("{:#}", corrections.rename(&run, 1, Some(name)).expect_err(want));
        assert!(error.contains(want), "`{want}` is not in: {error}");
    }
    let errors = [
        corrections.rename(&run, 4, None),
        corrections.rename(&run, 3, Some("x")),
        corrections.merge(&run, &[0]),
        corrections.merge(&run, &[0, 4]),
        corrections.unmerge(&run, 0),
        corrections.move_pictures(&run, &[0], 3),
        corrections.move_pictures(&run, &[0, 7], 1),
        corrections.mark(&run, &[7], PictureMark::Wrong),
        corrections.unmark(&run, &[7]),
    ];
    for (error, want) in errors.into_iter().zip([
        "no cluster 4; the run has 4",
        "cluster 3 is empty",
        "two or more",
        "no cluster 4",
        "not merged",
        "cluster 3 is empty",
        "no picture 7",
        "no picture 7",
        "no picture 7",
    ]) {
        let error = error.expect_err(want).to_string();
        assert!(error.contains(want), "`{want}` is not in: {error}");
    }
    assert_eq!(corrections, before);
    corrections.rename(&run, 0, Some("Beaches"))?;
    assert_eq!(corrections, before, "its own name");
    Ok(())
}

#[test]
fn corrections_survive_other_numbers_and_pictures_that_come_and_go() -> Result<()> {
    let corrections = example(&run(&EXAMPLE))?;
    // Cluster 0 is 2 now, 1 is 0 and 2 is 1; c, e and g are gone; h, i and j came.
    let later = run(&["dh", "fij", "ab"]);
    assert_eq!(shown(&corrections, &later), ["1: bdhij", "2 Beaches: ", "wrong: a", "outlier: f"]);
    assert_eq!(corrections.resolve(&later).not_applied, [""; 0]);
    // Pictures with corrections are gone.
    let without = run(&["dh", "fij", "c"]);
    assert_eq!(shown(&corrections, &without), ["1: dhij", "2 Beaches: c", "outlier: f"]);
    assert_eq!(
        corrections.resolve(&without).not_applied,
        ["2 corrected pictures are not in this run: `a.jpg`, `b.jpg`."]
    );
    Ok(())
}

#[test]
fn an_edit_keeps_what_the_run_does_not_have() -> Result<()> {
    let (first, second) = (run(&EXAMPLE), run(&["kl", "mn", "abc"]));
    let mut corrections = example(&first)?;
    corrections.move_pictures(&first, &[3], 0)?;
    // Clusters 1 and 2 are gone, and cluster 0 is 2.
    assert_eq!(shown(&corrections, &second), ["0: kl", "1: mn", "2 Beaches: bc", "wrong: a"]);
    corrections.rename(&second, 1, Some("Dunes"))?;
    corrections.rename(&second, 2, Some("Shores"))?;
    assert_eq!(shown(&corrections, &second), ["0: kl", "1 Dunes: mn", "2 Shores: bc", "wrong: a"]);
    let mut sentences = corrections.resolve(&second).not_applied;
    assert!(
        sentences.pop().expect("pictures").contains("2 corrected pictures are not in this run")
    );
    assert_eq!(
        sentences,
        [
            "Cluster 3 of the corrections was not found: none of its pictures is in this run. Not applied: its \
             merge.",
            "Cluster 4 of the corrections was not found: none of its pictures is in this run. Not applied: its \
             merge, 1 moved picture.",
        ]
    );
    // Back to the first run: all of it is there.
    assert_eq!(
        shown(&corrections, &first),
        ["0 Shores: cd", "2: beg", "wrong: a", "outlier: f"],
        "{}",
        corrections.to_text()
    );
    Ok(())
}

#[test]
fn the_name_of_a_cluster_that_is_gone_can_be_given_to_another_one() -> Result<()> {
    let mut corrections = Corrections::default();
    corrections.rename(&run(&["ab", "cd"]), 1, Some("Dogs"))?;
    let later = run(&["ab", "ef"]);
    let lost = corrections.resolve(&later).not_applied;
    assert!(lost[0].contains("Cluster 1 (`Dogs`)") && lost[0].contains("its name"), "{lost:?}");
    corrections.rename(&later, 0, Some("Dogs"))?;
    assert_eq!(shown(&corrections, &later), ["0 Dogs: ab", "1: ef"]);
    assert_eq!(corrections.resolve(&later).not_applied, [""; 0]);
    Ok(())
}

#[test]
fn a_cluster_needs_more_than_half_of_the_exemplars_that_are_left() -> Result<()> {
    let mut corrections = Corrections::default();
    corrections.rename(&run(&["abcde", "x"]), 0, Some("Dogs"))?;
    for (clusters, want) in [
        (&["ab", "cde"][..], Ok("1 Dogs: cde")),
        (&["ab", "c"], Ok("0 Dogs: ab")),
        (
            &["ab", "cd"],
            Err("its pictures are divided among clusters 0, 1. Not applied: its name."),
        ),
        (&["ab", "cd", "e"], Err("divided among clusters 0, 1, 2")),
        (&["x", "y"], Err("none of its pictures is in this run")),
    ] {
        let run = run(clusters);
        let (shown, found) = (shown(&corrections, &run), corrections.resolve(&run));
        match want {
            Ok(line) => assert!(shown.contains(&line.to_owned()), "{shown:?}"),
            Err(why) => {
                assert!(found.not_applied[0].contains(why), "{:?}", found.not_applied);
                assert!(found.names.iter().all(Option::is_none));
            }
        }
    }
    Ok(())
}

#[test]
fn of_two_claims_on_a_cluster_the_one_with_more_exemplars_counts() -> Result<()> {
    let first = run(&["ab", "cde", "f"]);
    let mut corrections = Corrections::default();
    corrections.rename(&first, 0, Some("Cats"))?;
    corrections.rename(&first, 1, Some("Dogs"))?;
    corrections.move_pictures(&first, &[5], 0)?;
    let later = run(&["f", "abcde"]);
    assert_eq!(shown(&corrections, &later), ["0: f", "1 Dogs: abcde"]);
    assert_eq!(
        corrections.resolve(&later).not_applied,
        [
            "Cluster 0 (`Cats`) of the corrections was not found: its pictures are in cluster 1, which \
             has as many or more of cluster 1 (`Dogs`). Not applied: its name, 1 moved picture."
        ]
    );
    // As many of each: the lower number.
    assert_eq!(shown(&corrections, &run(&["f", "abcd"])), ["0: ", "1 Cats: abcdf"]);
    // An edit keeps the other one for a run that separates them again.
    corrections.mark(&later, &[0], PictureMark::Wrong)?;
    assert_eq!(shown(&corrections, &first), ["0 Cats: ab", "1 Dogs: cde", "2: ", "wrong: f"]);
    Ok(())
}

#[test]
fn merged_clusters_may_be_one_in_another_run_and_stay_merged_in_a_third() -> Result<()> {
    let first = run(&["ab", "cd", "e"]);
    let mut corrections = Corrections::default();
    corrections.merge(&first, &[1, 0])?;
    corrections.rename(&first, 1, Some("Dogs"))?;
    corrections.move_pictures(&first, &[4], 0)?;
    let united = run(&["e", "abcd"]);
    assert_eq!(shown(&corrections, &united), ["0: ", "1 Dogs: abcde"]);
    assert_eq!(corrections.resolve(&united).not_applied, [""; 0]);
    corrections.unmark(&united, &[0])?;
    assert_eq!(shown(&corrections, &united), ["0: e", "1 Dogs: abcd"]);
    assert_eq!(shown(&corrections, &first), ["1 Dogs: abcd", "2: e"]);
    Ok(())
}

#[test]
fn identical_pictures_are_corrected_alike() -> Result<()> {
    let run = run(&["aab", "ac"]);
    assert_eq!(run.places_of(&id('a')), [0, 1, 3]);
    assert!(run.places_of(&id('x')).is_empty());
    let mut corrections = Corrections::default();
    corrections.move_pictures(&run, &[3], 1)?;
    assert_eq!(shown(&corrections, &run), ["0: b", "1: aaac"]);
    assert_eq!(corrections.resolve(&run).moved, 2);
    corrections.mark(&run, &[1], PictureMark::Outlier)?;
    assert_eq!(shown(&corrections, &run), ["0: b", "1: c", "outlier: aaa"]);
    Ok(())
}

#[test]
fn a_run_of_other_lengths_is_refused() {
    let names = || vec!["a".to_owned(), "b".to_owned()];
    let ids = || vec![id('a'), id('b')];
    let made = |own, scores: &[f32], ids, names| ClusteredPictures::new(1, own, scores, ids, names);
    assert!(made(vec![0, 0], &[1., 1.], ids(), names()).is_ok());
    assert!(made(vec![0, 1], &[1., 1.], ids(), names()).is_err());
    assert!(made(vec![0, 0], &[1.], ids(), names()).is_err());
    assert!(made(vec![0, 0], &[1., 1.], vec![], names()).is_err());
    assert!(made(vec![0, 0], &[1., 1.], ids(), vec![]).is_err());
}

/// What a person sees of corrections: where each picture is, as in a list of labels.
#[derive(Clone)]
struct Seen {
    memberships: Vec<Membership>,
    names: BTreeMap<u32, String>,
}

impl Seen {
    fn of(corrections: &Corrections, run: &ClusteredPictures) -> Self {
        let found = corrections.resolve(run);
        assert_eq!(found.not_applied, [""; 0]);
        let names = (0..).zip(found.names).filter_map(|(k, name)| Some((k, name?)));
        Self { memberships: found.memberships, names: names.collect() }
    }
}

/// Of random edits in any order, every picture is where the edits put it, also in a run of other numbers.
#[test]
fn random_edits_neither_lose_nor_duplicate_a_picture() -> Result<()> {
    for seed in 0..60 {
        let random = &mut StdRng::seed_from_u64(seed);
        let (count, clusters) = (random.random_range(4..60), random.random_range(2..7u32));
        // Identical pictures are in the same cluster.
        let known = random.random_range(3..=count);
        let own: Vec<u32> = (0..known).map(|_| random.random_range(0..clusters)).collect();
        let pictures: Vec<usize> = (0..count).map(|_| random.random_range(0..known)).collect();
        let scores: Vec<f32> = (0..count).map(|_| random.random()).collect();
        let numbered = |order: &[u32]| -> Result<ClusteredPictures> {
            let ids = pictures.iter().map(|&picture| [picture as u8; 32]).collect();
            let names = pictures.iter().map(|picture| picture.to_string()).collect();
            let assignment = pictures.iter().map(|&picture| order[own[picture] as usize]).collect();
            ClusteredPictures::new(clusters as usize, assignment, &scores, ids, names)
        };
        let mut order: Vec<u32> = (0..clusters).collect();
        let mut run = numbered(&order)?;
        let mut corrections = Corrections::default();
        let mut seen = Seen::of(&corrections, &run);
        for step in 0..40 {
            edit(random, &mut corrections, &mut seen, &run, step)?;
            let found = Seen::of(&corrections, &run);
            assert_eq!(found.memberships, seen.memberships, "seed {seed}, step {step}");
            assert_eq!(found.names, seen.names, "seed {seed}, step {step}");
            assert_eq!(Corrections::of_text(&corrections.to_text())?, corrections);
            if step % 8 == 7 {
                let before = order.clone();
                order.shuffle(random);
                let new = |number: u32| {
                    order[before.iter().position(|&old| old == number).expect("a permutation")]
                };
                for membership in &mut seen.memberships {
                    if let Membership::Cluster(number) = membership {
                        *number = new(*number);
                    }
                }
                seen.names = seen.names.into_iter().map(|(k, name)| (new(k), name)).collect();
                run = numbered(&order)?;
            }
        }
    }
    Ok(())
}

/// Edits the corrections at random, and `seen` as a person expects.
fn edit(
    random: &mut StdRng,
    corrections: &mut Corrections,
    seen: &mut Seen,
    run: &ClusteredPictures,
    step: usize,
) -> Result<()> {
    let shown_as = corrections.resolve(run).shown_as;
    let full: Vec<u32> =
        run.assignment.iter().copied().collect::<BTreeSet<_>>().into_iter().collect();
    let shown: Vec<u32> =
        full.iter().map(|&k| shown_as[k as usize]).collect::<BTreeSet<_>>().into_iter().collect();
    let cluster = *full.choose(random).expect("a cluster");
    let to = shown_as[cluster as usize];
    let some: Vec<u32> = (0..run.len() as u32).filter(|_| random.random_bool(0.1)).collect();
    let put = |seen: &mut Seen, membership: Membership| {
        for place in some.iter().flat_map(|&place| run.places_of(&run.ids[place as usize])) {
            seen.memberships[*place as usize] = membership;
        }
    };
    match random.random_range(0..5) {
        0 => {
            let name = format!("name {step}");
            corrections.rename(run, cluster, Some(&name))?;
            seen.names.insert(to, name);
        }
        1 if shown.len() > 1 => {
            let mut two = shown.clone();
            two.shuffle(random);
            corrections.merge(run, &two[..2])?;
            let gone = seen.names.remove(&two[1]);
            seen.names.extend(
                gone.filter(|_| !seen.names.contains_key(&two[0])).map(|name| (two[0], name)),
            );
            for membership in &mut seen.memberships {
                if *membership == Membership::Cluster(two[1]) {
                    *membership = Membership::Cluster(two[0]);
                }
            }
        }
        2 => {
            corrections.mark(run, &some, PictureMark::Outlier)?;
            put(seen, Membership::Marked(PictureMark::Outlier));
        }
        3 => {
            corrections.unmark(run, &some)?;
            for &place in some.iter().flat_map(|&place| run.places_of(&run.ids[place as usize])) {
                let own = run.assignment[place as usize];
                seen.memberships[place as usize] = Membership::Cluster(shown_as[own as usize]);
            }
        }
        _ => {
            corrections.move_pictures(run, &some, cluster)?;
            put(seen, Membership::Cluster(to));
        }
    }
    Ok(())
}
