//! Reads pictures in folders: one folder per class, or a flat folder without ground truth.
//!
//! Classes are the direct subfolders of the source, pictures the files directly in those. A picture
//! in a deeper folder is an error: torchvision would treat `train` and `val` as two classes. Only
//! [`Format::Photos`](crate::Format::Photos) takes pictures at any depth, then without ground truth.

use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Context, Error, Result, bail};
use stage::Split;
use stage::files::RESULTS_MARK;

use crate::collection::{Load, Sink};
use crate::names::{below, file_name, left_out};
use crate::{Config, picture};

/// The content of a folder, sorted by name.
#[derive(Debug, Default)]
pub struct FolderContents {
    /// Folders, and links to folders.
    pub folders: Vec<PathBuf>,
    /// Files, and links to files.
    pub files: Vec<PathBuf>,
    /// Skipped entries, with the reason.
    pub ignored: Vec<(PathBuf, &'static str)>,
}

impl FolderContents {
    fn is_empty(&self) -> bool {
        self.folders.is_empty() && self.files.is_empty() && self.ignored.is_empty()
    }

    fn append(&mut self, mut other: Self) {
        self.folders.append(&mut other.folders);
        self.files.append(&mut other.files);
        self.ignored.append(&mut other.ignored);
    }
}

/// Lists a folder. Skips the names for which [`left_out`] has a reason, dangling links, links
/// to a folder that contains the link, and folders of results.
pub fn contents(folder: &Path) -> Result<FolderContents> {
    let mut contents = FolderContents::default();
    let context = || format!("reading the folder `{}`", folder.display());
    for entry in fs::read_dir(folder).with_context(context)? {
        let entry = entry.with_context(context)?;
        let path = entry.path();
        if let Some(reason) = left_out(&file_name(&path)) {
            contents.ignored.push((path, reason));
            continue;
        }
        // Only links need a second look at the disk: ILSVRC-2012 has 1.3 million files.
        let kind = entry.file_type().with_context(context)?;
        let is_link = kind.is_symlink();
        let kind = match is_link {
            true => fs::metadata(&path).map(|metadata| metadata.file_type()),
            false => Ok(kind),
        };
        match kind {
            Ok(kind) if kind.is_dir() && is_link && leads_back(folder, &path) => {
                contents.ignored.push((path, "is a link to a folder that contains it"));
            }
            Ok(kind) if kind.is_dir() && path.join(RESULTS_MARK).exists() => {
                contents.ignored.push((path, HOLDS_RESULTS));
            }
            Ok(kind) if kind.is_dir() => contents.folders.push(path),
            Ok(kind) if kind.is_file() => contents.files.push(path),
            Ok(_) => contents.ignored.push((path, "is neither a file nor a folder")),
            Err(_) => contents.ignored.push((path, "is a dangling link")),
        }
    }
    contents.folders.sort();
    contents.files.sort();
    Ok(contents)
}

/// Why a folder with [`RESULTS_MARK`] in it is skipped.
pub const HOLDS_RESULTS: &str = "holds results of assort";

/// Whether `link` in `folder` points to that folder or to one above it.
fn leads_back(folder: &Path, link: &Path) -> bool {
    match (folder.canonicalize(), link.canonicalize()) {
        (Ok(folder), Ok(target)) => folder.starts_with(target),
        _ => false,
    }
}

/// The pictures of a folder: listed, not yet read.
#[derive(Debug)]
pub struct Listing {
    root: PathBuf,
    /// Classes with their pictures, by name; a flat folder is one class without a name.
    classes: Vec<(Option<String>, Vec<PathBuf>)>,
    ignored: Vec<(PathBuf, &'static str)>,
    /// The first folder with pictures inside a class folder.
    deeper: Option<PathBuf>,
}

/// Lists the pictures in `root`, of all classes or of those that the experiment names.
///
/// # Errors
///
/// The layout is not supported; the message says what was found and what to do.
pub fn list(root: &Path, config: &Config) -> Result<Listing> {
    match list_by_class(root, config) {
        Err(error) if config.allows_any_depth() => {
            let listing = Listing::of_any_depth(root)?;
            log_no_classes(&error);
            Ok(listing)
        }
        by_class => by_class,
    }
}

/// Logs why folders of photographs are not taken as classes.
pub fn log_no_classes(reason: &Error) {
    tracing::info!("the folders are not taken as classes, so there is no ground truth: {reason:#}");
}

fn list_by_class(root: &Path, config: &Config) -> Result<Listing> {
    let mut top = contents(root)?;
    let mut listing = Listing::of(root);
    let has_chosen = !config.classes.is_empty();
    let folders = match has_chosen {
        true => chosen(root, &top, &config.classes)?,
        false => std::mem::take(&mut top.folders),
    };
    for folder in &folders {
        listing.add_class(folder, has_chosen)?;
    }
    listing.check_depth()?;
    let loose = listing.pictures_among(top);
    match has_chosen {
        true => {
            let reason = "is in no class folder";
            listing.ignored.extend(loose.into_iter().map(|path| (path, reason)));
        }
        false => listing.add_loose(loose)?,
    }
    listing.check_classes()?;
    let counts: Vec<(&str, usize)> = listing
        .classes
        .iter()
        .filter_map(|(class, pictures)| Some((class.as_deref()?, pictures.len())))
        .collect();
    config.check_images_per_class(&counts)?;
    Ok(listing)
}

impl Listing {
    fn of(root: &Path) -> Self {
        Self { root: root.to_owned(), classes: Vec::new(), ignored: Vec::new(), deeper: None }
    }

    /// All pictures below a folder, without classes.
    fn of_any_depth(root: &Path) -> Result<Self> {
        let mut listing = Self::of(root);
        let mut pictures = Vec::new();
        let mut inside = contents(root)?;
        // A link in the source itself is followed, as one to a class folder is.
        for folder in std::mem::take(&mut inside.folders) {
            listing.add_all(contents(&folder)?, &mut pictures)?;
        }
        listing.add_all(inside, &mut pictures)?;
        listing.classes.push((None, pictures));
        listing.check_classes()?;
        Ok(listing)
    }

    /// Some files of one folder as a source, without classes.
    pub fn of_some(files: &[PathBuf]) -> Self {
        let parent = files.first().and_then(|file| file.parent());
        let mut listing = Self::of(parent.unwrap_or(Path::new("")));
        let files = FolderContents { files: files.to_vec(), ..FolderContents::default() };
        let pictures = listing.pictures_among(files);
        listing.classes.push((None, pictures));
        listing
    }

    /// How many pictures there are.
    pub fn count(&self) -> usize {
        self.classes.iter().map(|(_, pictures)| pictures.len()).sum()
    }

    /// How many classes there are; 0 in a flat folder.
    pub fn classes(&self) -> usize {
        self.classes.iter().filter(|(class, _)| class.is_some()).count()
    }

    /// The files of all pictures.
    pub fn files(&self) -> impl Iterator<Item = PathBuf> {
        self.classes.iter().flat_map(|(_, pictures)| pictures).cloned()
    }

    /// Passes all pictures to `sink`, named by their path within the source.
    ///
    /// # Errors
    ///
    /// As [`Sink::picture`].
    pub fn read(&self, sink: &mut dyn Sink) -> Result<()> {
        for (path, reason) in &self.ignored {
            sink.ignored(below(&self.root, path), (*reason).to_owned())?;
        }
        for (class, pictures) in &self.classes {
            if let Some(class) = class {
                sink.wants(class)?;
            }
            for path in pictures {
                let load = Load::File(path.clone());
                sink.picture(below(&self.root, path), class.as_deref(), Split::Train, load)?;
            }
        }
        Ok(())
    }

    /// Adds the pictures of the class `folder`. A folder that has files but no pictures is not a
    /// class unless the experiment names it. An empty folder is a class whose pictures are missing.
    fn add_class(&mut self, folder: &Path, is_chosen: bool) -> Result<()> {
        let mut inside = contents(folder)?;
        // Tiny-ImageNet has a folder `images` in each class folder.
        if let Some(at) = inside.folders.iter().position(|folder| file_name(folder) == "images") {
            let images = inside.folders.remove(at);
            inside.append(contents(&images)?);
        }
        let is_class = is_chosen || inside.is_empty();
        for deeper in &inside.folders {
            self.look_deeper(deeper)?;
        }
        let pictures = self.pictures_among(inside);
        if is_class || !pictures.is_empty() {
            self.classes.push((Some(file_name(folder)), pictures));
        }
        Ok(())
    }

    /// Looks for pictures in a folder inside a class folder, and lists all other files as ignored.
    fn look_deeper(&mut self, folder: &Path) -> Result<()> {
        let mut pictures = Vec::new();
        self.add_folder(folder, &mut pictures)?;
        if let (None, Some(first)) = (&self.deeper, pictures.first()) {
            self.deeper = first.parent().map(Path::to_owned);
        }
        Ok(())
    }

    /// Adds all pictures below a folder to `pictures`, and lists all other files as ignored.
    fn add_folder(&mut self, folder: &Path, pictures: &mut Vec<PathBuf>) -> Result<()> {
        if folder.is_symlink() {
            self.ignored.push((folder.to_owned(), "is a link to a folder"));
            return Ok(());
        }
        self.add_all(contents(folder)?, pictures)
    }

    fn add_all(&mut self, mut inside: FolderContents, pictures: &mut Vec<PathBuf>) -> Result<()> {
        for deeper in std::mem::take(&mut inside.folders) {
            self.add_folder(&deeper, pictures)?;
        }
        pictures.append(&mut self.pictures_among(inside));
        Ok(())
    }

    /// Returns the pictures among some files, and lists the other files as ignored.
    fn pictures_among(&mut self, contents: FolderContents) -> Vec<PathBuf> {
        self.ignored.extend(contents.ignored);
        let (pictures, others): (Vec<_>, Vec<_>) =
            contents.files.into_iter().partition(|file| picture::is_meant(file));
        self.ignored.extend(others.into_iter().map(|file| (file, "is not a picture")));
        pictures
    }

    fn check_depth(&self) -> Result<()> {
        let Some(first) = &self.deeper else { return Ok(()) };
        let above = first.parent().unwrap_or(&self.root);
        bail!(
            "pictures of `{}` are nested one level too deep, such as those in `{}`: they must be \
             directly in the folder of their class, and that directly in the source; pass the \
             folder above the class folders with {SOURCE}, perhaps `{}`",
            self.root.display(),
            below(&self.root, first),
            above.display()
        )
    }

    /// Treats pictures directly in the source as a flat folder, if there are no others.
    fn add_loose(&mut self, loose: Vec<PathBuf>) -> Result<()> {
        let Some(first) = loose.first() else { return Ok(()) };
        self.classes.retain(|(_, pictures)| !pictures.is_empty());
        if let Some((class, _)) = self.classes.first() {
            bail!(
                "`{}` holds pictures directly, such as `{}`, and in folders, such as `{}`: put \
                 every picture into the folder of its class, or, without ground truth, none into a \
                 folder",
                self.root.display(),
                file_name(first),
                class.as_deref().unwrap_or_default()
            );
        }
        self.classes.push((None, loose));
        Ok(())
    }

    fn check_classes(&self) -> Result<()> {
        let root = self.root.display();
        if self.count() == 0 {
            bail!("`{root}` holds no JPEG, PNG or WebP pictures{}", hint_at_archives(&self.root)?);
        }
        let empty = |pictures: &Vec<PathBuf>| pictures.is_empty();
        if let Some((class, _)) = self.classes.iter().find(|(_, pictures)| empty(pictures)) {
            bail!(
                "the class folder `{}` of `{root}` holds no pictures: fill it, remove it, or list \
                 the folders to keep in `classes`",
                class.as_deref().unwrap_or_default()
            );
        }
        if let [(Some(class), pictures)] = &self.classes[..] {
            bail!(
                "`{root}` has one class only, `{class}`, with {} pictures; to use them without \
                 ground truth, pass `{}` with {SOURCE}",
                pictures.len(),
                self.root.join(class).display()
            );
        }
        Ok(())
    }
}

/// How the user names the source, for messages: by the flag of the command that started this program, see
/// [`name_source`], or `--source`.
pub const SOURCE: SourceFlag = SourceFlag;

/// See [`SOURCE`].
#[derive(Debug, Clone, Copy)]
pub struct SourceFlag;

static NAMED_BY: OnceLock<String> = OnceLock::new();

impl fmt::Display for SourceFlag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(NAMED_BY.get().map_or("--source", String::as_str))
    }
}

/// Sets how messages of this process name the source. Only the first call has an effect.
pub fn name_source(flag: String) {
    NAMED_BY.get_or_init(|| flag);
}

/// The class folders that the experiment names.
fn chosen(root: &Path, top: &FolderContents, classes: &[String]) -> Result<Vec<PathBuf>> {
    let missing: Vec<&String> = classes
        .iter()
        .filter(|class| !top.folders.iter().any(|folder| file_name(folder) == **class))
        .collect();
    if let Some(first) = missing.first() {
        let listed: Vec<&str> = missing.iter().take(3).map(|class| class.as_str()).collect();
        bail!(
            "`{}` lacks {} of the {} class folders that the experiment names (`{}`{}): {}",
            root.display(),
            missing.len(),
            classes.len(),
            listed.join("`, `"),
            if missing.len() > listed.len() { ", ..." } else { "" },
            diagnosis(root, top, first, classes)?
        );
    }
    Ok(top.folders.iter().filter(|folder| classes.contains(&file_name(folder))).cloned().collect())
}

/// What is probably wrong with a folder that lacks the class `missing`, and what to do.
fn diagnosis(
    root: &Path,
    top: &FolderContents,
    missing: &str,
    classes: &[String],
) -> Result<String> {
    let stanford = |folder: &&PathBuf| {
        file_name(folder).strip_prefix(missing).is_some_and(|rest| rest.starts_with(['-', '_']))
    };
    if let Some(folder) = top.folders.iter().find(stanford) {
        return Ok(format!(
            "`{}` is a folder name of Stanford Dogs, which is another set, of about 170 pictures \
             per class; use the train folder of ILSVRC-2012",
            file_name(folder)
        ));
    }
    if let Some(folder) = top.folders.iter().find(|folder| folder.join(missing).is_dir()) {
        return Ok(format!("they are one level deeper; pass `{}` with {SOURCE}", folder.display()));
    }
    if classes.contains(&file_name(root)) {
        return Ok(format!("this is the folder of one class; pass its parent with {SOURCE}"));
    }
    if root.join(format!("{missing}.tar")).is_file() {
        return Ok(format!(
            "`{missing}.tar` is not unpacked yet; unpack each class's archive into a folder of its \
             name, as in `mkdir {missing} && tar -xf {missing}.tar -C {missing}`"
        ));
    }
    if top.folders.is_empty() && !top.files.is_empty() {
        return Ok(format!(
            "it has no class folders at all, only files such as `{}` (like ILSVRC-2012's `val`); \
             pass the train folder with {SOURCE}",
            file_name(&top.files[0])
        ));
    }
    let some: Vec<_> = top.folders.iter().take(3).map(|folder| file_name(folder)).collect();
    Ok(match some.is_empty() {
        true => "the folder is empty".to_owned(),
        false => format!(
            "it has {} folders, such as `{}`; pass another source with {SOURCE}, or correct \
             `classes`",
            top.folders.len(),
            some.join("`, `")
        ),
    })
}

/// Suggests an archive or other data set in a folder without pictures, or in its subfolders, that
/// the user may have meant.
fn hint_at_archives(root: &Path) -> Result<String> {
    let is_packed = |file: &&PathBuf| {
        let name = file_name(file).to_ascii_lowercase();
        [".tar", ".tgz", ".gz", ".xz", ".zip", ".parquet"].iter().any(|end| name.ends_with(end))
    };
    let top = contents(root)?;
    if let Some(file) = top.files.iter().find(is_packed) {
        return Ok(format!(
            "; it holds `{}`: pass that file, {SOURCE} {}",
            file_name(file),
            file.display()
        ));
    }
    let is_part_of_set = |file: &&PathBuf| {
        let name = file_name(file);
        is_packed(file)
            || name.contains("idx3") && !picture::has_extension(&name)
            || name.ends_with(".bin")
    };
    let mut folders = top.folders;
    for _ in 0..LEVELS {
        let mut below = Vec::new();
        for folder in &folders {
            let inside = contents(folder)?;
            if let Some(file) = inside.files.iter().find(is_part_of_set) {
                return Ok(format!(
                    "; `{}` holds `{}`: pass that folder, {SOURCE} {}",
                    folder.display(),
                    file_name(file),
                    folder.display()
                ));
            }
            below.extend(inside.folders.into_iter().take(FOLDERS - below.len().min(FOLDERS)));
        }
        folders = below;
    }
    Ok(format!("; pass another source with {SOURCE}"))
}

/// How many levels, and folders per level, are searched for such a suggestion.
const LEVELS: usize = 3;
const FOLDERS: usize = 100;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Format;
    use crate::example::{assert_has, config, jpeg, png, prepare, put, refusal, scratch};

    /// Writes a different picture to each of these names, and other bytes to names of archives.
    fn pictures(root: &Path, names: &[&str]) {
        for (seed, name) in names.iter().enumerate() {
            let file = if name.ends_with(".tar") { b"packed".to_vec() } else { png(seed) };
            put(&root.join(name), &file);
        }
    }

    #[test]
    fn classes_are_folders_and_pictures_are_recognised_by_content() {
        let (_folder, path) = scratch();
        put(&path.join("cat/a.JPEG"), &png(0));
        put(&path.join("cat/b.png"), &jpeg(1));
        put(&path.join("dog/no-extension"), &png(2));
        put(&path.join("dog/Thumbs.db"), b"not a picture");
        put(&path.join("dog/._a.jpg"), b"hidden");
        put(&path.join("read me.txt"), b"beside the classes");
        let read = prepare(&path, &config()).expect("sound");
        assert_eq!(read.names.len(), 3);
        assert_eq!(read.class("cat/b.png"), Some("cat"));
        assert_eq!(read.class("dog/no-extension"), Some("dog"));
        assert_eq!(read.picture("cat/a.JPEG").pixels, crate::example::pixels(4, 6, 3, 0));
        let ignored = read.skipped("ignored");
        let names: Vec<&str> = ignored.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["dog/._a.jpg", "dog/Thumbs.db", "read me.txt"]);
        assert_eq!(ignored[1].1, "is not a picture");
    }

    #[test]
    fn only_chosen_classes_are_read_and_their_order_does_not_matter() {
        let (_folder, path) = scratch();
        pictures(&path, &["n1/a.png", "n2/b.png", "n3/c.png", "n3/d.png"]);
        put(&path.join("n2/broken.png"), b"");
        let chosen = |names: [&str; 2]| Config {
            classes: names.map(String::from).to_vec(),
            images_per_class: 0,
            ..config()
        };
        let read = prepare(&path, &chosen(["n3", "n1"])).expect("sound");
        assert_eq!(read.names.len(), 3);
        assert_eq!(prepare(&path, &chosen(["n1", "n3"])).expect("sound").bytes, read.bytes);
        let counted = Config { images_per_class: 2, ..chosen(["n1", "n3"]) };
        assert_has(&refusal(&path, &counted), &["1 of 2 classes", "`n1` has 1", "whole data set"]);
    }

    #[test]
    fn a_flat_folder_has_no_ground_truth() {
        let (_folder, path) = scratch();
        pictures(&path, &["a.png", "b.png"]);
        put(&path.join("notes/c.txt"), b"a folder without pictures");
        let read = prepare(&path, &config()).expect("sound");
        assert_eq!(read.names.len(), 2);
        assert_eq!(read.class("a.png"), None);
        let counted = Config { images_per_class: 1300, ..config() };
        assert_has(&refusal(&path, &counted), &["flat", "`val`", "train folder"]);
    }

    #[test]
    fn photos_lie_at_any_depth_and_are_classes_only_in_folders_of_classes() {
        let photos = || Config { format: Format::Photos, ..config() };
        for names in [
            &["2023/summer/a.png", "2023/winter/b.png", "2024/c.png", "d.png"][..],
            &["a.png", "2024/b.png"],
            &["all/a.png", "all/b.png"],
            &["x/y/z/a.png", "x/y/z/b.png", "x/y/notes.tar"],
        ] {
            let (_folder, path) = scratch();
            pictures(&path, names);
            fs::create_dir(path.join("empty")).expect("created");
            let read = prepare(&path, &photos()).expect("sound");
            let mut found: Vec<&str> = read.names.iter().map(String::as_str).collect();
            found.sort_unstable();
            let mut wanted: Vec<&str> =
                names.iter().copied().filter(|name| name.ends_with(".png")).collect();
            wanted.sort_unstable();
            assert_eq!(found, wanted);
            assert!(wanted.iter().all(|name| read.class(name).is_none()));
        }
        let (_folder, path) = scratch();
        pictures(&path, &["n1/a.png", "n2/b.png"]);
        assert_eq!(prepare(&path, &photos()).expect("sound").class("n2/b.png"), Some("n2"));
        let (_folder, path) = scratch();
        pictures(&path, &["a.png", "backup.tar"]);
        assert_eq!(prepare(&path, &photos()).expect("sound").names, ["a.png"]);
        assert_has(&refusal(&path, &config()), &["`backup.tar`", "`a.png`", "`format`"]);
        let (_folder, path) = scratch();
        pictures(&path, &["deep/er/x.tar"]);
        assert_has(&refusal(&path, &photos()), &["holds no JPEG, PNG or WebP pictures", "x.tar"]);
    }

    #[cfg(unix)]
    #[test]
    fn linked_class_folders_are_followed_and_dead_links_listed() {
        let (_folder, path) = scratch();
        pictures(&path, &["elsewhere/cat/a.png", "set/dog/b.png"]);
        std::os::unix::fs::symlink(path.join("elsewhere/cat"), path.join("set/cat"))
            .expect("linked");
        std::os::unix::fs::symlink(path.join("nowhere"), path.join("set/dog/x.png"))
            .expect("linked");
        let read = prepare(&path.join("set"), &config()).expect("sound");
        assert_eq!(read.class("cat/a.png"), Some("cat"));
        pictures(&path, &["set/loose.png"]);
        let photos = Config { format: Format::Photos, ..config() };
        let photos = prepare(&path.join("set"), &photos).expect("sound");
        assert_eq!((photos.names.len(), photos.class("cat/a.png")), (3, None));
        let (name, reason) = &read.skipped("ignored")[0];
        assert_eq!((name.as_str(), reason.as_str()), ("dog/x.png", "is a dangling link"));
    }

    #[test]
    fn errors_describe_a_wrong_layout_and_its_remedy() {
        let cases: [(&[&str], &[&str]); 8] = [
            (&["train/n1/a.png", "val/n1/b.png"], &["too deep", "`train/n1`", "perhaps", "train`"]),
            (&["n1/more/a.png", "n2/more/b.png"], &["too deep", "`n1/more`"]),
            (&["n1/images/a.png", "n2/x/y/b.png"], &["too deep", "`n2/x/y`"]),
            (&["n1/a.png", "n2/b.png", "n2/more/c.png"], &["too deep", "`n2/more`"]),
            (&["all/a.png", "all/b.png"], &["one class only, `all`, with 2 pictures", "--source"]),
            (&["a.png", "n1/b.png"], &["`a.png`", "`n1`", "ground truth"]),
            (&[], &["holds no JPEG, PNG or WebP pictures"]),
            (&["n1.tar"], &["pass that file", "n1.tar"]),
        ];
        for (names, parts) in cases {
            let (_folder, path) = scratch();
            pictures(&path, names);
            assert_has(&refusal(&path, &config()), parts);
        }
        let (_folder, path) = scratch();
        pictures(&path, &["n1/a.png", "n2/b.png"]);
        fs::create_dir(path.join("n3")).expect("created");
        assert_has(&refusal(&path, &config()), &["`n3`", "holds no pictures", "`classes`"]);
        let missing = refusal(&path.join("nowhere"), &config());
        assert_has(&missing, &["nowhere", "--source"]);
    }

    #[test]
    fn errors_name_a_missing_class_and_what_is_there_instead() {
        let (train, single) = ("n02085936/a.JPEG", "n02086646/b.JPEG");
        let stanford = "n02085936-Maltese_dog/a.jpg";
        let cases: [(&str, &[&str], &[&str]); 6] = [
            (
                "",
                &[stanford, "n02086646-Blenheim_spaniel/b.jpg"],
                &["Stanford Dogs", "train folder"],
            ),
            ("", &["train/n02085936/a.JPEG", "val/a.JPEG"], &["one level deeper", "train`"]),
            ("n02085936", &[train, single], &["the folder of one class", "pass its parent"]),
            ("", &["n02085936.tar", "x/y.txt"], &["not unpacked yet", "mkdir n02085936"]),
            ("", &["ILSVRC2012_val_00000001.JPEG"], &["no class folders", "`val`", "train folder"]),
            ("", &[train, "n3/x.png"], &["lacks 1 of the 2", "`n02086646`", "2 folders", "`n3`"]),
        ];
        for (inner, names, parts) in cases {
            let (_folder, path) = scratch();
            pictures(&path, names);
            let classes = ["n02085936", "n02086646"].map(String::from).to_vec();
            let ilsvrc = Config { classes, images_per_class: 1300, ..config() };
            assert_has(&refusal(&path.join(inner), &ilsvrc), parts);
        }
    }
}
