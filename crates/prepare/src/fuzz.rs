//! Feeds arbitrary bytes to every reader: the fuzz targets, and a test over their corpus.
//!
//! On any bytes, a reader may fail but must not panic or exceed its memory budget. `cargo test`
//! feeds every file of `fuzz/corpus` and a few thousand mutations of them.
//! `FUZZ_SECONDS=300 FUZZ_SEED=7 cargo test -p prepare --lib fuzz` mutates for that long per reader. With
//! cargo-fuzz and a nightly compiler, `cargo fuzz run tar` in `crates/prepare` searches further;
//! add what it finds to the corpus.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use stage::Split;

use crate::collection::{Load, Sink};
use crate::picture::{self, Budget, StoredForm};
use crate::{Format, cifar, idx, manifest, packed, parquet_file, stl, webdataset};

/// The readers, each with the name of its fuzz target and corpus folder.
pub const READERS: [(&str, FuzzReader); 9] = [
    ("cifar", cifar),
    ("idx", idx),
    ("manifest", manifest),
    ("parquet", parquet),
    ("picture", picture),
    ("stl", stl),
    ("tar", tar),
    ("webdataset", webdataset),
    ("zip", zip),
];

/// Feeds bytes to a reader. Its error is expected and ignored.
pub type FuzzReader = fn(&[u8]) -> Result<()>;

/// Grey as it is, colour reduced.
const FORMS: [StoredForm; 2] = [
    StoredForm { channels: 1, shorter_side: None },
    StoredForm { channels: 3, shorter_side: Some(2) },
];

/// Memory limit of a reader: 32 MiB.
const MEMORY: u64 = 1 << 25;

/// Decodes each picture and discards it.
struct Decoder {
    budget: Budget,
    folder: PathBuf,
}

impl Decoder {
    fn new(folder: &Path) -> Self {
        Self { budget: Budget::of(MEMORY), folder: folder.to_owned() }
    }
}

impl Sink for Decoder {
    fn wants(&mut self, class: &str) -> Result<bool> {
        Ok(class.len() % 5 != 4)
    }

    fn is_known(&self) -> bool {
        false
    }

    fn file_bytes(&self) -> u64 {
        self.budget.file_bytes()
    }

    fn folder(&self) -> &Path {
        &self.folder
    }

    fn picture(&mut self, _: String, _: Option<&str>, _: Split, load: Load) -> Result<()> {
        // A picture that cannot be decoded is not an error of the source. Paths in a manifest are
        // not opened: they could be any file of this machine.
        if let Load::Bytes(bytes) = load {
            let _ = picture::check(bytes, FORMS[1], &self.budget);
        }
        Ok(())
    }

    fn ignored(&mut self, _: String, _: String) -> Result<()> {
        Ok(())
    }
}

/// A folder with files of these names and bytes.
fn folder(files: &[(&str, &[u8])]) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes)?;
    }
    Ok(folder)
}

/// Writes the bytes to a file of this name and reads it.
fn fed(
    name: &str,
    bytes: &[u8],
    read: impl FnOnce(PathBuf, &mut Decoder) -> Result<()>,
) -> Result<()> {
    let folder = folder(&[(name, bytes)])?;
    read(folder.path().join(name), &mut Decoder::new(folder.path()))
}

/// Splits the bytes into two files: the length of the first as a little-endian u16, then both.
fn two(bytes: &[u8]) -> Result<(&[u8], &[u8])> {
    let (length, rest) = bytes.split_first_chunk().context("no length")?;
    rest.split_at_checked(u16::from_le_bytes(*length).into()).context("cut short")
}

/// Reads a tar archive of any kind.
pub fn tar(bytes: &[u8]) -> Result<()> {
    fed("x.tar", bytes, |path, sink| {
        let holds = packed::recognise(&path, "");
        packed::read_pictures(&path, "", &[], sink)?;
        packed::read_photos(&path, "", sink)?;
        packed::read_cifar(&path, "", Format::Auto, sink)?;
        packed::read_stl(&path, "", sink)?;
        holds.map(|_| ())
    })
}

/// Reads a zip file.
pub fn zip(bytes: &[u8]) -> Result<()> {
    fed("x.zip", bytes, |path, sink| {
        let holds = packed::recognise(&path, "");
        packed::read_pictures(&path, "", &[], sink)?;
        packed::read_photos(&path, "", sink)?;
        holds.map(|_| ())
    })
}

/// Reads a shard of WebDataset.
pub fn webdataset(bytes: &[u8]) -> Result<()> {
    fed("x.tar", bytes, |path, sink| webdataset::read(&[path], "", &[], sink))
}

/// Reads a Parquet file.
pub fn parquet(bytes: &[u8]) -> Result<()> {
    fed("x.parquet", bytes, |path, sink| parquet_file::read(&[path], Format::Auto, &[], sink))
}

/// Reads a manifest.
pub fn manifest(bytes: &[u8]) -> Result<()> {
    fed("x.csv", bytes, |path, sink| manifest::read(&path, &[], sink))
}

/// Reads a CIFAR-10 file and its list of class names.
pub fn cifar(bytes: &[u8]) -> Result<()> {
    let (names, records) = two(bytes)?;
    let folder = folder(&[("batches.meta.txt", names), ("data_batch_1.bin", records)])?;
    let files = cifar::find(folder.path())?;
    cifar::read(&files, Format::Auto, &mut Decoder::new(folder.path()))
}

/// Reads labels and pictures of STL-10.
pub fn stl(bytes: &[u8]) -> Result<()> {
    let (labels, pictures) = two(bytes)?;
    let folder = folder(&[("train_y.bin", labels), ("train_X.bin", pictures)])?;
    stl::read(&stl::find(folder.path())?, &mut Decoder::new(folder.path()))
}

/// Reads labels and pictures in IDX files.
pub fn idx(bytes: &[u8]) -> Result<()> {
    let (labels, pictures) = two(bytes)?;
    let files = [("train-labels-idx1-ubyte", labels), ("train-images-idx3-ubyte", pictures)];
    let folder = folder(&files)?;
    let pairs = idx::find(folder.path())?;
    pairs.iter().try_for_each(|pair| pair.read(&mut Decoder::new(folder.path())))
}

/// Decodes a picture.
pub fn picture(bytes: &[u8]) -> Result<()> {
    let budget = Budget::of(MEMORY);
    let checked = FORMS.map(|form| picture::check(bytes.to_vec(), form, &budget));
    checked.into_iter().try_for_each(|checked| checked.map(drop)).map_err(anyhow::Error::msg)?;
    Ok(())
}

/// The files of a reader's corpus, sorted.
pub fn corpus(reader: &str) -> Result<Vec<PathBuf>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(reader);
    let entries = fs::read_dir(&folder).with_context(|| format!("`{}`", folder.display()))?;
    let mut files: Vec<PathBuf> = entries.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    use std::panic::catch_unwind;
    use std::time::{Duration, Instant};

    use super::*;
    use crate::example;

    /// Pseudo-random numbers from a seed: SplitMix64.
    struct SplitMix(u64);

    impl SplitMix {
        fn next(&mut self, below: usize) -> usize {
            self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = self.0;
            z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ z >> 31) % below.max(1) as u64) as usize
        }
    }

    const EXTREMES: [u64; 8] =
        [0, 1, 0x7f, 0xff, 0x7fff_ffff, 0xffff_ffff, i64::MAX as u64, u64::MAX];

    /// Mutates, removes or inserts some bytes.
    fn change(bytes: &mut Vec<u8>, other: &[u8], numbers: &mut SplitMix) {
        for _ in 0..=numbers.next(4) {
            let at = numbers.next(bytes.len());
            let length = 1 + numbers.next(64);
            match numbers.next(7) {
                0 | 1 if !bytes.is_empty() => bytes[at] ^= 1 << numbers.next(8),
                2 if !bytes.is_empty() => bytes[at] = numbers.next(256) as u8,
                3 => {
                    let extreme = EXTREMES[numbers.next(EXTREMES.len())];
                    let (little, big) = (extreme.to_le_bytes(), extreme.to_be_bytes());
                    let size = 1 << numbers.next(4);
                    let value =
                        if numbers.next(2) == 0 { &little[..size] } else { &big[8 - size..] };
                    for (old, new) in bytes.iter_mut().skip(at).zip(value) {
                        *old = *new;
                    }
                }
                4 => bytes.truncate(at),
                5 => drop(bytes.drain(at..(at + length).min(bytes.len()))),
                _ if !other.is_empty() => {
                    let from = numbers.next(other.len());
                    let piece = &other[from..(from + length).min(other.len())];
                    bytes.splice(at..at, piece.iter().copied());
                }
                _ => {}
            }
        }
    }

    /// Corrects the checksums in the headers of a tar archive, so that the reader does not reject
    /// most mutations at once.
    fn mend_tar(bytes: &mut [u8]) {
        for block in bytes.chunks_exact_mut(512) {
            if &block[257..262] == b"ustar" {
                block[148..156].fill(b' ');
                let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
                block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            }
        }
    }

    /// Feeds the corpus and mutations of it, for this many seconds or a fixed number of inputs. Another seed
    /// gives other mutations.
    fn run(name: &str, reader: FuzzReader, seconds: Option<u64>, seed: u64) -> usize {
        let corpus: Vec<Vec<u8>> = corpus(name)
            .expect("a corpus")
            .iter()
            .map(|path| fs::read(path).expect("readable"))
            .collect();
        assert!(!corpus.is_empty(), "the corpus of {name} is empty");
        let begin = Instant::now();
        let mut numbers = SplitMix(seed << 32 | name.bytes().map(u64::from).sum::<u64>());
        let (most, time) = match seconds {
            Some(seconds) => (usize::MAX, Duration::from_secs(seconds)),
            None => (250, Duration::MAX),
        };
        let mut fed = 0;
        while fed < most && begin.elapsed() < time {
            let mut bytes = corpus[fed % corpus.len()].clone();
            if fed >= corpus.len() {
                let other = &corpus[numbers.next(corpus.len())];
                change(&mut bytes, other, &mut numbers);
                if ["tar", "webdataset"].contains(&name) && numbers.next(4) > 0 {
                    mend_tar(&mut bytes);
                }
            }
            if catch_unwind(|| reader(&bytes)).is_err() {
                let found = std::env::temp_dir().join(format!("{name}-{fed}"));
                fs::write(&found, &bytes).expect("written");
                panic!("the reader of {name} panics at `{}`", found.display());
            }
            fed += 1;
        }
        fed
    }

    #[test]
    fn no_reader_panics() {
        let number = |name: &str| -> Option<u64> {
            std::env::var(name).ok().map(|text| text.parse().expect("a number"))
        };
        let (seconds, seed) = (number("FUZZ_SECONDS"), number("FUZZ_SEED").unwrap_or(0));
        let only = std::env::var("FUZZ_READER").ok();
        std::thread::scope(|scope| {
            for (name, reader) in READERS {
                if only.as_ref().is_none_or(|only| only == name) {
                    scope.spawn(move || {
                        let fed = run(name, reader, seconds, seed);
                        println!("{name}: {fed} inputs");
                    });
                }
            }
        });
    }

    #[test]
    fn some_file_of_each_corpus_is_valid() {
        for (name, reader) in READERS {
            let read = |path: &PathBuf| reader(&fs::read(path).expect("readable")).is_ok();
            // Archives are fed to every archive reader, and each accepts another kind.
            if !["tar", "zip"].contains(&name) {
                assert!(corpus(name).expect("a corpus").iter().any(read), "{name}");
            }
        }
    }

    /// The initial corpus: a valid file of every form and all hostile ones. Writes them if
    /// `WRITE_CORPUS` is set.
    #[test]
    fn the_corpus_holds_one_of_everything() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus");
        let write = std::env::var_os("WRITE_CORPUS").is_some();
        let put = |name: &str, bytes: &[u8]| {
            let path = root.join(name);
            if write {
                example::put(&path, bytes);
            }
            assert!(path.is_file(), "`fuzz/corpus/{name}` is missing; WRITE_CORPUS=1 writes it");
        };
        let webp = example::encoded(&example::colour(5), image::ImageFormat::WebP);
        let (jpeg, png) = (example::jpeg(1), example::png(2));
        let deep: image::DynamicImage = example::colour(4).into_rgb16().into();
        for (name, bytes) in [
            ("jpeg", &jpeg),
            ("png", &png),
            ("webp", &webp),
            ("png-16", &example::encoded(&deep, image::ImageFormat::Png)),
            ("jpeg-grey", &example::encoded(&example::grey(3), image::ImageFormat::Jpeg)),
        ] {
            put(&format!("picture/{name}"), bytes);
        }
        for (name, bytes) in crate::hostile::samples() {
            put(&format!("picture/{name}"), &bytes);
        }
        let files: [(&str, &[u8]); 4] =
            [("a/1.jpg", &jpeg), ("b/2.png", &png), ("b/3", &webp), ("../x", b"text")];
        let long = "long/".repeat(30) + "4.png";
        let with_long: [(&str, &[u8]); 2] = [(&long, &png), ("long/5.txt", b"text")];
        put("tar/classes", &example::tar(&files[..3]));
        put("tar/long-names", &example::tar(&with_long));
        put("tar/packed", &example::gzip(&example::tar(&files[..2])));
        let inner = example::tar(&[("1.jpg", &jpeg)]);
        put("tar/of-archives", &example::tar(&[("a.tar", &inner), ("b.tar", &inner)]));
        put("zip/classes", &example::zip(&files));
        put("zip/empty", &example::zip(&[]));
        let samples: [(&str, &[u8]); 4] =
            [("0.cls", b"3"), ("0.jpg", &jpeg), ("1.png", &png), ("1.json", b"{\"label\": 2}")];
        put("webdataset/samples", &example::tar(&samples));
        let rows: [(&str, &[u8], i64); 5] =
            [("a", &jpeg, 0), ("b", &png, 1), ("c", &webp, 1), ("d", b"", 0), ("e", b"x", 7)];
        put("parquet/pictures", &example::parquet(&rows, &["cat", "dog"]));
        put("manifest/named", b"path,label,split\na.png,cat,train\n\"b, c.png\",dog,test\n");
        put("manifest/bare", b"a.png,1\nb.png,2\n");
        let two = |first: &[u8], second: &[u8]| {
            [&(first.len() as u16).to_le_bytes(), first, second].concat()
        };
        put("cifar/record", &two(b"a b c d e f g h i j", &[&[3][..], &[7; 3072]].concat()));
        put("stl/picture", &two(&[10], &vec![9; 3 * 96 * 96]));
        let labels = [&[0, 0, 8, 1, 0, 0, 0, 2][..], &[1, 0]].concat();
        let pictures = [&[0, 0, 8, 3, 0, 0, 0, 2, 0, 0, 0, 2, 0, 0, 0, 3][..], &[5; 12]].concat();
        put("idx/pictures", &two(&labels, &pictures));
        put("idx/packed", &two(&example::gzip(&labels), &example::gzip(&pictures)));
    }
}
