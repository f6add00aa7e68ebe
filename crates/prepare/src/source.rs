//! Recognises the format of a source and reads it.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use anyhow::{Context, Result, bail, ensure};
use data::picture::Encoding;
use sha2::{Digest, Sha256};
use stage::console::counted;
use stage::digest::hex;

use crate::collection::Sink;
use crate::folder::{Listing, SOURCE, contents};
use crate::foreign::Foreign;
use crate::idx::Pair;
use crate::location::Local;
use crate::names::{below, file_name, path_text};
use crate::packed::Holds;
use crate::{
    Config, Format, cifar, folder, foreign, idx, manifest, packed, parquet_file, picture, stl,
    webdataset,
};

/// A source whose format is known but whose pictures are not read yet.
#[derive(Debug)]
pub enum PictureSource {
    /// IDX files, a pair for each split.
    Idx(Vec<Pair>),
    /// A folder with the binary files of CIFAR.
    Cifar(Vec<PathBuf>, Format),
    /// A folder with the binary files of STL-10.
    Stl(Vec<PathBuf>),
    /// A folder of pictures.
    Folder(Listing),
    /// A folder with one archive per class.
    ClassArchives(Vec<PathBuf>),
    /// An archive with the binary files of CIFAR, below this folder.
    CifarArchive(PathBuf, String, Format),
    /// An archive with the binary files of STL-10, below this folder.
    StlArchive(PathBuf, String),
    /// An archive of pictures, below this folder.
    PictureArchive(PathBuf, String),
    /// Shards of WebDataset; of a single one, the content of this folder.
    WebDataset(Vec<PathBuf>, String),
    /// Parquet files.
    Parquet(Vec<PathBuf>, Format),
    /// A manifest in CSV.
    Manifest(PathBuf),
}

impl PictureSource {
    /// Finds the files of the format that the experiment names, or detects the format.
    ///
    /// # Errors
    ///
    /// The source does not have that format; the message says what was found and what to do.
    pub fn recognise(local: &Local, config: &Config) -> Result<Self> {
        // Opening a pipe would block until a program writes to it.
        let is_neither = |path: &&PathBuf| !path.is_dir() && path.exists() && !path.is_file();
        if let Some(path) = local.paths.iter().find(is_neither) {
            bail!(
                "`{}` is neither a file nor a folder, but a pipe, socket or device; save its content \
                 to a file and pass that with {SOURCE}",
                path.display()
            );
        }
        match &local.paths[..] {
            [] => bail!("the source has no files; pass another one with {SOURCE}"),
            [path] if path.is_dir() => Self::of_folder(path, config),
            [path] => Self::of_file(path, &local.within, detected(config.format)),
            paths => Self::of_files(paths, detected(config.format)),
        }
    }

    fn of_folder(path: &Path, config: &Config) -> Result<Self> {
        let format = detected(config.format);
        if let Format::Auto | Format::Idx = format {
            let pairs = idx::find(path)?;
            if !pairs.is_empty() {
                return Ok(Self::Idx(pairs));
            }
        }
        if let Format::Auto | Format::Cifar | Format::Cifar20 = format {
            let files = cifar::find(path)?;
            if !files.is_empty() {
                return Ok(Self::Cifar(files, format));
            }
        }
        if let Format::Auto | Format::Stl10 = format {
            let files = stl::find(path)?;
            if !files.is_empty() {
                return Ok(Self::Stl(files));
            }
        }
        if let Format::Auto | Format::Tar | Format::WebDataset | Format::Parquet = format {
            let files = packed_files(path, config.format)?;
            let is_parquet =
                files.first().is_some_and(|file| file_name(file).ends_with(".parquet"));
            if files.len() > 1 || !files.is_empty() && (is_parquet || format != Format::Auto) {
                return Self::of_files(&files, format);
            }
        }
        if let Format::Auto | Format::Folder = format {
            return Ok(Self::Folder(folder::list(path, config)?));
        }
        let wanted = match format {
            Format::Idx => "has no IDX files, such as train-images-idx3-ubyte.gz",
            Format::Tar | Format::Zip => "is a folder, not an archive",
            Format::Stl10 => "has no binary files of STL-10, such as train_X.bin",
            Format::WebDataset => "has no shards of WebDataset, such as 000.tar",
            Format::Parquet => "has no Parquet files",
            Format::Manifest => "is a folder, not a manifest",
            _ => "has no binary files of CIFAR, such as data_batch_1.bin or train.bin",
        };
        let files = contents(path)?;
        let first = files.files.iter().chain(&files.folders).next();
        bail!(
            "`{}` {wanted}{}; pass another source with {SOURCE}, or set `format = \"auto\"`",
            path.display(),
            first.map(|first| format!(" (it holds `{}`)", file_name(first))).unwrap_or_default()
        )
    }

    fn of_file(path: &Path, within: &str, format: Format) -> Result<Self> {
        let name = file_name(path);
        ensure!(
            picture::has_extension(&name)
                || !name.contains("idx1") && !name.contains("idx3") && !name.ends_with(".bin"),
            "`{}` is one file of several; pass its folder with {SOURCE}",
            path.display()
        );
        ensure!(
            !matches!(format, Format::Idx | Format::Folder),
            "`{}` is a file, but `format` asks for a folder; pass the folder with {SOURCE}, or set \
             `format = \"auto\"`",
            path.display()
        );
        let start = start_of(path)?;
        let is_auto = format == Format::Auto;
        let mut found = None;
        if is_auto && Encoding::of(&start).is_some() {
            found = Some(Self::Folder(Listing::of_some(&[path.to_owned()])));
        } else if parquet_file::is_parquet(&start) {
            found = Some(Self::Parquet(vec![path.to_owned()], format));
        } else if format == Format::Manifest || is_auto && manifest::is_manifest(&name) {
            found = Some(Self::Manifest(path.to_owned()));
        }
        if let Some(found) = found {
            ensure!(
                within.is_empty(),
                "`{}` is not an archive and has no folder `{within}`; pass only the file with \
                 {SOURCE}",
                path.display()
            );
            return Ok(found);
        }
        refuse_foreign(path, &start)?;
        ensure!(
            !picture::has_extension(&name),
            "`{}` is neither a JPEG nor a PNG nor a WebP file, whatever its name says; pass a picture, a folder or \
             an archive with {SOURCE}",
            path.display()
        );
        ensure!(
            format != Format::Parquet,
            "`{}` is not a Parquet file; pass another one with {SOURCE}",
            path.display()
        );
        let path = path.to_owned();
        let holds = packed::recognise(&path, within)?;
        let within = within.to_owned();
        match (holds, format) {
            (Holds::Cifar, Format::Auto | Format::Tar | Format::Cifar | Format::Cifar20) => {
                Ok(Self::CifarArchive(path, within, format))
            }
            (Holds::Stl, Format::Auto | Format::Tar | Format::Stl10) => {
                Ok(Self::StlArchive(path, within))
            }
            (Holds::WebDataset, Format::Auto) => Ok(Self::WebDataset(vec![path], within)),
            (Holds::WebDataset | Holds::Pictures, Format::WebDataset) => {
                Ok(Self::WebDataset(vec![path], within))
            }
            (Holds::Pictures | Holds::WebDataset, Format::Auto | Format::Tar | Format::Zip) => {
                Ok(Self::PictureArchive(path, within))
            }
            (holds, _) => bail!(
                "`{}` holds {}, not what `format` asks for; set `format = \"auto\"`",
                path.display(),
                match holds {
                    Holds::Cifar => "the binary files of CIFAR",
                    Holds::Stl => "the binary files of STL-10",
                    Holds::WebDataset => "samples of WebDataset",
                    Holds::Pictures => "pictures",
                }
            ),
        }
    }

    /// Recognises several files that are parts of one data set.
    fn of_files(paths: &[PathBuf], format: Format) -> Result<Self> {
        let first = &paths[0];
        let start = start_of(first)?;
        if format == Format::Auto && picture::is_meant(first) {
            return Ok(Self::Folder(Listing::of_some(paths)));
        }
        if parquet_file::is_parquet(&start) {
            return Ok(Self::Parquet(paths.to_vec(), format));
        }
        refuse_foreign(first, &start)?;
        match (packed::recognise(first, "")?, format) {
            (Holds::WebDataset, Format::Auto) | (_, Format::WebDataset) => {
                Ok(Self::WebDataset(paths.to_vec(), String::new()))
            }
            (Holds::Pictures, Format::Auto | Format::Tar) => {
                Ok(Self::ClassArchives(paths.to_vec()))
            }
            _ => bail!(
                "`{}` and {} files beside it are neither Parquet files, nor shards of WebDataset, nor \
                 archives of one class each; pass another source with {SOURCE}",
                first.display(),
                paths.len() - 1
            ),
        }
    }

    /// The number of pictures that the source states; 0 if it must be read to know.
    pub fn expected(&self) -> usize {
        match self {
            Self::Idx(pairs) => pairs.iter().map(|pair| pair.count).sum(),
            Self::Folder(listing) => listing.count(),
            _ => 0,
        }
    }

    /// A description for the log.
    pub fn description(&self) -> String {
        match self {
            Self::Idx(_) => {
                format!("a folder of IDX files, {}", counted(self.expected(), "picture"))
            }
            Self::Folder(listing) if listing.classes() == 0 && listing.count() == 1 => {
                "one picture".into()
            }
            Self::Folder(listing) if listing.classes() == 0 => {
                format!("a flat folder of {}", counted(listing.count(), "picture"))
            }
            Self::Folder(listing) => {
                format!("a folder of {} pictures in {} classes", listing.count(), listing.classes())
            }
            Self::Cifar(..) => "a folder of CIFAR's binary files".into(),
            Self::CifarArchive(..) => "an archive of CIFAR's binary files".into(),
            Self::Stl(_) => "a folder of STL-10's binary files".into(),
            Self::StlArchive(..) => "an archive of STL-10's binary files".into(),
            Self::ClassArchives(paths) => format!("{} archives, one a class", paths.len()),
            Self::PictureArchive(..) => "an archive of pictures".into(),
            Self::WebDataset(paths, _) => {
                format!("a WebDataset of {}", counted(paths.len(), "shard"))
            }
            Self::Parquet(paths, _) => counted(paths.len(), "Parquet file"),
            Self::Manifest(_) => "a manifest of pictures".into(),
        }
    }

    /// Passes all pictures of this source, which was found at `local`, to `sink`, always in the
    /// same order.
    pub fn read(&self, local: &Local, config: &Config, sink: &mut dyn Sink) -> Result<()> {
        if let [root] = &local.paths[..]
            && root.is_dir()
            && !matches!(self, Self::Folder(_))
        {
            self.list_others(root, sink)?;
        }
        match self {
            Self::Idx(pairs) => pairs.iter().try_for_each(|pair| pair.read(sink)),
            Self::Cifar(files, format) => cifar::read(files, *format, sink),
            Self::Stl(files) => stl::read(files, sink),
            Self::Folder(listing) => listing.read(sink),
            Self::ClassArchives(paths) => packed::read_class_archives(paths, &config.classes, sink),
            Self::CifarArchive(path, within, format) => {
                packed::read_cifar(path, within, *format, sink)
            }
            Self::StlArchive(path, within) => packed::read_stl(path, within, sink),
            Self::PictureArchive(path, within) if config.allows_any_depth() => {
                packed::read_photos(path, within, sink)
            }
            Self::PictureArchive(path, within) => {
                packed::read_pictures(path, within, &config.classes, sink)
            }
            Self::WebDataset(paths, within) => {
                webdataset::read(paths, within, &config.classes, sink)
            }
            Self::Parquet(paths, format) => {
                parquet_file::read(paths, *format, &config.classes, sink)
            }
            Self::Manifest(path) => manifest::read(path, &config.classes, sink),
        }
    }

    /// The files of the source; for a manifest, only the manifest.
    fn files(&self) -> Box<dyn Iterator<Item = PathBuf> + '_> {
        match self {
            Self::Idx(pairs) => Box::new(pairs.iter().flat_map(Pair::files)),
            Self::Folder(listing) => Box::new(listing.files()),
            Self::Cifar(paths, _)
            | Self::Stl(paths)
            | Self::ClassArchives(paths)
            | Self::WebDataset(paths, _)
            | Self::Parquet(paths, _) => Box::new(paths.iter().cloned()),
            Self::CifarArchive(path, ..)
            | Self::StlArchive(path, _)
            | Self::PictureArchive(path, _)
            | Self::Manifest(path) => Box::new([path.clone()].into_iter()),
        }
    }

    /// Lists everything in the folder `root` that is not part of the data set.
    fn list_others(&self, root: &Path, sink: &mut dyn Sink) -> Result<()> {
        let used: BTreeSet<PathBuf> = self.files().collect();
        let inside = contents(root)?;
        for (path, reason) in inside.ignored {
            sink.ignored(below(root, &path), reason.to_owned())?;
        }
        // Parquet files may name pictures in folders beside them.
        let may_be_used = |folder: &&PathBuf| {
            matches!(self, Self::Parquet(..)) || used.iter().any(|used| used.starts_with(folder))
        };
        let folders = inside.folders.iter().filter(|folder| !may_be_used(folder));
        let files = inside.files.iter().filter(|file| !used.contains(*file));
        folders.chain(files).try_for_each(|path| {
            sink.ignored(below(root, path), "is not part of the data set".into())
        })
    }

    /// A digest of the names, sizes and modification times of its files. An interrupted run resumes
    /// only if the digest is unchanged.
    pub fn state(&self) -> String {
        let mut hash = Sha256::new();
        for path in self.files() {
            let metadata = fs::metadata(&path).ok();
            let length = metadata.as_ref().map(fs::Metadata::len);
            let changed = metadata.and_then(|metadata| metadata.modified().ok());
            let changed = changed.and_then(|changed| changed.duration_since(UNIX_EPOCH).ok());
            hash.update(format!("{} {length:?} {changed:?}\n", path_text(&path)));
        }
        hex(&hash.finalize())
    }
}

/// The format to look for: any, where anyone's pictures are read.
fn detected(format: Format) -> Format {
    if format == Format::Photos { Format::Auto } else { format }
}

/// The first bytes of a file.
fn start_of(path: &Path) -> Result<Vec<u8>> {
    let mut start = Vec::new();
    let file = fs::File::open(path).with_context(|| {
        format!(
            "opening the source `{}`; pass the path of the pictures with {SOURCE}",
            path.display()
        )
    })?;
    file.take(foreign::START as u64).read_to_end(&mut start)?;
    Ok(start)
}

/// Fails if the format of a file is unsupported, saying what the file is and what to do.
fn refuse_foreign(path: &Path, start: &[u8]) -> Result<()> {
    match foreign::recognise(start, &file_name(path)) {
        Some(Foreign { what, remedy }) => {
            bail!("`{}` is {what}: {remedy}, and pass the result with {SOURCE}", path.display())
        }
        None => Ok(()),
    }
}

/// The Parquet files of a folder, or else its tar archives if it has no subfolders. Of photographs, none if there are
/// pictures beside them.
///
/// # Errors
///
/// There are also pictures beside them, and `format` does not say which of the two to read.
fn packed_files(folder: &Path, format: Format) -> Result<Vec<PathBuf>> {
    let inside = contents(folder)?;
    let with_ending = |ending: &str| -> Vec<PathBuf> {
        inside.files.iter().filter(|file| file_name(file).ends_with(ending)).cloned().collect()
    };
    let mut files = with_ending(".parquet");
    if files.is_empty() && inside.folders.is_empty() {
        files = with_ending(".tar");
    }
    let is_picture = |file: &&PathBuf| picture::has_extension(&file_name(file));
    if let (Some(file), Some(picture)) = (files.first(), inside.files.iter().find(is_picture)) {
        match format {
            Format::Photos => files.clear(),
            Format::Auto => bail!(
                "`{}` holds `{}` and pictures such as `{}`: pass the one file, or set `format` to \
             \"folder\", \"parquet\" or \"tar\"",
                folder.display(),
                file_name(file),
                file_name(picture)
            ),
            _ => {}
        }
    }
    Ok(files)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Options;
    use crate::example::{
        PreparedFiles, assert_has, config, encoded, gzip, jpeg, parquet, png, prepare,
        prepare_with, put, refusal, scratch, tar, zip,
    };

    /// Pictures of two classes: class, name, bytes.
    fn pictures() -> Vec<(&'static str, String, Vec<u8>)> {
        let webp = encoded(&crate::example::colour(7), image::ImageFormat::WebP);
        let mut files = vec![("n02085936", "n02085936_7.JPEG".to_owned(), webp)];
        for seed in 0..7 {
            let class = ["n02085936", "n02086646"][seed % 2];
            let file = if seed % 3 == 0 { jpeg(seed) } else { png(seed) };
            files.push((class, format!("{class}_{seed}.JPEG"), file));
        }
        files.sort();
        files
    }

    /// Packs files into an archive.
    type Pack = fn(&[(&str, &[u8])]) -> Vec<u8>;

    fn packed(pack: Pack, files: &[(String, Vec<u8>)]) -> Vec<u8> {
        let entries: Vec<(&str, &[u8])> = files.iter().map(|(n, b)| (&**n, &**b)).collect();
        pack(&entries)
    }

    /// The classes by row; rows do not depend on names.
    fn classes(read: &PreparedFiles) -> Vec<Option<String>> {
        read.classes.clone()
    }

    #[test]
    fn the_same_pictures_give_the_same_data_set_from_every_format() {
        let (_folder, path) = scratch();
        let at = |name: &str| path.join(name);
        let (mut flat, mut by_class) = (Vec::new(), Vec::new());
        for (class, name, bytes) in pictures() {
            put(&at("folder").join(class).join(&name), &bytes);
            flat.push((format!("{class}/{name}"), bytes.clone()));
            by_class.push((class, name, bytes));
        }
        let folder = prepare(&at("folder"), &config()).expect("sound");
        assert_eq!(folder.names.len(), 8);

        put(&at("plain.tar"), &packed(tar, &flat));
        put(&at("packed.tar.gz"), &gzip(&packed(tar, &flat)));
        put(&at("packed.zip"), &packed(zip, &flat));
        // Like ILSVRC-2012's train archive: one archive per class.
        let archives: Vec<(String, Vec<u8>)> = ["n02085936", "n02086646"]
            .into_iter()
            .map(|class| {
                let of_class = by_class.iter().filter(|picture| picture.0 == class);
                let inner: Vec<_> = of_class.map(|(_, n, b)| (n.clone(), b.clone())).collect();
                (format!("{class}.tar"), packed(tar, &inner))
            })
            .collect();
        put(&at("of-archives.tar"), &packed(tar, &archives));
        put(&at("of-archives.tar.gz"), &gzip(&packed(tar, &archives)));
        for (name, bytes) in &archives {
            put(&at("archives").join(name), bytes);
        }
        let mut manifest = "label,path,other\n".to_owned();
        let mut bare = String::new();
        for (class, name, _) in &by_class {
            manifest += &format!("{class},\"folder/{class}/{name}\",x\n");
            bare += &format!("folder/{class}/{name}\t{class}\r\n");
        }
        put(&at("manifest.csv"), manifest.as_bytes());
        put(&at("bare.tsv"), bare.as_bytes());
        let rows = |range: std::ops::Range<usize>| -> Vec<(&str, &[u8], i64)> {
            let number = |class: &str| i64::from(class == "n02086646");
            by_class[range].iter().map(|(class, n, b)| (&**n, &**b, number(class))).collect()
        };
        let names = ["n02085936", "n02086646"];
        put(&at("whole.parquet"), &parquet(&rows(0..8), &names));
        put(&at("parts/train-0-of-2.parquet"), &parquet(&rows(0..5), &names));
        put(&at("parts/train-1-of-2.parquet"), &parquet(&rows(5..8), &names));
        let samples = |range: std::ops::Range<usize>| {
            let mut files = Vec::new();
            for (number, (class, _, bytes)) in by_class[range].iter().enumerate() {
                let json = format!("{{\"label\": \"{class}\"}}").into_bytes();
                match number % 2 {
                    0 => files.push((format!("{number:03}.cls"), class.as_bytes().to_vec())),
                    _ => files.push((format!("{number:03}.json"), json)),
                }
                files.push((format!("{number:03}.jpg"), bytes.clone()));
            }
            packed(tar, &files)
        };
        put(&at("shard.tar"), &samples(0..8));
        put(&at("shards/train-00.tar"), &samples(0..3));
        put(&at("shards/train-01.tar"), &samples(3..8));

        for source in [
            "plain.tar",
            "packed.tar.gz",
            "packed.zip",
            "of-archives.tar",
            "of-archives.tar.gz",
            "archives",
            "manifest.csv",
            "bare.tsv",
            "whole.parquet",
            "parts",
            "parts/train-*.parquet",
            "shard.tar",
            "shards",
            "shards/train-{00..01}.tar",
        ] {
            let read =
                prepare(&at(source), &config()).unwrap_or_else(|e| panic!("{source}: {e:#}"));
            assert_eq!(read.bytes, folder.bytes, "{source}");
            assert_eq!(classes(&read), classes(&folder), "{source}");
            assert!(read.skipped("broken").is_empty() && read.skipped("ignored").is_empty());
        }
        // Several parts hold the same data set too.
        let options = Options { part_bytes: 300, ..Options::default() };
        let parts = prepare_with(&at("plain.tar"), &config(), &options).expect("sound");
        assert_eq!(parts.images.fingerprint(), folder.images.fingerprint());
        let only = Config { classes: vec!["n02085936".into(), "n3".into()], ..config() };
        assert_has(&refusal(&at("of-archives.tar"), &only), &["no class `n3`"]);
    }

    #[test]
    fn wanted_classes_are_found_by_id_if_labels_are_words() {
        let (_folder, path) = scratch();
        let by_class = pictures();
        let words = ["Maltese dog", "Blenheim spaniel", "basset"];
        let rows: Vec<(&str, &[u8], i64)> = by_class
            .iter()
            .map(|(class, n, b)| (&**n, &**b, i64::from(*class == "n02086646")))
            .collect();
        put(&path.join("x.parquet"), &parquet(&rows, &words));
        let read = prepare(&path.join("x.parquet"), &config()).expect("sound");
        assert_eq!(read.class_names, ["Blenheim spaniel", "Maltese dog"]);
        let ids = ["n02085936", "n02086646"].map(String::from).to_vec();
        let read = prepare(&path.join("x.parquet"), &Config { classes: ids, ..config() });
        assert_eq!(read.expect("sound").class_names, ["n02085936", "n02086646"]);
    }

    #[test]
    fn only_the_given_folder_of_an_archive_is_read() {
        let (_folder, path) = scratch();
        let files: Vec<(String, Vec<u8>)> = [
            "ILSVRC/Data/train/a/1.png",
            "ILSVRC/Data/train/b/2.png",
            "ILSVRC/Data/val/3.png",
            "ILSVRC/Annotations/train/a/1.xml",
        ]
        .iter()
        .zip(0..)
        .map(|(name, seed)| {
            let is_picture = name.ends_with(".png");
            ((*name).to_owned(), if is_picture { png(seed) } else { b"<xml>".to_vec() })
        })
        .collect();
        for (name, archive) in [("x.zip", packed(zip, &files)), ("x.tar", packed(tar, &files))] {
            put(&path.join(name), &archive);
            assert_has(&refusal(&path.join(name), &config()), &["side by side", "#"]);
            let within = path.join(format!("{name}#ILSVRC/Data/train"));
            let read = prepare(&within, &config()).expect("sound");
            assert_eq!(read.class_names, ["a", "b"]);
            assert_eq!(read.names.len(), 2);
            // Classes of the experiment are found without it.
            let chosen = Config { classes: vec!["a".into(), "b".into()], ..config() };
            assert_eq!(prepare(&path.join(name), &chosen).expect("sound").bytes, read.bytes);
        }
        let tiny: Vec<(String, Vec<u8>)> = [
            "t/train/n1/images/0.JPEG",
            "t/train/n2/images/0.JPEG",
            "t/val/images/0.JPEG",
            "t/train/n1/n1_boxes.txt",
        ]
        .iter()
        .zip(0..)
        .map(|(name, seed)| ((*name).to_owned(), png(seed)))
        .collect();
        put(&path.join("tiny.zip"), &packed(zip, &tiny[..3]));
        let read = prepare(&path.join("tiny.zip#t/train"), &config()).expect("sound");
        assert_eq!(read.class_names, ["n1", "n2"]);
    }

    #[test]
    fn splits_of_parquet_files_and_manifests_are_kept() {
        let (_folder, path) = scratch();
        let files = [png(0), png(1), png(2)];
        let row = |at: usize| -> Vec<(&str, &[u8], i64)> { vec![("", &files[at], at as i64 % 2)] };
        put(&path.join("d/train-0.parquet"), &parquet(&row(0), &["a", "b"]));
        put(&path.join("d/validation-0.parquet"), &parquet(&row(1), &["a", "b"]));
        let read = prepare(&path.join("d"), &config()).expect("sound");
        let row = read.row("validation-0.parquet:0");
        assert_eq!(read.images.rows(&[stage::Split::Test]), [row]);
        for (name, bytes) in ["0.png", "1.png", "2.png"].iter().zip(&files) {
            put(&path.join(name), bytes);
        }
        put(&path.join("m.csv"), b"image,split\n0.png,train\n1.png,test\n2.png,unlabelled\n,\n");
        let read = prepare(&path.join("m.csv"), &config()).expect("sound");
        assert_eq!(read.images.rows(&[stage::Split::Test]), [read.row("1.png")]);
        assert_eq!(read.images.rows(&[stage::Split::Unlabelled]), [read.row("2.png")]);
        assert_eq!(read.class("0.png"), None);
    }

    #[test]
    fn errors_say_what_a_file_is_and_what_to_do() {
        let (_folder, path) = scratch();
        let cases: [(&str, Vec<u8>, &[&str]); 16] = [
            ("empty.csv", vec![], &["empty.csv", "it is empty"]),
            ("x.csv", b"name,age\nA,1\n".to_vec(), &["no column of paths", "`path`"]),
            ("long.csv", [b"path\n\"".to_vec(), vec![b'x'; 3 << 20]].concat(), &["a line of more"]),
            ("x.parquet", b"PAR1 and no more".to_vec(), &["x.parquet", "damaged"]),
            ("cut.zip", zip(&[("a/1.png", &png(0))])[..90].to_vec(), &["cut.zip", "zip"]),
            ("none.zip", zip(&[]), &["holds neither"]),
            ("text.tar.zst", b"\x28\xb5\x2f\xfd123".to_vec(), &["zstd", "unpack it"]),
            ("empty.tar", vec![], &["empty.tar", "not a tar archive"]),
            ("x.rar", b"Rar!\x1a\x07\x01\0".to_vec(), &["x.rar` is a RAR archive: unpack it"]),
            ("x.mat", b"MATLAB 5.0 MAT-file".to_vec(), &["a MATLAB file", "Parquet", "--source"]),
            ("x.jsonl", b"{\"path\": \"0.jpg\"}\n".to_vec(), &["a JSON document", "as CSV"]),
            ("list.txt", b"0.jpg\n1.jpg\n".to_vec(), &["a text", ".csv"]),
            ("page.zip", b"<html>Log in".to_vec(), &["a web page: download the file again"]),
            ("notes.jpg", b"no picture".to_vec(), &["neither a JPEG", "whatever its name says"]),
            ("IMG.HEIC", b"\0\0\0\x18ftypheic".to_vec(), &["a HEIC picture", "convert it"]),
            ("7.tar", tar(&[("0.jpg", &jpeg(0)), ("0.cls", b"1")]), &["one class only, `1`"]),
        ];
        for (name, bytes, parts) in cases {
            put(&path.join(name), &bytes);
            assert_has(&refusal(&path.join(name), &config()), parts);
        }
        assert_has(&refusal(Path::new("hf://x"), &config()), &["not an address of the hub"]);
        assert_has(&refusal(Path::new("named://x"), &config()), &["no set", "cifar-100"]);
        let parquet = parquet(&[("a", &png(0), 0), ("b", b"", 1), ("c", &png(1), 1)], &[]);
        put(&path.join("y.parquet"), &parquet);
        let read = prepare(&path.join("y.parquet"), &Config { broken_share: 0.5, ..config() });
        assert_has(&read.expect("2 of 3").skipped("broken")[0].1, &["is empty"]);
    }
}
