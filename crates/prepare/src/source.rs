//! What kind of source a path is.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};

use crate::archive::Holds;
use crate::collection::Collection;
use crate::folder::{Listing, SOURCE, contents, file_name};
use crate::idx::Pair;
use crate::{Config, Format, archive, cifar, folder, idx};

/// A source, looked at but not yet read.
#[derive(Debug)]
pub enum Source {
    /// IDX files, a pair for each split.
    Idx(Vec<Pair>),
    /// A folder with the binary files of CIFAR.
    Cifar(Vec<PathBuf>, Format),
    /// A folder of pictures.
    Folder(Listing),
    /// An archive with the binary files of CIFAR.
    CifarArchive(PathBuf, Format),
    /// An archive of pictures.
    PictureArchive(PathBuf),
}

impl Source {
    /// Looks at `path`: the format that the experiment names, or whichever it turns out to be.
    ///
    /// # Errors
    ///
    /// There is nothing of that format; the message says what there is instead, and what to do.
    pub fn recognise(path: &Path, config: &Config) -> Result<Self> {
        let context = || {
            format!(
                "opening the source `{}`; name where the pictures lie with {SOURCE}",
                path.display()
            )
        };
        match fs::metadata(path).with_context(context)?.is_dir() {
            true => Self::folder(path, config),
            false => Self::file(path, config.format),
        }
    }

    fn folder(path: &Path, config: &Config) -> Result<Self> {
        let format = config.format;
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
        if let Format::Auto | Format::Folder = format {
            return Ok(Self::Folder(folder::list(path, config)?));
        }
        let wanted = match format {
            Format::Idx => "no IDX files, such as train-images-idx3-ubyte.gz",
            Format::Tar => "no archive: it is a folder",
            _ => "no binary files of CIFAR, such as data_batch_1.bin or train.bin",
        };
        let files = contents(path)?;
        let first = files.files.iter().chain(&files.folders).next();
        bail!(
            "`{}` is {wanted}{}; name another source with {SOURCE}, or set `format = \"auto\"`",
            path.display(),
            first.map(|first| format!(" (it holds `{}`)", file_name(first))).unwrap_or_default()
        )
    }

    fn file(path: &Path, format: Format) -> Result<Self> {
        let name = file_name(path);
        ensure!(
            !name.contains("idx1") && !name.contains("idx3") && !name.ends_with(".bin"),
            "`{}` is one file of several; name the folder it lies in with {SOURCE}",
            path.display()
        );
        ensure!(
            !matches!(format, Format::Idx | Format::Folder),
            "`{}` is a file, and `format` asks for a folder; name the folder with {SOURCE}, or set \
             `format = \"auto\"`",
            path.display()
        );
        match (archive::recognise(path)?, format) {
            (Holds::Pictures, Format::Cifar | Format::Cifar20) => bail!(
                "`{}` holds pictures, not the binary files of CIFAR; set `format = \"auto\"`",
                path.display()
            ),
            (Holds::Pictures, _) => Ok(Self::PictureArchive(path.to_owned())),
            (Holds::Cifar, _) => Ok(Self::CifarArchive(path.to_owned(), format)),
        }
    }

    /// How many pictures it says it has; none where only reading tells.
    pub fn expected(&self) -> usize {
        match self {
            Self::Idx(pairs) => pairs.iter().map(|pair| pair.count).sum(),
            Self::Folder(listing) => listing.count(),
            Self::Cifar(..) | Self::CifarArchive(..) | Self::PictureArchive(_) => 0,
        }
    }

    /// What it is, for the person who reads the log.
    pub fn description(&self) -> String {
        match self {
            Self::Idx(_) => format!("a folder of IDX files, {} pictures", self.expected()),
            Self::Folder(listing) if listing.classes() == 0 => {
                format!("a flat folder of {} pictures", listing.count())
            }
            Self::Folder(listing) => {
                format!("a folder of {} pictures in {} classes", listing.count(), listing.classes())
            }
            Self::Cifar(..) => "a folder of CIFAR's binary files".into(),
            Self::CifarArchive(..) => "an archive of CIFAR's binary files".into(),
            Self::PictureArchive(_) => "an archive of pictures".into(),
        }
    }

    /// Hands all pictures over.
    ///
    /// # Errors
    ///
    /// The source is damaged.
    pub fn read(&self, collection: &mut Collection) -> Result<()> {
        match self {
            Self::Idx(pairs) => pairs.iter().try_for_each(|pair| pair.read(collection)),
            Self::Cifar(files, format) => cifar::read(files, *format, collection),
            Self::Folder(listing) => listing.read(collection),
            Self::CifarArchive(path, format) => archive::read_cifar(path, *format, collection),
            Self::PictureArchive(path) => archive::read_pictures(path, collection),
        }
    }
}
