//! The same pictures in every container: one set of pictures, labels and files left out.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::Config;
use crate::example::{
    assert_has, config, jpeg, prepare, put, refusal, scratch, tar_of, zip, zip_from,
};

fn path(name: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(name))
}

#[test]
fn names_in_any_code_page_lose_no_picture_and_no_class() {
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
    // A class can be chosen by its rendered name, and a folder of an archive by its bytes or that.
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
