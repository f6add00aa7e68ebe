//! The table `clusters.csv`, and a folder of pictures for each cluster.

use std::borrow::Cow;
use std::cell::Cell;
use std::fs;
use std::io::{self, Cursor, ErrorKind};
use std::path::{Path, PathBuf, absolute};

use anyhow::{Context, Result, bail, ensure};
use data::corrections::PictureMark;
use data::images::Id;
use data::picture::Encoding;
use data::{Images, Names};
use image::ImageFormat;
use sha2::{Digest, Sha256};
use stage::Interrupt;

use crate::clusters::{Cluster, ClusterMember};
use crate::thumbnail;

/// Name of the table in the folder of a report.
pub const TABLE: &str = "clusters.csv";
/// Name of the folder of pictures in it.
pub const PICTURES: &str = "pictures";

/// Writes `clusters.csv`: a line per picture, by cluster, and there by falling score.
///
/// UTF-8 with a header. `name` as in `names.safetensors`, but see below; `cluster`; `confidence` and
/// `score` in `[0, 1]`; `reliable` is `true` if the experiment would train on the picture's cluster;
/// `cluster-name`, if a person named the cluster; `mark`, `wrong` or `outlier`, if a person marked the
/// picture, which then has no `cluster`.
///
/// A spreadsheet would compute a name such as `=1+1.jpg`. So a name that begins with `=`, `+`, `-`,
/// `@`, a tab, a line break or one of their full-width forms gets a `'` in front, as does one that
/// begins with `'`. To read a name, remove one `'` from its beginning.
pub fn write_table(path: &Path, clusters: &[Cluster], names: &Names) -> Result<()> {
    stage::files::write(path, &table(clusters, names)?)
}

/// The bytes of the table that [`write_table`] writes.
pub fn table(clusters: &[Cluster], names: &Names) -> Result<Vec<u8>> {
    let mut table = csv::Writer::from_writer(Vec::new());
    let columns = ["name", "cluster", "confidence", "score", "reliable", "cluster-name", "mark"];
    table.write_record(columns)?;
    for cluster in clusters {
        let number = cluster.mark.map_or(cluster.number.to_string(), |_| String::new());
        let name = without_formula(cluster.name.as_deref().unwrap_or_default());
        let mark = cluster.mark.map_or("", PictureMark::word);
        for member in &cluster.members {
            table.write_record([
                &*without_formula(&names.names[member.row as usize]),
                &number,
                &format!("{:.4}", member.confidence),
                &format!("{:.4}", member.score),
                &member.reliable.to_string(),
                &name,
                mark,
            ])?;
        }
    }
    table.into_inner().context("closing the table")
}

/// Prefixes a name that a spreadsheet would evaluate as a formula; see [`write_table`].
fn without_formula(name: &str) -> Cow<'_, str> {
    let special = ['=', '+', '-', '@', '\t', '\r', '\n', '＝', '＋', '－', '＠', '\''];
    if name.starts_with(special) { format!("'{name}").into() } else { name.into() }
}

/// Writes a folder of pictures for each cluster: `<folder>/<cluster>/<rank>-<name>`. Rank 1 has the
/// highest score. The folder of a cluster that a person named is `<cluster>-<its name>`; marked pictures are
/// in `wrong` and `outliers`.
///
/// The folders are made in a folder beside, which is renamed when it is complete: `folder` is whole
/// or absent. If `folder` holds the same pictures already, nothing is done. The caller holds the
/// claim on the report, so that no other process makes the same folder.
///
/// # Errors
///
/// `folder` exists and holds something else, a picture is damaged or missing, a file cannot be
/// written, or the program is interrupted.
pub fn write_pictures(
    folder: &Path,
    form: Form,
    clusters: &[Cluster],
    names: &Names,
    interrupt: &Interrupt,
) -> Result<()> {
    let reduced = Cell::new(0);
    let sorted = SortedPictures { form, clusters, names, interrupt, reduced: &reduced };
    if folder.exists() {
        if sorted.are_in(folder)? {
            return Ok(());
        }
        bail!(
            "`{}` exists and holds other pictures, perhaps sorted by hand; move it away, or use \
             another folder",
            folder.display()
        );
    }
    let incomplete = remove_incomplete(folder)?;
    sorted.write(&incomplete)?;
    fs::rename(&incomplete, folder).with_context(|| format!("creating `{}`", folder.display()))?;
    sorted.warn_of_reduced(folder);
    Ok(())
}

/// Removes the incomplete folder that a killed process left beside `folder`, and returns its path. The
/// caller holds the claim on the report.
pub fn remove_incomplete(folder: &Path) -> Result<PathBuf> {
    let mut incomplete = folder.as_os_str().to_owned();
    incomplete.push(".incomplete");
    let incomplete = PathBuf::from(incomplete);
    if incomplete.exists() {
        fs::remove_dir_all(&incomplete)
            .with_context(|| format!("removing `{}`", incomplete.display()))?;
    }
    Ok(incomplete)
}

/// How a picture is placed in the folder of its cluster.
#[derive(Debug, Clone, Copy)]
pub enum Form<'a> {
    /// A copy: the original file, or a PNG file if it is stored as raw pixels.
    ///
    /// Of a picture that is stored smaller than it is, the file below `source`, the folder that the
    /// pictures were read from, while that has the same content; else the smaller one, with a warning.
    Copy {
        /// The prepared pictures.
        images: &'a Images,
        /// Where they were read from, if that is known.
        source: Option<&'a Path>,
    },
    /// A symbolic link to the file below this folder, which the pictures were read from.
    LinkTo(&'a Path),
}

/// A file of a cluster's folder.
enum Placed {
    Bytes(Vec<u8>),
    Link(PathBuf),
}

impl Placed {
    fn write(&self, path: &Path) -> Result<()> {
        match self {
            Self::Bytes(bytes) => fs::write(path, bytes),
            Self::Link(target) => link(target, path),
        }
        .with_context(|| format!("writing `{}`", path.display()))
    }

    fn is_at(&self, path: &Path) -> Result<bool> {
        let found = match self {
            Self::Bytes(bytes) => fs::read(path).map(|found| found == *bytes),
            Self::Link(target) => fs::read_link(path).map(|found| found == *target),
        };
        match found {
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidInput) => {
                Ok(false)
            }
            found => found.with_context(|| format!("reading `{}`", path.display())),
        }
    }
}

#[cfg(unix)]
fn link(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(windows)]
fn link(target: &Path, path: &Path) -> io::Result<()> {
    std::os::windows::fs::symlink_file(target, path)
}

/// The pictures of all clusters and the form in which they are written.
struct SortedPictures<'a> {
    form: Form<'a>,
    clusters: &'a [Cluster],
    names: &'a Names,
    interrupt: &'a Interrupt,
    /// How many pictures were copied smaller than they are.
    reduced: &'a Cell<usize>,
}

impl SortedPictures<'_> {
    fn write(&self, folder: &Path) -> Result<()> {
        for cluster in self.clusters {
            let folder = folder.join(self.folder_name(cluster));
            fs::create_dir_all(&folder)
                .with_context(|| format!("creating `{}`", folder.display()))?;
        }
        self.each(|path, placed| placed.write(&folder.join(path)).map(|()| true))?;
        Ok(())
    }

    /// Tests whether `folder` holds these pictures and no other file.
    fn are_in(&self, folder: &Path) -> Result<bool> {
        let count: usize = self.clusters.iter().map(|cluster| cluster.members.len()).sum();
        let names: Vec<String> = self.clusters.iter().map(|c| self.folder_name(c)).collect();
        let mut found = 0;
        for entry in entries(folder)? {
            let path = entry?.path();
            if !names.iter().any(|name| path.ends_with(name)) || !path.is_dir() {
                return Ok(false);
            }
            found += entries(&path)?.count();
        }
        Ok(found == count && self.each(|path, placed| placed.is_at(&folder.join(path)))?)
    }

    /// Calls `visit` with the path of each picture, relative to the folder, and what is placed there,
    /// until it returns `false`. Returns whether all were visited.
    fn each(&self, mut visit: impl FnMut(&Path, &Placed) -> Result<bool>) -> Result<bool> {
        let largest = self.clusters.iter().map(|cluster| cluster.members.len()).max();
        let digits = digits(largest.unwrap_or(0));
        self.reduced.set(0);
        for cluster in self.clusters {
            let folder = PathBuf::from(self.folder_name(cluster));
            for (rank, member) in (1..).zip(&cluster.members) {
                self.interrupt.check()?;
                let name = &self.names.names[member.row as usize];
                let path = folder.join(format!("{rank:0digits$}-{}", file_name(name)));
                let (path, placed) = match self.form {
                    Form::Copy { images, source } => {
                        let (bytes, extensions) = self.file(images, source, member)?;
                        (with_extension(path, extensions), Placed::Bytes(bytes))
                    }
                    Form::LinkTo(source) => (path, Placed::Link(original(source, name)?)),
                };
                if !visit(&path, &placed)? {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Returns the bytes of a picture's file, and the extensions that it may have.
    fn file(
        &self,
        images: &Images,
        source: Option<&Path>,
        member: &ClusterMember,
    ) -> Result<(Vec<u8>, &'static [&'static str])> {
        let row = member.row;
        if images.is_reduced(row)? {
            let name = &self.names.names[row as usize];
            let own = source.and_then(|source| unchanged(&source.join(name), images.id(row).ok()?));
            if let Some((encoding, bytes)) = own {
                return Ok((bytes, extensions(encoding)));
            }
            self.reduced.set(self.reduced.get() + 1);
        }
        if let Some((encoding, bytes)) = images.file(row)? {
            return Ok((bytes.to_vec(), extensions(encoding)));
        }
        let picture = thumbnail::to_image(&*images.picture(row)?)?;
        let mut bytes = Cursor::new(Vec::new());
        picture.write_to(&mut bytes, ImageFormat::Png)?;
        Ok((bytes.into_inner(), extensions(Encoding::Raw)))
    }

    fn warn_of_reduced(&self, folder: &Path) {
        if let (Form::Copy { images, source }, reduced @ 1..) = (self.form, self.reduced.get()) {
            let reason = match source {
                Some(source) => format!("`{}` no longer has the original files", source.display()),
                None => "the original files are not in a folder".to_owned(),
            };
            tracing::warn!(
                "{reduced} copies in `{}` are reduced to a shorter side of {} pixels: {reason}",
                folder.display(),
                images.reduced_side().unwrap_or(0)
            );
        }
    }

    fn folder_name(&self, cluster: &Cluster) -> String {
        let clusters = self.clusters.iter().filter(|cluster| cluster.mark.is_none());
        let digits = digits(clusters.map(|cluster| cluster.number).max().unwrap_or(0));
        match (cluster.mark, &cluster.name) {
            (Some(PictureMark::Wrong), _) => "wrong".to_owned(),
            (Some(PictureMark::Outlier), _) => "outliers".to_owned(),
            (None, None) => format!("{:0digits$}", cluster.number),
            (None, Some(name)) => format!("{:0digits$}-{}", cluster.number, plain_name(name)),
        }
    }
}

/// The encoding and bytes of the file at `path`, if that is a picture with this digest.
fn unchanged(path: &Path, id: Id) -> Option<(Encoding, Vec<u8>)> {
    let bytes = fs::read(path).ok()?;
    let encoding = Encoding::of(&bytes)?;
    (Sha256::digest(&bytes)[..] == id).then_some((encoding, bytes))
}

/// The file that a picture was read from.
fn original(source: &Path, name: &str) -> Result<PathBuf> {
    let path =
        absolute(source).with_context(|| format!("finding `{}`", source.display()))?.join(name);
    ensure!(
        path.is_file(),
        "cannot link to the picture `{name}`: there is no file `{}`, because it came from an \
         archive, was moved, or its name is not UTF-8; copy the pictures with --copy-to instead",
        path.display()
    );
    Ok(path)
}

fn entries(folder: &Path) -> Result<fs::ReadDir> {
    fs::read_dir(folder).with_context(|| format!("reading `{}`", folder.display()))
}

/// Number of decimal digits.
fn digits(count: usize) -> usize {
    count.max(1).ilog10() as usize + 1
}

/// Returns the extensions of an encoding; the first is added to a name that has none of them.
fn extensions(encoding: Encoding) -> &'static [&'static str] {
    match encoding {
        Encoding::Jpeg => &["jpg", "jpeg"],
        Encoding::Png | Encoding::Raw => &["png"],
        Encoding::WebP => &["webp"],
    }
}

fn with_extension(path: PathBuf, known: &[&str]) -> PathBuf {
    let found = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    if found.is_some_and(|found| known.contains(&found.as_str())) {
        return path;
    }
    let mut name = path.into_os_string();
    name.push(".");
    name.push(known[0]);
    name.into()
}

/// Makes a file name from the last part of a name: without characters that some file system refuses,
/// and at most the last 100 characters. A `#` may be part of it, and so may a `\`, which begins the escape
/// of a byte that is not UTF-8.
fn file_name(name: &str) -> String {
    let last = name.rsplit('/').find(|part| !part.is_empty()).unwrap_or("picture");
    let characters: Vec<char> = last.chars().map(safe).collect();
    characters[characters.len().saturating_sub(100)..].iter().collect()
}

/// Makes the end of a folder's name from the name of a cluster. It has at most 100 characters, and at most
/// 200 bytes: file systems allow 255.
fn plain_name(name: &str) -> String {
    let mut plain: String = name.chars().map(safe).collect();
    plain.truncate(plain.floor_char_boundary(200));
    plain.trim_end_matches(['.', ' ']).to_owned() // Windows removes them.
}

/// Replaces what some file system refuses in a name.
fn safe(c: char) -> char {
    match c {
        '<' | '>' | ':' | '"' | '|' | '?' | '*' | '/' | '\\' => '_',
        c if c.is_control() => '_',
        c => c,
    }
}

#[cfg(test)]
mod tests {
    use data::images::{self, StoredPicture};
    use stage::Split;

    use super::*;
    use crate::tests::{labels, names, prepared};

    #[test]
    fn the_table_names_every_picture_with_its_cluster() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join(TABLE);
        write_table(&path, &Cluster::all(&labels()), &names())?;
        assert_eq!(
            fs::read_to_string(&path)?,
            "name,cluster,confidence,score,reliable,cluster-name,mark\n\
             photos/5.png,0,0.7500,0.7000,true,,\n\
             photos/1.png,0,0.5000,0.5000,true,,\n\
             \"photos/6, again.png\",0,0.5000,0.5000,false,,\n\
             <photos>/0.png,0,0.7500,0.2500,false,,\n\
             photos/3.png,2,1.0000,1.0000,true,,\n"
        );
        let mut clusters = Cluster::all(&labels());
        clusters[0].name = Some("=a,b".into());
        clusters[2].mark = Some(PictureMark::Outlier);
        write_table(&path, &clusters, &names())?;
        let table = fs::read_to_string(&path)?;
        assert!(table.contains("photos/1.png,0,0.5000,0.5000,true,\"'=a,b\",\n"), "{table}");
        assert!(table.ends_with("photos/3.png,,1.0000,1.0000,true,,outlier\n"), "{table}");
        Ok(())
    }

    /// Writes copies of all pictures.
    fn write(out: &Path, images: &Images, names: &Names) -> Result<()> {
        let clusters = Cluster::all(&labels());
        let form = Form::Copy { images, source: None };
        write_pictures(out, form, &clusters, names, &Interrupt::default())
    }

    #[test]
    fn folders_have_the_names_of_clusters_and_marks() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, names) = prepared(folder.path())?;
        let mut clusters = Cluster::all(&labels());
        clusters[0].name = Some("../Dogs: <b>. ".into());
        clusters[1].name = Some("ä".repeat(150));
        clusters[1].number = 11;
        clusters[2].mark = Some(PictureMark::Wrong);
        let outliers =
            Cluster { mark: Some(PictureMark::Outlier), members: vec![], ..clusters[2].clone() };
        clusters.push(outliers);
        let out = folder.path().join(PICTURES);
        let form = Form::Copy { images: &images, source: None };
        for _ in 0..2 {
            write_pictures(&out, form, &clusters, &names, &Interrupt::default())?;
        }
        let mut found: Vec<String> = entries(&out)?
            .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
            .collect::<Result<_>>()?;
        found.sort();
        let long = format!("11-{}", "ä".repeat(100));
        assert_eq!(found, ["00-.._Dogs_ _b_", &long, "outliers", "wrong"]);
        assert_eq!(entries(&out.join("wrong"))?.count(), 1);
        Ok(())
    }

    #[test]
    fn files_are_copied_unchanged_and_raw_pixels_as_png() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, names) = prepared(folder.path())?;
        let out = folder.path().join(PICTURES);
        write(&out, &images, &names)?;
        let mut found: Vec<String> = Vec::new();
        for cluster in ["0", "1", "2"] {
            for entry in fs::read_dir(out.join(cluster))? {
                found.push(format!("{cluster}/{}", entry?.file_name().to_string_lossy()));
            }
        }
        found.sort();
        assert_eq!(found, ["0/1-5.png", "0/2-1.png", "0/3-6, again.png", "0/4-0.png", "2/1-3.png"]);
        let mut as_found = 0;
        for (file, row) in found.iter().zip([5, 1, 6, 0, 3]) {
            let copy = fs::read(out.join(file))?;
            assert_eq!(data::picture::decode(&copy, 1)?, *images.picture(row)?, "{file}");
            if let Some((_, bytes)) = images.file(row)? {
                assert_eq!(copy, bytes, "{file}");
                as_found += 1;
            }
        }
        assert!((1..5).contains(&as_found), "some came as files, some as pixels: {as_found}");
        Ok(())
    }

    #[test]
    fn the_original_of_a_reduced_picture_is_copied_while_it_is_unchanged() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (source, path) = (folder.path().join("source"), folder.path().join("images"));
        fs::create_dir_all(source.join("photos"))?;
        let (mut names, mut files, mut stored) = (names(), Vec::new(), Vec::new());
        for (number, name) in names.names.iter_mut().enumerate() {
            *name = format!("photos/{number}.png");
            let pixels = (0..20 * 30).map(|i| (i * i * (3 + number) % 251) as u8).collect();
            let mut file = Cursor::new(Vec::new());
            let picture = data::Picture::new(20, 30, 1, pixels)?;
            thumbnail::to_image(&picture)?.write_to(&mut file, ImageFormat::Png)?;
            files.push(file.into_inner());
            fs::write(source.join(&*name), &files[number])?;
            let small = StoredPicture::file_within(files[number].clone(), 1, 10)?;
            stored.push((small, Split::Train));
        }
        images::write(&path, 1, stored)?;
        let images = Images::open(&path)?;
        let by_row: Vec<usize> = (0..7u32)
            .map(|row| {
                let id = images.id(row).expect("there");
                let is_it = |file: &Vec<u8>| Sha256::digest(file)[..] == id;
                files.iter().position(is_it).expect("a file")
            })
            .collect();
        names.names = by_row.iter().map(|number| format!("photos/{number}.png")).collect();
        let copy = |out: &str, source: Option<&Path>| -> Result<Vec<Vec<u8>>> {
            let (out, form) = (folder.path().join(out), Form::Copy { images: &images, source });
            let clusters = Cluster::all(&labels());
            write_pictures(&out, form, &clusters, &names, &Interrupt::default())?;
            let mut found: Vec<PathBuf> = fs::read_dir(out.join("0"))?
                .map(|entry| Ok(entry?.path()))
                .collect::<io::Result<_>>()?;
            found.sort();
            found.into_iter().map(|path| Ok(fs::read(path)?)).collect()
        };
        // Rows of cluster 0 by falling score, as in the table.
        let rows = [5, 1, 6, 0];
        let originals = rows.map(|row: usize| files[by_row[row]].clone());
        assert_eq!(copy("all", Some(&source))?, originals);
        let small = rows.map(|row| images.file(row as u32).map(|f| f.expect("a file").1.to_vec()));
        let small = small.into_iter().collect::<Result<Vec<_>>>()?;
        assert_eq!(copy("none", None)?, small);
        // One file is gone and another has changed.
        fs::remove_file(source.join(&names.names[5]))?;
        fs::write(source.join(&names.names[1]), &files[by_row[6]])?;
        let mixed = [&small[0], &small[1], &originals[2], &originals[3]].map(Vec::clone);
        assert_eq!(copy("some", Some(&source))?, mixed);
        Ok(())
    }

    #[test]
    fn an_incomplete_copy_is_replaced_and_a_complete_one_is_left_alone() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, names) = prepared(folder.path())?;
        let out = folder.path().join(PICTURES);
        // The state after a process was killed.
        let incomplete = folder.path().join("pictures.incomplete");
        fs::create_dir_all(incomplete.join("0"))?;
        fs::write(incomplete.join("0/9-9.png"), "half")?;
        write(&out, &images, &names)?;
        assert!(!out.join("0/9-9.png").exists() && !incomplete.exists());
        fs::create_dir(&incomplete)?;
        assert_eq!(remove_incomplete(&out)?, incomplete);
        assert!(!incomplete.exists());
        let written = |path: &str| fs::metadata(out.join(path)).and_then(|file| file.modified());
        let before = written("0/4-0.png")?;
        write(&out, &images, &names)?;
        assert_eq!(written("0/4-0.png")?, before);
        Ok(())
    }

    #[test]
    fn a_folder_of_other_pictures_is_not_touched() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, names) = prepared(folder.path())?;
        let out = folder.path().join(PICTURES);
        write(&out, &images, &names)?;
        let refused = || {
            let error = write(&out, &images, &names).expect_err("other pictures").to_string();
            assert!(error.contains("sorted by hand") && error.contains("another"), "{error}");
        };
        let (from, to) = (out.join("0/4-0.png"), out.join("2/4-0.png"));
        fs::rename(&from, &to)?; // Sorted by hand.
        refused();
        fs::rename(&to, &from)?;
        fs::write(out.join("0/mine.txt"), "mine")?;
        refused();
        fs::rename(out.join("0/mine.txt"), out.join("mine.txt"))?;
        refused();
        fs::remove_file(out.join("mine.txt"))?;
        fs::write(&from, "changed")?;
        refused();
        assert_eq!(fs::read(&from)?, b"changed");
        Ok(())
    }

    #[cfg(unix)]
    #[test]
    fn links_point_to_the_original_files_and_a_missing_file_is_an_error() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (source, out) = (folder.path().join("source"), folder.path().join("links"));
        let (clusters, names) = (Cluster::all(&labels()), names());
        let interrupt = Interrupt::default();
        let write = || write_pictures(&out, Form::LinkTo(&source), &clusters, &names, &interrupt);
        for name in &names.names {
            let path = source.join(name);
            fs::create_dir_all(path.parent().expect("below the source"))?;
            fs::write(path, name)?;
        }
        write()?;
        assert_eq!(fs::read_to_string(out.join("0/2-1.png"))?, "photos/1.png");
        assert!(out.join("0/2-1.png").is_symlink());
        write()?; // The same links: nothing to do.
        fs::remove_dir_all(&out)?;
        fs::remove_file(source.join("photos/1.png"))?;
        let error = write().expect_err("a file is missing").to_string();
        assert!(error.contains("photos/1.png") && error.contains("--copy-to"), "{error}");
        assert!(!out.exists());
        Ok(())
    }

    #[test]
    fn names_that_look_like_formulas_are_prefixed_and_can_be_read_back() {
        for name in ["=1+1.png", "+a", "-2", "@x", "\tx", "\rx", "\nx", "＝1", "'x", "'=1"] {
            let written = without_formula(name);
            assert_eq!(written.strip_prefix('\''), Some(name));
        }
        for name in ["a=1.png", "photos/-2.png", "", "0"] {
            assert_eq!(without_formula(name), name);
        }
    }

    #[test]
    fn names_become_file_names() {
        for (name, want) in [
            ("a/b/c.JPG", "c.JPG"),
            ("a.zip#b/c d.png", "c d.png"),
            ("train-images-idx3-ubyte.gz#17", "train-images-idx3-ubyte.gz#17"),
            ("a/trip #3.jpg", "trip #3.jpg"),
            ("new\\x0Aline.jpg", "new_x0Aline.jpg"), // As `prepare` names it.
            ("..\\x?:*.png", ".._x___.png"),
            ("a\n.png", "a_.png"),
            ("", "picture"),
            ("a/", "a"),
        ] {
            assert_eq!(file_name(name), want);
        }
        assert_eq!(file_name(&"ä".repeat(300)).chars().count(), 100);
        let jpeg = extensions(Encoding::Jpeg);
        assert_eq!(with_extension("1-c.JPG".into(), jpeg), Path::new("1-c.JPG"));
        assert_eq!(with_extension("1-c.png".into(), jpeg), Path::new("1-c.png.jpg"));
        assert_eq!(with_extension("1-17".into(), &["png"]), Path::new("1-17.png"));
    }
}
