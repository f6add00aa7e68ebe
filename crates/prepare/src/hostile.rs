//! Tests with damaged, malformed and malicious sources.
//!
//! Pillow wrote the samples; the tests generate everything else.

use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

use flate2::Compression;
use flate2::write::DeflateEncoder;

use crate::collection::{Load, Sink};
use crate::example::{
    assert_has, config, encoded, gzip, jpeg, pixels, png, prepare, prepare_with, put, refusal,
    scratch, tar, zip, zip_from,
};
use crate::{Config, Options, packed};

/// A CMYK JPEG file of 16 x 8 pixels, all of them (0, 128, 255, 51).
const CMYK: &str = "ffd8ffee000e41646f626500640000000000ffdb0043000302020302020303030304030304050805050404050a\
     070706080c0a0c0c0b0a0b0b0d0e12100d0e110e0b0b1016101113141515150c0f171816141812141514ffc000\
     140800080010044311004d11005911004b1100ffc40017000101010100000000000000000000000000090208ff\
     c40014100100000000000000000000000000000000ffda000e0443004d0059004b00003f00aa6c2553b2c01fff\
     d9";

/// A progressive JPEG file of 16 x 8 pixels, all of them (200, 100, 50).
const PROGRESSIVE: &str = "ffd8ffe000104a46494600010100000100010000ffdb0043000302020302020303030304030304050805050404\
     050a070706080c0a0c0c0b0a0b0b0d0e12100d0e110e0b0b1016101113141515150c0f171816141812141514ff\
     db00430103040405040509050509140d0b0d141414141414141414141414141414141414141414141414141414\
     1414141414141414141414141414141414141414141414ffc20011080008001003011100021101031101ffc400\
     1500010100000000000000000000000000000003ffc400160101010100000000000000000000000000000607ff\
     da000c030100021003100000018c3e903fffc40014100100000000000000000000000000000010ffda00080101\
     000105023fffc40014110100000000000000000000000000000010ffda0008010301013f013fffc40014110100\
     000000000000000000000000000010ffda0008010201013f013fffc40014100100000000000000000000000000\
     000010ffda0008010100063f023fffc40014100100000000000000000000000000000010ffda0008010100013f\
     213fffda000c0301000200030000001093ffc40014110100000000000000000000000000000010ffda00080103\
     01013f103fffc40014110100000000000000000000000000000010ffda0008010201013f103fffc40014100100\
     000000000000000000000000000010ffda0008010100013f103fffd9";

/// Two frames of 6 x 4 pixels, lossless: the gradient, then one colour.
const ANIMATED_WEBP: &str = "52494646ba00000057454250565038580a00000002000000050000030000414e494d0600000000000000000041\
     4e4d465a000000000000000000050000030000640000025650384c420000002f05c00000bf40906d33a92add1f\
     e30866dab64db5dd3e0b0992c847ff8f30ce7f114a0160bfe700856d1ba9a9e37b6688e87f8084320e6aacf392\
     a5b61e7beefb03414e4d462c000000000000000000050000030000640000005650384c140000002f05c0000007\
     5081540820000a9afec78888fe07";

/// The same as an animated PNG.
const ANIMATED_PNG: &str = "89504e470d0a1a0a0000000d49484452000000060000000408020000002266d914000000086163544c00000002\
     00000000f38d93700000001a6663544c00000000000000060000000400000000000000000001000a000023c605\
     100000001a49444154789c636460885265e545462cdca6ecdcac2888382100a4f403a9aa690af60000001a6663\
     544c00000001000000060000000400000000000000000001000a0000b8b5efc400000018666441540000000278\
     9c636464626640054c0c18803821000336000e1e8319720000000049454e44ae426082";

/// A PNG with a palette of 16 colours.
const PALETTE: &str = "89504e470d0a1a0a0000000d49484452000000060000000404030000005f2a537000000030504c5445c8b6aa90\
     ae96cf83a959a783219f6f987c96c44ea2607482296d6f8d478fb9199b553f7b8212881e38684a0a7413036188\
     4ed5890000001949444154789c63fcfff61ecbbd3b775956bfbdcbe06cc80000513b0854a5733e5e0000000049\
     454e44ae426082";

/// A GIF file.
const GIF: &str = "47494638376106000400840000dab8b0b5b3a390ae96cf83a96ba98946a47c219f6faa7e9c85798fc44ea26074\
     823b6f75166a689f49957a4488b9199b553f7b94148e6f0f81303a6e0b35614a0a7425056700005a0000000000\
     000000000000000000000000000000000000002c000000000600040000081e002f58a82021c2030a1320386890\
     80c10205080e0c305080808000000202003b";

fn bytes(hex: &str) -> Vec<u8> {
    let digits: Vec<u8> =
        hex.chars().filter_map(|digit| digit.to_digit(16)).map(|digit| digit as u8).collect();
    digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect()
}

/// All samples with their names.
pub fn samples() -> [(&'static str, Vec<u8>); 6] {
    [
        ("jpeg-inks", CMYK),
        ("jpeg-progressive", PROGRESSIVE),
        ("webp-animated", ANIMATED_WEBP),
        ("png-animated", ANIMATED_PNG),
        ("png-palette", PALETTE),
        ("gif", GIF),
    ]
    .map(|(name, hex)| (name, bytes(hex)))
}

/// The gradient that the samples of 6 x 4 show.
fn gradient() -> Vec<u8> {
    (0..24)
        .flat_map(|at| {
            let (x, y) = (at % 6, at / 6);
            [x * 37 + y * 11, x * 5 + y * 53, 90 + x * 13 + y * 7]
        })
        .map(|value: u32| (value % 256) as u8)
        .collect()
}

fn half() -> Config {
    Config { broken_share: 0.9, ..config() }
}

#[test]
fn cmyk_palettes_sixteen_bits_and_first_frames_are_read() {
    let (_folder, path) = scratch();
    let grey16: image::ImageBuffer<image::Luma<u16>, Vec<u16>> =
        image::ImageBuffer::from_fn(3, 2, |x, y| image::Luma([(x * 20_000 + y * 300) as u16]));
    put(&path.join("cmyk.jpg"), &bytes(CMYK));
    put(&path.join("progressive.jpg"), &bytes(PROGRESSIVE));
    put(&path.join("animated.webp"), &bytes(ANIMATED_WEBP));
    put(&path.join("animated.png"), &bytes(ANIMATED_PNG));
    put(&path.join("palette.png"), &bytes(PALETTE));
    put(&path.join("grey16.png"), &encoded(&grey16.into(), image::ImageFormat::Png));
    // Names that do not match the format.
    put(&path.join("webp.jpg"), &bytes(ANIMATED_WEBP)[..]);
    put(&path.join("jpeg.png"), &jpeg(1));
    let read = prepare(&path, &config()).expect("sound");
    assert_eq!(read.names.len(), 8);
    assert_eq!(read.picture("animated.webp").pixels, gradient());
    assert_eq!(read.picture("animated.png").pixels, gradient());
    assert_eq!(read.picture("palette.png").pixels[..3], [19, 3, 97]);
    let inks = read.picture("cmyk.jpg");
    assert_eq!((inks.height, inks.width), (8, 16));
    for pixel in inks.pixels.chunks(3) {
        for (value, expected) in pixel.iter().zip([204, 102, 0]) {
            assert!(value.abs_diff(expected) < 6, "{pixel:?}");
        }
    }
    let progressive = read.picture("progressive.jpg");
    assert!(progressive.pixels.chunks(3).all(|p| p[0].abs_diff(200) < 6 && p[2].abs_diff(50) < 6));
    let grey = read.picture("grey16.png").pixels;
    assert_eq!(grey[..9], [0, 0, 0, 78, 78, 78, 156, 156, 156]);
}

#[test]
fn broken_pictures_are_listed_with_their_reasons() {
    let (_folder, path) = scratch();
    let webp = bytes(ANIMATED_WEBP);
    let whole = encoded(&crate::example::colour(3), image::ImageFormat::WebP);
    let cases: [(&str, Vec<u8>, &str); 9] = [
        ("cut.jpg", jpeg(0)[..200].to_vec(), "is broken"),
        ("cut.png", png(0)[..60].to_vec(), "is broken"),
        ("cut.webp", whole[..whole.len() - 9].to_vec(), "is broken"),
        ("cut-animation.webp", webp[..60].to_vec(), "is broken"),
        ("empty.png", vec![], "is empty"),
        ("moving.gif", bytes(GIF), "is a GIF picture: only JPEG, PNG and WebP are supported"),
        ("page.jpg", b"<!DOCTYPE html><title>Sign in</title>".to_vec(), "is a web page"),
        ("start.jpg", vec![0xff, 0xd8, 0xff], "its header has no size"),
        ("zeros.png", vec![0; 4000], "is neither"),
    ];
    for (name, bytes, _) in &cases {
        put(&path.join(name), bytes);
    }
    put(&path.join("sound.png"), &png(9));
    let read = prepare(&path, &Config { broken_share: 0.95, ..config() }).expect("one is sound");
    assert_eq!(read.names, ["sound.png"]);
    let broken = read.skipped("broken");
    assert_eq!(broken.len(), cases.len());
    for (name, _, reason) in &cases {
        let found = broken.iter().find(|(other, _)| other == name).expect(name);
        assert_has(&found.1, &[reason]);
    }
    assert_has(
        &refusal(&path, &Config { broken_share: 0.5, ..config() }),
        &["9 of 10 pictures cannot be read"],
    );
}

#[test]
fn pictures_that_would_take_too_much_memory_are_found_by_their_headers() {
    let (_folder, path) = scratch();
    let large = |height: u32, width: u32, format| {
        let raw = pixels(1, width as usize, 3, 1).repeat(height as usize);
        let picture = image::RgbImage::from_raw(width, height, raw).expect("fits");
        encoded(&picture.into(), format)
    };
    put(&path.join("fits.jpg"), &large(300, 400, image::ImageFormat::Jpeg));
    put(&path.join("fits.png"), &large(300, 400, image::ImageFormat::Png));
    for (name, format) in [
        ("large.jpg", image::ImageFormat::Jpeg),
        ("large.png", image::ImageFormat::Png),
        ("large.webp", image::ImageFormat::WebP),
    ] {
        put(&path.join(name), &large(1200, 1300, format));
    }
    let options = Options { memory: 16 << 20, ..Options::default() };
    let read = prepare_with(&path, &half(), &options).expect("two are sound");
    assert_eq!(read.names.len(), 2);
    let broken = read.skipped("broken");
    assert_eq!(broken.len(), 3);
    for (_, reason) in broken {
        assert_has(&reason, &["1200×1300 pixels", "MiB to decode", "--memory"]);
    }
    // 512 MiB is enough for the same pictures.
    assert_eq!(prepare(&path, &half()).expect("all").names.len(), 5);
}

/// Entry names that escape from an archive.
const ELSEWHERE: [&str; 5] =
    ["../up.png", "/etc/root.png", "a/../../up.png", "C:/drive.png", "b\\..\\..\\up.png"];

#[test]
fn a_zip_file_with_escaping_duplicate_or_false_entries_is_read_safely() {
    let (_folder, path) = scratch();
    let files: Vec<Vec<u8>> = (0..9).map(png).collect();
    let mut entries: Vec<(&str, &[u8])> = vec![("a/1.png", &files[0]), ("b/2.png", &files[1])];
    entries.extend(ELSEWHERE.iter().zip(&files[2..]).map(|(name, file)| (*name, &**file)));
    entries.push(("a/1.png", &files[8]));
    entries.push(("a/notes.txt", b"text"));
    entries.push(("a/", b""));
    let entries: Vec<_> = entries.iter().map(|(name, file)| (name.as_bytes(), *file)).collect();
    put(&path.join("x.zip"), &zip_from(0, 0, &entries));
    let read = prepare(&path.join("x.zip"), &config()).expect("sound");
    assert_eq!(read.names.len(), 2);
    assert_eq!(read.picture("a/1.png").pixels, pixels(4, 6, 3, 8), "the last counts");
    let ignored = read.skipped("ignored");
    assert_eq!(ignored.len(), 7);
    assert_eq!(ignored.iter().filter(|(_, reason)| reason.contains("leads out")).count(), 5);
    assert!(
        ignored.contains(&("a/1.png".into(), "occurs more than once: the last one counts".into()))
    );

    // An entry with a wrong length, a wrong CRC, encryption, an unknown method, or a link.
    let sound = zip(&[("a/1.png", &files[0]), ("b/2.png", &files[1]), ("b/3.png", &files[2])]);
    let entry = sound.windows(4).rposition(|w| w == b"PK\x01\x02").expect("the last entry");
    for (at, value, reason) in [
        (24, 1, "is damaged in the archive"),
        (16, 1, "is damaged in the archive"),
        (8, 1, "is encrypted"),
        (10, 99, "is compressed by method 99"),
        (41, 0xa0, "is a link"),
    ] {
        let mut changed = sound.clone();
        changed[entry + at] ^= value;
        put(&path.join("y.zip"), &changed);
        let read = prepare(&path.join("y.zip"), &half()).expect("two are sound");
        assert_eq!(read.names.len(), 2);
        let listed = [read.skipped("broken"), read.skipped("ignored")].concat();
        assert_has(&listed[0].1, &[reason]);
    }
    // Two entries at one offset, as in zip bombs of overlapping entries.
    let mut within = sound.clone();
    within.copy_within(entry - 53 + 42..entry - 53 + 46, entry + 42);
    put(&path.join("z.zip"), &within);
    assert_has(&refusal(&path.join("z.zip"), &half()), &["z.zip", "where its directory says"]);
    for cut in [sound.len() - 1, sound.len() - 30, entry, 10] {
        put(&path.join("cut.zip"), &sound[..cut]);
        assert_has(&refusal(&path.join("cut.zip"), &half()), &["cut.zip", "get it again"]);
    }
}

#[test]
fn decompression_bombs_are_not_held_in_memory() {
    let (_folder, path) = scratch();
    // 64 MiB and a little of zeros in 64 KiB.
    let zeros = vec![0; (64 << 20) + 9];
    let mut packed = DeflateEncoder::new(Vec::new(), Compression::best());
    packed.write_all(&zeros).expect("packed");
    let packed = packed.finish().expect("packed");
    let mut bomb = zip(&[("a/0.png", &packed), ("b/1.png", &png(1)), ("b/2.png", &png(2))]);
    let directory = bomb.windows(4).position(|w| w == b"PK\x01\x02").expect("the first entry");
    // Deflated, first with its true size stated, then with a small one.
    bomb[directory + 10] = 8;
    bomb[directory + 24..directory + 28].copy_from_slice(&(zeros.len() as u32).to_le_bytes());
    put(&path.join("bomb.zip"), &bomb);
    let read = prepare(&path.join("bomb.zip"), &half()).expect("two are sound");
    assert_has(&read.skipped("broken")[0].1, &["67108873 bytes, more than"]);
    bomb[directory + 24..directory + 28].copy_from_slice(&9u32.to_le_bytes());
    put(&path.join("liar.zip"), &bomb);
    let read = prepare(&path.join("liar.zip"), &half()).expect("two are sound");
    assert_has(&read.skipped("broken")[0].1, &["is damaged in the archive"]);

    let archive = tar(&[("a/0.png", &zeros), ("a/1.png", &png(1)), ("b/2.png", &png(2))]);
    put(&path.join("bomb.tar.gz"), &gzip(&archive));
    let read = prepare(&path.join("bomb.tar.gz"), &half()).expect("two are sound");
    assert_has(&read.skipped("broken")[0].1, &["67108873 bytes, more than"]);
}

#[test]
fn a_duplicate_name_in_a_tar_archive_counts_once() {
    let (_folder, path) = scratch();
    let files = [png(0), png(1), png(2), png(3)];
    let names = ["a/1.png", "b/2.png", "a/1.png", "./a/1.png"];
    let entries: Vec<(&str, &[u8])> = names.into_iter().zip(files.iter().map(|f| &**f)).collect();
    put(&path.join("x.tar"), &tar(&entries));
    let read = prepare(&path.join("x.tar"), &config()).expect("sound");
    assert_eq!(read.names.len(), 2);
    assert_eq!(read.picture("a/1.png").pixels, pixels(4, 6, 3, 3), "as unpacking leaves it");
    assert_eq!(read.skipped("ignored").len(), 2);
}

/// Counts the items that a reader passes on.
#[derive(Default)]
struct Counter {
    pictures: usize,
    ignored: usize,
}

impl Sink for Counter {
    fn wants(&mut self, _: &str) -> anyhow::Result<bool> {
        Ok(true)
    }

    fn is_known(&self) -> bool {
        false
    }

    fn file_bytes(&self) -> u64 {
        1 << 20
    }

    fn folder(&self) -> &Path {
        unreachable!("nothing is sorted")
    }

    fn picture(
        &mut self,
        _: String,
        _: Option<&str>,
        _: stage::Split,
        _: Load,
    ) -> anyhow::Result<()> {
        self.pictures += 1;
        Ok(())
    }

    fn ignored(&mut self, _: String, _: String) -> anyhow::Result<()> {
        self.ignored += 1;
        Ok(())
    }
}

#[test]
fn archives_of_many_entries_are_streamed() {
    let (_folder, path) = scratch();
    let names: Vec<String> = (0..20_000).map(|n| format!("{}/{n}.txt", n % 7)).collect();
    let mut entries: Vec<(&str, &[u8])> = names.iter().map(|n| (n.as_str(), &b"x"[..])).collect();
    let picture = png(0);
    entries.push(("1/x.png", &picture));
    for (name, bytes) in [("many.tar", tar(&entries)), ("many.zip", zip(&entries))] {
        put(&path.join(name), &bytes);
        let mut counter = Counter::default();
        packed::read_pictures(&path.join(name), "", &[], &mut counter).expect("sound");
        assert_eq!((counter.pictures, counter.ignored), (1, 20_000), "{name}");
    }
}

#[cfg(unix)]
#[test]
fn a_manifest_that_names_devices_or_nothing_lists_them_as_broken() {
    let (_folder, path) = scratch();
    put(&path.join("0.png"), &png(0));
    put(&path.join("m.csv"), b"path\n/dev/zero\n0.png\nmissing.png\n../\n");
    let read = prepare(&path.join("m.csv"), &half()).expect("one is sound");
    assert_eq!(read.names, ["0.png"]);
    let broken = read.skipped("broken");
    assert_has(&broken[0].1, &["is not a regular file"]);
    assert_has(&broken[1].1, &["is not a regular file"]);
    assert_has(&broken[2].1, &["cannot be read"]);
}

#[test]
fn too_many_classes_are_refused() {
    let (_folder, path) = scratch();
    let mut manifest = "path,label\n".to_owned();
    for number in 0..70_000 {
        manifest += &format!("{number}.png,label of {number}\n");
    }
    put(&path.join("m.csv"), manifest.as_bytes());
    assert_has(&refusal(&path.join("m.csv"), &config()), &["more than 65536 classes"]);
    assert!(!Path::new("0.png").exists());
}

/// Prepares `source` with an interruption after every `step` items, and resumes until it is whole.
fn in_steps(source: &Path, config: &Config, step: usize) -> (crate::example::PreparedFiles, usize) {
    let (_folder, out) = scratch();
    for interruptions in 0.. {
        let asked = AtomicUsize::new(0);
        let interrupted = || asked.fetch_add(1, Ordering::Relaxed) >= step * (interruptions + 1);
        let options = Options { interrupted: &interrupted, ..Options::default() };
        match crate::run(config, source, &out, &options) {
            Ok(()) => {
                assert!(!out.join("unfinished").exists());
                return (crate::example::open(&out), interruptions);
            }
            Err(error) => assert!(error.is::<stage::Interrupted>(), "{error:#}"),
        }
    }
    unreachable!("it becomes whole")
}

#[test]
fn an_interruption_loses_nothing_and_leaves_no_trace() {
    let (_folder, path) = scratch();
    let mut entries = Vec::new();
    for seed in 0..300 {
        let file = if seed % 11 == 5 { b"broken".to_vec() } else { png(seed % 250) };
        entries.push((format!("{}/{seed}.png", ["a", "b", "c"][seed % 3]), file));
        if seed % 17 == 0 {
            entries.push((format!("a/{seed}.txt"), b"text".to_vec()));
        }
    }
    for (name, bytes) in &entries {
        put(&path.join("folder").join(name), bytes);
    }
    let borrowed: Vec<(&str, &[u8])> = entries.iter().map(|(n, b)| (&**n, &**b)).collect();
    put(&path.join("x.tar"), &tar(&borrowed));
    put(&path.join("x.tar.gz"), &gzip(&tar(&borrowed)));
    put(&path.join("x.zip"), &zip(&borrowed));
    for source in ["folder", "x.tar", "x.tar.gz", "x.zip"] {
        let source = path.join(source);
        let whole = prepare(&source, &half()).expect("sound");
        let (read, interruptions) = in_steps(&source, &half(), 90);
        assert!(interruptions > 2, "{interruptions}");
        assert_eq!(read.bytes, whole.bytes);
        assert_eq!(read.names, whole.names);
        assert_eq!(read.classes, whole.classes);
        assert_eq!(read.skipped, whole.skipped);
    }
}

#[test]
fn a_source_that_changed_since_the_interruption_is_read_again() {
    let (_folder, path) = scratch();
    for seed in 0..200 {
        put(&path.join(format!("set/{}/{seed:03}.png", seed % 2)), &png(seed));
    }
    let out = path.join("out");
    let asked = AtomicUsize::new(0);
    let interrupted = || asked.fetch_add(1, Ordering::Relaxed) >= 150;
    let options = Options { interrupted: &interrupted, ..Options::default() };
    let source = path.join("set");
    crate::run(&config(), &source, &out, &options).expect_err("interrupted");
    assert!(out.join("unfinished/journal").exists());
    put(&source.join("0/000.png"), &jpeg(0));
    crate::run(&config(), &source, &out, &Options::default()).expect("read again");
    assert_eq!(crate::example::open(&out).bytes, prepare(&source, &config()).expect("sound").bytes);
}
