//! Tests that every container gives the same pictures, labels and skipped files.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::example::{
    PreparedFiles, assert_has, config, encoded, gzip, jpeg, parquet, png, prepare, put, refusal,
    scratch, tar, tar_of, zip, zip_from,
};
use crate::{Config, Format, names};

fn path(name: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(name))
}

fn lenient() -> Config {
    Config { broken_share: 0.9, ..config() }
}

/// Pseudo-random numbers from a seed: SplitMix64.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ z >> 31) % bound as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for at in (1..items.len()).rev() {
            items.swap(at, self.below(at + 1));
        }
    }

    fn pick<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.below(items.len())]
    }
}

/// A file of a tree: its path, its class if it is a picture, sound or broken, and its bytes.
struct Leaf {
    path: Vec<u8>,
    class: Option<Vec<u8>>,
    bytes: Vec<u8>,
}

/// A tree of class folders: odd names, pictures of each format, one nested too deep,
/// broken ones, duplicates, annotations, and files that operating systems create.
fn tree(numbers: &mut Numbers) -> Vec<Leaf> {
    let mut classes: Vec<&[u8]> = vec![
        b"cat",
        "Vögel".as_bytes(),
        b"V\xf6gel",
        b"V\xe4gel",
        b"a.b c",
        b"n02085936",
        br"\xF6",
        b"=1, \"2\"",
    ];
    numbers.shuffle(&mut classes);
    classes.truncate(2 + numbers.below(4));
    let mut leaves = Vec::new();
    let mut add = |folder: &[u8], name: &[u8], class: Option<&[u8]>, bytes: Vec<u8>| {
        let path = [folder, b"/", name].concat();
        leaves.push(Leaf { path, class: class.map(<[u8]>::to_vec), bytes });
    };
    let mut seed = 0;
    for class in &classes {
        let names: [&[u8]; 7] = [
            b"1.jpg",
            b"v1.0_x.PNG",
            b"v1.1_x.png",
            b"\xe9t\xe9.jpg",
            b"\xe8t\xe8.jpg",
            b"no point",
            b"-a.webp",
        ];
        for name in &names[..2 + numbers.below(names.len() - 2)] {
            seed += 1;
            // Some pictures have the bytes of an earlier one.
            let content = if seed > 3 && numbers.below(6) == 0 { 2 } else { seed };
            let bytes = match numbers.below(3) {
                0 => jpeg(content),
                1 => png(content),
                _ => encoded(&crate::example::colour(content), image::ImageFormat::WebP),
            };
            add(class, name, Some(class), bytes);
        }
        if numbers.below(2) == 0 {
            seed += 1;
            add(&[*class, b"/images"].concat(), b"deep.jpg", Some(class), jpeg(seed));
        }
        if numbers.below(3) == 0 {
            add(class, b"broken.jpg", Some(class), b"no picture".to_vec());
        }
        if numbers.below(2) == 0 {
            let hidden =
                numbers.pick(&[".git", ".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle"]);
            let folder = [*class, b"/", hidden.as_bytes()].concat();
            add(&folder, b"1.jpg", None, jpeg(200));
            add(&folder, b"2.jpg", None, jpeg(201));
        }
        for (name, text) in
            [(&b"1.json"[..], "{}"), (b"notes/deep/list.txt", "x"), (b"._1.jpg", "x")]
        {
            if numbers.below(3) == 0 {
                add(class, name, None, text.as_bytes().to_vec());
            }
        }
    }
    add(b".", b"README", None, b"about".to_vec());
    add(b"__MACOSX/cat", b"._1.jpg", None, b"fork".to_vec());
    leaves.iter_mut().for_each(|leaf| {
        if let Some(path) = leaf.path.strip_prefix(b"./") {
            leaf.path = path.to_vec();
        }
    });
    leaves
}

/// The content that must not depend on the container. The classes of identical pictures may be
/// swapped.
#[derive(Debug, PartialEq)]
struct Content {
    images: Vec<u8>,
    classes: Vec<(data::images::Id, Option<String>)>,
    class_names: Vec<String>,
    broken: Vec<String>,
    identical: usize,
}

fn content(read: &PreparedFiles) -> Content {
    let ids = (0..read.names.len() as u32).map(|row| read.images.id(row).expect("a row"));
    let mut classes: Vec<_> = ids.zip(read.classes.iter().cloned()).collect();
    classes.sort();
    let mut broken: Vec<String> = read.skipped("broken").into_iter().map(|(_, why)| why).collect();
    broken.sort();
    Content {
        images: read.bytes.clone(),
        classes,
        class_names: read.class_names.clone(),
        broken,
        identical: read.skipped("identical").len(),
    }
}

/// WebDataset shards: each picture has its own key, with a file of its class beside it.
fn shards(leaves: &[Leaf], numbers: &mut Numbers) -> [Vec<u8>; 2] {
    let mut shards = [Vec::new(), Vec::new()];
    for (number, leaf) in leaves.iter().enumerate() {
        let Some(class) = &leaf.class else { continue };
        let key = numbers.pick(&["", "IMG.", "v1.0_", "part/"]);
        let shard = &mut shards[number % 2];
        shard.push((format!("{key}{number:03}.jpg"), leaf.bytes.clone()));
        if numbers.below(2) == 0 || class.iter().any(|byte| !byte.is_ascii()) {
            shard.push((format!("{key}{number:03}.cls"), class.clone()));
        } else {
            let json = serde_json::json!({ "label": names::text(class) });
            shard.push((format!("{key}{number:03}.json"), json.to_string().into_bytes()));
        }
    }
    shards.map(|mut files| {
        numbers.shuffle(&mut files);
        tar(&files.iter().map(|(name, bytes)| (&**name, &**bytes)).collect::<Vec<_>>())
    })
}

#[test]
fn a_random_tree_is_one_data_set_in_every_container() {
    for seed in 0..16 {
        let numbers = &mut Numbers(seed);
        let mut leaves = tree(numbers);
        let (_folder, at) = scratch();
        for leaf in &leaves {
            put(&at.join("folder").join(path(&leaf.path)), &leaf.bytes);
        }
        let folder = prepare(&at.join("folder"), &lenient()).expect("sound");
        let pictures = leaves.iter().filter(|leaf| leaf.class.is_some()).count();
        assert_eq!(folder.names.len() + folder.skipped("broken").len(), pictures, "seed {seed}");
        let classes: BTreeSet<_> = leaves.iter().filter_map(|leaf| leaf.class.as_ref()).collect();
        let classes: BTreeSet<String> = classes.iter().map(|class| names::text(class)).collect();
        assert_eq!(folder.class_names.iter().cloned().collect::<BTreeSet<_>>(), classes);

        // Archives keep names.
        numbers.shuffle(&mut leaves);
        let tar_file =
            tar_of(&leaves.iter().map(|l| (path(&l.path), &*l.bytes)).collect::<Vec<_>>());
        put(&at.join("x.tar"), &tar_file);
        put(&at.join("x.tgz"), &gzip(&tar_file));
        let entries: Vec<_> = leaves.iter().map(|leaf| (&*leaf.path, &*leaf.bytes)).collect();
        put(&at.join("unix.zip"), &zip_from(3, 0, &entries));
        for source in ["x.tar", "x.tgz", "unix.zip"] {
            let read = prepare(&at.join(source), &lenient()).expect("sound");
            assert_eq!(content(&read), content(&folder), "seed {seed}: {source}");
            assert_eq!(read.names.iter().collect::<BTreeSet<_>>(), folder.names.iter().collect());
            for list in ["broken", "ignored"] {
                assert_eq!(read.skipped(list), folder.skipped(list), "seed {seed}: {source}");
            }
        }

        // The other containers give each picture a new name.
        let labelled = || leaves.iter().filter_map(|l| Some((names::text(l.class.as_ref()?), l)));
        let [first, second] = shards(&leaves, numbers);
        put(&at.join("shards/0.tar"), &first);
        put(&at.join("shards/1.tar"), &second);
        let mut manifest = csv::Writer::from_path(at.join("m.csv")).expect("created");
        manifest.write_record(["label", "file"]).expect("written");
        let mut indices: Vec<String> = labelled().map(|(class, _)| class).collect();
        indices.sort();
        indices.dedup();
        let mut rows: Vec<(String, &[u8], i64)> = Vec::new();
        for (number, (class, leaf)) in labelled().enumerate() {
            let name = format!("m/{number}");
            put(&at.join(&name), &leaf.bytes);
            manifest.write_record([&class, &name]).expect("written");
            let index = indices.iter().position(|other| *other == class).expect("there");
            rows.push((name, &leaf.bytes, index as i64));
        }
        manifest.flush().expect("written");
        let names: Vec<&str> = indices.iter().map(String::as_str).collect();
        let rows: Vec<_> =
            rows.iter().map(|(name, bytes, class)| (&**name, *bytes, *class)).collect();
        put(&at.join("x.parquet"), &parquet(&rows, &names));
        for source in ["shards", "m.csv", "x.parquet"] {
            let read = prepare(&at.join(source), &lenient()).expect("sound");
            assert_eq!(content(&read), content(&folder), "seed {seed}: {source}");
        }
    }
}

/// Files of these names: a different picture each, but names that end in `.cls` or `.json` get the
/// text after a `=`.
fn files(names: &[&str]) -> Vec<(String, Vec<u8>)> {
    let file = |(number, name): (usize, &&str)| match name.split_once('=') {
        Some((name, text)) => (name.to_owned(), text.as_bytes().to_vec()),
        None => ((*name).to_owned(), jpeg(number)),
    };
    names.iter().enumerate().map(file).collect()
}

fn borrowed(files: &[(String, Vec<u8>)]) -> Vec<(&str, &[u8])> {
    files.iter().map(|(name, bytes)| (&**name, &**bytes)).collect()
}

/// Prepares these files in a tar archive.
fn in_tar(names: &[&str], config: &Config) -> PreparedFiles {
    let (_folder, at) = scratch();
    put(&at.join("x.tar"), &tar(&borrowed(&files(names))));
    prepare(&at.join("x.tar"), config).unwrap_or_else(|error| panic!("{names:?}: {error:#}"))
}

/// The error message for these files in a tar archive.
fn refused_in_tar(names: &[&str]) -> String {
    let (_folder, at) = scratch();
    put(&at.join("x.tar"), &tar(&borrowed(&files(names))));
    refusal(&at.join("x.tar"), &config())
}

#[test]
fn no_picture_or_class_is_lost_to_names_in_any_code_page() {
    let (_folder, at) = scratch();
    // Vögel in code page 437, 图 in GBK, 表 in Shift-JIS, whose second byte is that of `\`.
    let windows: [&[u8]; 6] = [
        b"V\x94gel/1.jpg",
        b"V\x84gel/1.jpg",
        b"\xcd\xbc/1.jpg",
        b"\x95\x5c/1.jpg",
        b"a\\1.jpg",
        b"\x95\x5cb/\x95\x5c.jpg",
    ];
    let pictures: Vec<Vec<u8>> = (0..windows.len()).map(jpeg).collect();
    let entries: Vec<_> = windows.iter().zip(&pictures).map(|(n, b)| (*n, &**b)).collect();
    put(&at.join("windows.zip"), &zip_from(0, 0, &entries));
    let read = prepare(&at.join("windows.zip"), &config()).expect("sound");
    assert_eq!(read.class_names.len(), 6);
    assert_eq!(read.class("Vögel/1.jpg"), Some("Vögel"));
    assert_eq!(read.class("Vägel/1.jpg"), Some("Vägel"));
    assert_eq!(read.class("a/1.jpg"), Some("a"));
    assert_eq!(read.class(r"ò\b/ò\.jpg"), Some(r"ò\b"));
    assert!(read.skipped("ignored").is_empty());

    let utf8: [(&[u8], &[u8]); 2] =
        [("Vögel/1.jpg".as_bytes(), &pictures[0]), ("Hündin/1.jpg".as_bytes(), &pictures[1])];
    for (host, flags) in [(0, 1 << 11), (3, 0), (19, 0), (3, 1 << 11)] {
        put(&at.join("utf-8.zip"), &zip_from(host, flags, &utf8));
        let read = prepare(&at.join("utf-8.zip"), &config()).expect("sound");
        assert_eq!(read.class_names, ["Hündin", "Vögel"], "made on {host} with {flags}");
    }

    let latin: [&[u8]; 4] =
        [b"V\xf6gel/\xe9.jpg", b"V\xf6gel/\xe8.jpg", b"V\xe4gel/\xe9.jpg", b"a\\b/1.jpg"];
    let entries: Vec<_> = latin.iter().zip(&pictures).map(|(n, b)| (path(n), &**b)).collect();
    put(&at.join("latin.tar"), &tar_of(&entries));
    let entries: Vec<_> = latin.iter().zip(&pictures).map(|(n, b)| (*n, &**b)).collect();
    put(&at.join("latin.zip"), &zip_from(3, 0, &entries));
    for (name, bytes) in &entries {
        put(&at.join("latin").join(path(name)), bytes);
    }
    let folder = prepare(&at.join("latin"), &config()).expect("sound");
    assert_eq!(folder.class_names, [r"V\xE4gel", r"V\xF6gel", r"a\b"]);
    assert_eq!(folder.class(r"V\xF6gel/\xE9.jpg"), Some(r"V\xF6gel"));
    for source in ["latin.tar", "latin.zip"] {
        let read = prepare(&at.join(source), &config()).expect("sound");
        assert_eq!((read.names, read.classes), (folder.names.clone(), folder.classes.clone()));
    }
    let deeper: (&[u8], &[u8]) = (b"V\xf6gel/\xff/\xe9.jpg", &pictures[4]);
    put(&at.join("latin").join(path(deeper.0)), deeper.1);
    let deep = [&entries[..], &[deeper]].concat();
    let in_tar: Vec<_> = deep.iter().map(|(name, bytes)| (path(name), *bytes)).collect();
    put(&at.join("deep.tar"), &tar_of(&in_tar));
    put(&at.join("deep.zip"), &zip_from(3, 0, &deep));
    let photos = Config { format: Format::Photos, ..config() };
    let folder = prepare(&at.join("latin"), &photos).expect("sound");
    assert_eq!((folder.names.len(), folder.class(r"V\xF6gel/\xFF/\xE9.jpg")), (5, None));
    for source in ["deep.tar", "deep.zip"] {
        let read = prepare(&at.join(source), &photos).expect("sound");
        assert_eq!((read.names, read.classes), (folder.names.clone(), folder.classes.clone()));
    }
    // A class is chosen by its rendered name, a folder of an archive by its bytes or rendered name.
    let some = [r"V\xE4gel", r"V\xF6gel"].map(String::from).to_vec();
    let chosen = prepare(&at.join("latin.tar"), &Config { classes: some, ..config() });
    assert_eq!(chosen.expect("sound").names.len(), 3);
    let below: [(&[u8], &[u8]); 2] =
        [(b"d\xe9/a/1.jpg", &pictures[0]), (b"d\xe9/b/2.jpg", &pictures[1])];
    put(&at.join("deep.tar"), &tar_of(&below.map(|(name, bytes)| (path(name), bytes))));
    for within in [&b"deep.tar#d\xe9"[..], br"deep.tar#d\xE9"] {
        assert_eq!(
            prepare(&at.join(path(within)), &config()).expect("there").class_names,
            ["a", "b"]
        );
    }
}

#[test]
fn the_path_of_a_source_need_not_be_utf_8() {
    let (_folder, at) = scratch();
    let (one, two) = (jpeg(1), jpeg(2));
    for name in [&b"d\xe9r"[..], b"d\xe8r"] {
        put(&at.join(path(name)).join("a/1.jpg"), &one);
        put(&at.join(path(name)).join("b/2.jpg"), &two);
        assert_eq!(prepare(&at.join(path(name)), &config()).expect("sound").names.len(), 2);
    }
    let archive = zip(&[("top/a/1.jpg", &one), ("top/b/2.jpg", &two)]);
    put(&at.join(path(b"\xe9.zip")), &archive);
    for source in [&b"\xe9.zip"[..], b"\xe9.zip#top", b"\xe9*"] {
        assert_eq!(prepare(&at.join(path(source)), &config()).expect("sound").names.len(), 2);
    }
    assert_has(&refusal(&at.join(path(b"\xff\x1b")), &config()), &[r"\xFF\x1B", "--source"]);
}

#[test]
fn keys_with_points_and_samples_of_several_pictures_are_read() {
    let dotted = [
        "IMG.0.jpg",
        "IMG.0.cls=a",
        "IMG.1.jpg",
        "IMG.1.cls=b",
        "v1.0_x.jpg",
        "v1.0_x.cls=a",
        "2.jpg",
        "2.cls=b",
    ];
    let read = in_tar(&dotted, &config());
    assert_eq!(read.names.len(), 4);
    for (name, class) in
        [("IMG.0.jpg", "a"), ("IMG.1.jpg", "b"), ("v1.0_x.jpg", "a"), ("2.jpg", "b")]
    {
        assert_eq!(read.class(name), Some(class));
    }
    let several = [
        "0.depth.png",
        "0.jpg",
        "0.cls=a",
        "1.left.jpg",
        "1.right.jpg",
        "1.cls=b",
        "2.jpg",
        "2.txt=caption",
    ];
    let read = in_tar(&several, &config());
    let names: BTreeSet<&str> = read.names.iter().map(String::as_str).collect();
    assert_eq!(names, ["0.jpg", "1.left.jpg", "2.jpg"].into());
    assert_eq!((read.class("1.left.jpg"), read.class("2.jpg")), (Some("b"), None));
    let ignored = read.skipped("ignored");
    let reason = |key| format!("is a further picture of the sample `{key}`");
    assert_eq!(ignored[0], ("0.depth.png".into(), reason(0)));
    assert_eq!(ignored[1], ("1.right.jpg".into(), reason(1)));
    assert_eq!(ignored[2], ("2.txt".into(), "is not a picture".into()));
    assert_eq!(ignored.len(), 3);
}

#[test]
fn files_of_a_sample_may_lie_apart() {
    let apart: Vec<String> = (0..12)
        .map(|n| format!("{n}.jpg"))
        .chain((0..12).map(|n| format!("{n}.cls={}", n % 2)))
        .collect();
    let mut names: Vec<&str> = apart.iter().map(String::as_str).collect();
    for seed in 0..6 {
        let (_folder, at) = scratch();
        put(&at.join("x.tar"), &tar(&borrowed(&files(&names))));
        let read = prepare(&at.join("x.tar"), &config()).expect("sound");
        assert_eq!(read.names.len(), 12);
        for n in 0..12 {
            assert_eq!(read.class(&format!("{n}.jpg")), Some(["0", "1"][n % 2]), "seed {seed}");
        }
        Numbers(seed).shuffle(&mut names);
    }
    let read = in_tar(&["0.jpg", "0.cls=a", "1.jpg", "1.cls=b", "9.cls=a"], &config());
    assert_eq!(read.skipped("ignored"), [("9.cls".into(), "is a label without a picture".into())]);

    // Too far apart to be recognised: an error, unless the experiment states the format.
    let pictures: Vec<String> = (0..5000).map(|n| format!("{n}.jpg=x")).collect();
    let mut names: Vec<&str> = pictures.iter().map(String::as_str).collect();
    names.extend(["0.cls=a", "1.cls=b"]);
    let (_folder, at) = scratch();
    let mut entries = files(&names);
    for (number, entry) in entries.iter_mut().take(2).enumerate() {
        entry.1 = jpeg(number);
    }
    put(&at.join("x.tar"), &tar(&borrowed(&entries)));
    let lenient = Config { broken_share: 0.9999, ..config() };
    assert_has(
        &refusal(&at.join("x.tar"), &lenient),
        &["`0.cls`", "tar --sort=name", "webdataset"],
    );
    let read = prepare(&at.join("x.tar"), &Config { format: Format::WebDataset, ..lenient });
    assert_eq!(read.expect("sound").class("1.jpg"), Some("b"));
}

#[test]
fn annotations_beside_pictures_do_not_change_class_folders() {
    let labelme =
        ["cat/0.jpg", "cat/0.json={}", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg", "dog/1.json={}"];
    let with_label =
        ["cat/0.jpg", "cat/0.json={\"label\":\"x\"}", "cat/1.jpg", "dog/0.jpg", "dog/1.jpg"];
    for names in [&labelme[..], &with_label] {
        let (_folder, at) = scratch();
        let files = files(names);
        for (name, bytes) in &files {
            put(&at.join("folder").join(name), bytes);
        }
        put(&at.join("x.tar"), &tar(&borrowed(&files)));
        put(&at.join("x.zip"), &zip(&borrowed(&files)));
        let folder = prepare(&at.join("folder"), &config()).expect("sound");
        assert_eq!(folder.class_names, ["cat", "dog"]);
        for source in ["x.tar", "x.zip"] {
            let read = prepare(&at.join(source), &config()).expect("sound");
            assert_eq!((read.names, read.classes), (folder.names.clone(), folder.classes.clone()));
            assert_eq!(read.skipped, folder.skipped);
        }
    }
    // Without class folders, a label in such a file is the class; `.cls` always is.
    for names in [
        ["0.jpg", "0.json={\"label\":\"a\"}", "1.jpg", "1.json={\"label\":\"b\"}"],
        [
            "train/0.jpg",
            "train/0.json={\"label\":\"a\"}",
            "train/1.jpg",
            "train/1.json={\"cls\":\"b\"}",
        ],
        ["00/0.jpg", "00/0.cls=a", "01/1.jpg", "01/1.cls=b"],
    ] {
        assert_eq!(in_tar(&names, &config()).class_names, ["a", "b"], "{names:?}");
    }
}

#[test]
fn label_minus_one_means_unknown_in_every_container() {
    let (_folder, at) = scratch();
    let pictures: Vec<Vec<u8>> = (0..4).map(png).collect();
    let labels = [0, 1, -1, -1];
    let rows: Vec<_> =
        pictures.iter().zip(labels).map(|(file, label)| ("x", &**file, label)).collect();
    put(&at.join("x.parquet"), &parquet(&rows, &["a", "b"]));
    put(&at.join("numbers.parquet"), &parquet(&rows, &[]));
    put(&at.join("test.parquet"), &parquet(&rows[2..], &["a", "b"]));
    let mut manifest = "path,label\n".to_owned();
    let mut samples = Vec::new();
    for (number, (file, label)) in pictures.iter().zip(labels).enumerate() {
        put(&at.join(format!("{number}.png")), file);
        manifest += &format!("{number}.png,{label}\n");
        samples.push((format!("{number}.png"), file.clone()));
        samples.push(match number % 2 {
            0 => (format!("{number}.cls"), format!("{label}\n").into_bytes()),
            _ => (format!("{number}.json"), format!("{{\"label\": {label}}}").into_bytes()),
        });
    }
    put(&at.join("x.csv"), manifest.as_bytes());
    put(&at.join("x.tar"), &tar(&borrowed(&samples)));
    put(&at.join("test.tar"), &tar(&borrowed(&samples[4..])));
    for source in ["x.parquet", "numbers.parquet", "x.csv", "x.tar"] {
        let read = prepare(&at.join(source), &config()).expect("sound");
        assert_eq!(read.class_names.len(), 2, "{source}: {:?}", read.class_names);
        assert_eq!(read.classes.iter().filter(|class| class.is_none()).count(), 2, "{source}");
    }
    for source in ["test.parquet", "test.tar"] {
        let read = prepare(&at.join(source), &config()).expect("sound");
        assert_eq!((read.names.len(), read.class_names.len()), (2, 0), "{source}");
    }
}

#[test]
fn files_of_one_name_in_several_folders_are_kept_apart() {
    let (_folder, at) = scratch();
    for (number, split) in ["train", "test"].iter().enumerate() {
        let (one, two) = (png(2 * number), png(2 * number + 1));
        put(
            &at.join("p").join(split).join("0.parquet"),
            &parquet(&[("x", &one, 0), ("x", &two, 1)], &["a", "b"]),
        );
        let samples: [(&str, &[u8]); 4] =
            [("0.png", &one), ("0.cls", b"a"), ("1.png", &two), ("1.cls", b"b")];
        put(&at.join("s").join(split).join("0.tar"), &tar(&samples));
    }
    for (folder, file) in [("p", "0.parquet"), ("s", "0.tar")] {
        let paths = ["train", "test"].map(|split| at.join(folder).join(split).join(file));
        let local = crate::location::Local { paths: paths.to_vec(), within: String::new() };
        let out = at.join("out").join(folder);
        let source = crate::source::PictureSource::recognise(&local, &config()).expect("sound");
        let options = crate::Options::default();
        let (config, out) = (config(), &*out);
        let mut collection =
            crate::collection::Collection::open(&config, &options, out, "", 0).expect("opened");
        source.read(&local, &config, &mut collection).expect("sound");
        assert_eq!(collection.finish().expect("sound").images, 4);
        let read = crate::example::open(out);
        assert_eq!(read.images.rows(&[stage::Split::Test]).len(), 2, "{folder}");
        assert!(read.skipped("ignored").is_empty(), "{:?}", read.names);
    }
    // Nor in the archive of a class.
    let (one, two, other) = (png(1), png(2), png(3));
    let inner = tar(&[("x/1.png", &one), ("y/1.png", &two)]);
    put(
        &at.join("of-archives.tar"),
        &tar(&[("a.tar", &inner), ("b.tar", &tar(&[("1.png", &other)]))]),
    );
    let read = prepare(&at.join("of-archives.tar"), &config()).expect("sound");
    assert_eq!(read.class("a/x/1.png"), Some("a"));
    assert_eq!(read.names.len(), 3);
}

#[test]
fn archives_with_class_folders_at_several_levels_are_refused_with_a_folder_to_use() {
    let cases: [(&[&str], &[&str]); 7] = [
        (
            &["preview.png", "data/cat/1.jpg", "data/dog/2.jpg"],
            &["`preview.png` in no folder", "x.tar#data`"],
        ),
        (
            &["data/cat/1.jpg", "data/dog/2.jpg", "preview.png"],
            &["`preview.png` in no folder", "x.tar#data`"],
        ),
        (
            &["cover.jpg", "cat/1.jpg", "dog/2.jpg"],
            &["`cover.jpg` in no folder", "`cat/1.jpg` in `cat`", "pack the archive again"],
        ),
        (&["a/1.jpg", "a/more/2.jpg"], &["`a/more/2.jpg` in `a/more`", "pack the archive again"]),
        (&["top/flat/1.jpg", "top/set/a/1.jpg", "top/set/b/1.jpg"], &["x.tar#top/set`"]),
        (
            &["/photos/cat/0.jpg", "/photos/dog/0.jpg"],
            &["`/photos/cat/0.jpg` has a name that leads out", "unpack the archive"],
        ),
        (&[".trash/1.jpg"], &["`.trash` is hidden"]),
    ];
    for (names, parts) in cases {
        let mut archive = tar::Builder::new(Vec::new());
        for (name, bytes) in files(names) {
            let mut header = tar::Header::new_gnu();
            header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_size(bytes.len() as u64);
            header.set_cksum();
            archive.append(&header, &*bytes).expect("added");
        }
        let (_folder, at) = scratch();
        put(&at.join("x.tar"), &archive.into_inner().expect("whole"));
        assert_has(&refusal(&at.join("x.tar"), &config()), parts);
    }
    // The suggested folder works.
    let (_folder, at) = scratch();
    let names = ["top/flat/1.jpg", "top/set/a/1.jpg", "top/set/b/1.jpg"];
    put(&at.join("x.tar"), &tar(&borrowed(&files(&names))));
    assert_eq!(prepare(&at.join("x.tar#top/set"), &config()).expect("sound").names.len(), 2);
    let missing = refusal(&at.join("x.tar#nosuch"), &config());
    assert_has(&missing, &["x.tar` has no folder `nosuch`", "`top/flat`, `top/set/a`"]);
    assert_has(&refused_in_tar(&["a/1.jpg", "a/2.jpg"]), &["one class only, `a`"]);
}

#[test]
fn hidden_and_system_folders_are_not_classes_in_any_container() {
    let names = [
        "cat/1.jpg",
        "dog/2.jpg",
        ".trash/3.jpg",
        "cat/.ipynb_checkpoints/4.jpg",
        "@eaDir/5.jpg/thumb.jpg",
        "cat/@eaDir/1.jpg/thumb.jpg",
        "__MACOSX/cat/._1.jpg",
        "dog/._2.jpg",
    ];
    let (_folder, at) = scratch();
    let files = files(&names);
    for (name, bytes) in &files {
        put(&at.join("folder").join(name), bytes);
    }
    put(&at.join("x.tar"), &tar(&borrowed(&files)));
    put(&at.join("x.zip"), &zip(&borrowed(&files)));
    for source in ["folder", "x.tar", "x.zip"] {
        let read = prepare(&at.join(source), &config()).expect("sound");
        assert_eq!(read.class_names, ["cat", "dog"], "{source}");
        let ignored = read.skipped("ignored");
        let names: Vec<&str> = ignored.iter().map(|(name, _)| name.as_str()).collect();
        let expected =
            [".trash", "@eaDir", "__MACOSX", "cat/.ipynb_checkpoints", "cat/@eaDir", "dog/._2.jpg"];
        assert_eq!(names, expected, "{source}");
    }
    // A flat folder of a server that makes thumbnails.
    put(&at.join("flat/0.jpg"), &jpeg(0));
    put(&at.join("flat/1.jpg"), &jpeg(1));
    put(&at.join("flat/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg"), &jpeg(2));
    assert_eq!(prepare(&at.join("flat"), &config()).expect("sound").names.len(), 2);
}

#[test]
fn files_that_are_not_part_of_a_data_set_are_listed() {
    let (_folder, at) = scratch();
    let (one, two) = (png(1), png(2));
    put(&at.join("p/train-0.parquet"), &parquet(&[("x", &one, 0), ("x", &two, 1)], &["a", "b"]));
    put(&at.join("p/README.md"), b"about");
    put(&at.join("p/.cache"), b"x");
    let read = prepare(&at.join("p"), &config()).expect("one Parquet file is enough");
    let listed = [(".cache", "is hidden"), ("README.md", "is not part of the data set")];
    assert_eq!(read.skipped("ignored"), listed.map(|(name, why)| (name.into(), why.into())));
    // It is ambiguous which of the two is the data set.
    put(&at.join("p/photo.jpg"), &one);
    assert_has(&refusal(&at.join("p"), &config()), &["train-0.parquet", "photo.jpg", "`format`"]);
    let only = Config { format: Format::Parquet, ..config() };
    assert_eq!(prepare(&at.join("p"), &only).expect("sound").names.len(), 2);
}

#[test]
fn one_picture_is_a_source_of_one_picture() {
    let (_folder, at) = scratch();
    put(&at.join("1.jpg"), &jpeg(1));
    put(&at.join("2.jpg"), &jpeg(2));
    put(&at.join("without"), &png(3));
    for name in ["1.jpg", "without"] {
        let read = prepare(&at.join(name), &config()).expect("one picture");
        assert_eq!((read.names, read.class_names.len()), (vec![name.to_owned()], 0));
    }
    assert_has(&refusal(&at.join("1.jpg#a"), &config()), &["is not an archive", "`a`"]);
}

#[test]
fn a_pattern_of_pictures_is_a_source_of_those_that_match() {
    let (_folder, at) = scratch();
    for name in ["a1.jpg", "a2.jpg", "b.jpg"] {
        put(&at.join(name), &jpeg(1));
    }
    put(&at.join("a3.txt"), b"about them");
    let read = prepare(&at.join("a*"), &config()).expect("two pictures and a text");
    assert_eq!(
        (read.names.clone(), read.class_names.len()),
        (vec!["a1.jpg".into(), "a2.jpg".into()], 0)
    );
    assert_eq!(read.skipped("ignored"), [("a3.txt".into(), "is not a picture".into())]);
}

#[test]
fn a_data_set_in_a_subfolder_is_suggested() {
    let (_folder, at) = scratch();
    put(&at.join("hub/data/train-0.parquet"), &parquet(&[("x", &png(1), 0)], &["a"]));
    put(&at.join("hub/README.md"), b"about");
    put(&at.join("root/MNIST/raw/train-images-idx3-ubyte"), b"x");
    put(&at.join("zips/a.zip"), b"x");
    for (folder, parts) in [
        ("hub", &["hub/data` holds `train-0.parquet`", "--source"][..]),
        ("root", &["root/MNIST/raw` holds `train-images-idx3-ubyte`"]),
        ("zips", &["it holds `a.zip`: pass that file"]),
    ] {
        assert_has(&refusal(&at.join(folder), &config()), parts);
    }
}

#[test]
fn links_in_a_circle_and_pipes_end_at_once() {
    let (_folder, at) = scratch();
    let photos = at.join("photos");
    put(&photos.join("1.jpg"), &jpeg(1));
    put(&photos.join("2.jpg"), &jpeg(2));
    for name in ["a", "b"] {
        std::os::unix::fs::symlink(".", photos.join(name)).expect("linked");
    }
    let read = prepare(&photos, &config()).expect("two pictures");
    let reason = "is a link to a folder that contains it".to_owned();
    assert_eq!(read.names.len(), 2);
    assert_eq!(
        read.skipped("ignored"),
        [("a".into(), reason.clone()), ("b".into(), reason.clone())]
    );
    // Two folders that link to each other within a class.
    put(&at.join("set/cat/1.jpg"), &jpeg(1));
    put(&at.join("set/dog/1.jpg"), &jpeg(2));
    for (from, to) in [
        ("../../more/y", "set/cat/x"),
        ("../y", "more/x/y"),
        ("../x", "more/y/x"),
        ("..", "set/dog/up"),
    ] {
        fs::create_dir_all(at.join(to).parent().expect("a folder")).expect("made");
        std::os::unix::fs::symlink(from, at.join(to)).expect("linked");
    }
    let read = prepare(&at.join("set"), &config()).expect("two pictures");
    let ignored = read.skipped("ignored");
    assert_eq!(
        ignored,
        [("cat/x".into(), "is a link to a folder".into()), ("dog/up".into(), reason)]
    );

    let pipe = at.join("pipe.tar");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("started");
    assert!(made.success());
    let socket = at.join("socket.tar");
    let _listener = std::os::unix::net::UnixListener::bind(&socket).expect("bound");
    for source in [&*pipe, &socket, Path::new("/dev/zero")] {
        assert_has(&refusal(source, &config()), &["neither a file nor a folder", "--source"]);
    }
}

#[test]
fn leftovers_of_a_kill_at_the_end_are_removed_by_the_next_run() {
    let (_folder, at) = scratch();
    put(&at.join("set/a/1.jpg"), &jpeg(1));
    put(&at.join("set/b/1.jpg"), &jpeg(2));
    let (source, out) = (at.join("set"), at.join("out"));
    let run = || crate::run(&config(), &source, &out, &crate::Options::default());
    run().expect("sound");
    let whole: BTreeSet<_> =
        fs::read_dir(&out).expect("there").map(|e| e.expect("entry").file_name()).collect();
    put(&out.join("unfinished/pictures"), b"x");
    put(&out.join(".unfinished-x"), b"x");
    run().expect("finished");
    let left: BTreeSet<_> =
        fs::read_dir(&out).expect("there").map(|e| e.expect("entry").file_name()).collect();
    assert_eq!(left, whole);
}

#[test]
fn a_data_set_prepared_again_has_the_same_mark_beside_the_files_of_others() {
    let (_folder, at) = scratch();
    put(&at.join("set/a/1.jpg"), &jpeg(1));
    put(&at.join("set/b/1.jpg"), &jpeg(2));
    let (source, out) = (at.join("set"), at.join("out"));
    let run = || crate::run(&config(), &source, &out, &crate::Options::default());
    run().expect("sound");
    let mark = fs::read(out.join(stage::DONE)).expect("there");
    for others in ["source.json", "images-decoded.safetensors"] {
        put(&out.join(others), b"x");
    }
    fs::remove_file(out.join(crate::NAMES)).expect("removed");
    run().expect("prepared again");
    assert_eq!(fs::read(out.join(stage::DONE)).expect("there"), mark);
}
