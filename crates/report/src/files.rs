//! What a program can read: `clusters.csv`, and a folder of pictures for each cluster.

use std::fs;
use std::io::Cursor;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use data::picture::Encoding;
use data::{Images, Names};
use image::ImageFormat;

use crate::clusters::Cluster;
use crate::thumbnail;

/// Name of the table in the folder of a report.
pub const TABLE: &str = "clusters.csv";
/// Name of the folder of pictures in it.
pub const PICTURES: &str = "pictures";

/// Writes `clusters.csv`, UTF-8 with a header: `name` as in `names.safetensors`, `cluster`,
/// `confidence` and `score` in `[0, 1]`, `reliable` as `true` or `false`. By cluster, and there by
/// falling score.
///
/// # Errors
///
/// The file cannot be written.
pub fn write_table(path: &Path, clusters: &[Cluster], names: &Names) -> Result<()> {
    let mut table = csv::Writer::from_writer(Vec::new());
    table.write_record(["name", "cluster", "confidence", "score", "reliable"])?;
    for cluster in clusters {
        for member in &cluster.members {
            table.write_record([
                names.names[member.row as usize].as_str(),
                &cluster.number.to_string(),
                &format!("{:.4}", member.confidence),
                &format!("{:.4}", member.score),
                &member.reliable.to_string(),
            ])?;
        }
    }
    stage::files::write(path, &table.into_inner().context("closing the table")?)
}

/// Copies every picture to `<folder>/<cluster>/<rank>-<name>`: the file as it was found, or a PNG
/// file where it came as pixels. Ranks begin at 1 with the surest.
///
/// The folder appears when it is complete.
///
/// # Errors
///
/// It is there already, a picture is damaged, or a file cannot be written.
pub fn copy_pictures(
    folder: &Path,
    clusters: &[Cluster],
    images: &Images,
    names: &Names,
) -> Result<()> {
    ensure!(
        !folder.exists(),
        "`{}` is there already, and may hold what you sorted by hand; move it away, or name another \
         folder with --out",
        folder.display()
    );
    let partial = folder.with_extension("partial");
    if partial.exists() {
        fs::remove_dir_all(&partial)
            .with_context(|| format!("removing `{}`", partial.display()))?;
    }
    let digits = |count: usize| count.max(1).ilog10() as usize + 1;
    let largest = clusters.iter().map(|cluster| cluster.members.len()).max().unwrap_or(0);
    let (cluster_digits, rank_digits) = (digits(clusters.len().saturating_sub(1)), digits(largest));
    for cluster in clusters {
        let folder = partial.join(format!("{:0cluster_digits$}", cluster.number));
        fs::create_dir_all(&folder).with_context(|| format!("creating `{}`", folder.display()))?;
        for (rank, member) in (1..).zip(&cluster.members) {
            let name = file_name(&names.names[member.row as usize]);
            let path = folder.join(format!("{rank:0rank_digits$}-{name}"));
            let (path, written) = match images.file(member.row)? {
                Some((encoding, bytes)) => {
                    let path = with_extension(path, extensions(encoding));
                    let written = fs::write(&path, bytes);
                    (path, written)
                }
                None => {
                    let picture = thumbnail::to_image(&*images.picture(member.row)?)?;
                    let mut bytes = Cursor::new(Vec::new());
                    picture.write_to(&mut bytes, ImageFormat::Png)?;
                    let path = with_extension(path, &["png"]);
                    let written = fs::write(&path, bytes.into_inner());
                    (path, written)
                }
            };
            written.with_context(|| format!("writing `{}`", path.display()))?;
        }
    }
    fs::rename(&partial, folder).with_context(|| format!("creating `{}`", folder.display()))
}

/// The extensions that files of an encoding bear; the first is added where none of them is there.
fn extensions(encoding: Encoding) -> &'static [&'static str] {
    match encoding {
        Encoding::Jpeg => &["jpg", "jpeg"],
        Encoding::Png | Encoding::Raw => &["png"],
        Encoding::WebP => &["webp"],
    }
}

fn with_extension(path: std::path::PathBuf, known: &[&str]) -> std::path::PathBuf {
    let found = path.extension().map(|extension| extension.to_string_lossy().to_lowercase());
    if found.is_some_and(|found| known.contains(&found.as_str())) {
        return path;
    }
    let mut name = path.into_os_string();
    name.push(".");
    name.push(known[0]);
    name.into()
}

/// The last part of a name, with nothing in it that some file system takes amiss, and at most 100
/// characters, the last ones.
fn file_name(name: &str) -> String {
    let last = name.rsplit(['/', '\\', '#']).find(|part| !part.is_empty()).unwrap_or("picture");
    let harmless = |c: char| match c {
        '<' | '>' | ':' | '"' | '|' | '?' | '*' => '_',
        c if c.is_control() => '_',
        c => c,
    };
    let characters: Vec<char> = last.chars().map(harmless).collect();
    characters[characters.len().saturating_sub(100)..].iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::{labels, names, prepared};

    #[test]
    fn the_table_names_every_picture_with_its_cluster() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let path = folder.path().join(TABLE);
        write_table(&path, &Cluster::all(&labels()), &names())?;
        assert_eq!(
            fs::read_to_string(&path)?,
            "name,cluster,confidence,score,reliable\n\
             photos/5.png,0,0.7500,0.7000,true\n\
             photos/1.png,0,0.5000,0.5000,true\n\
             \"photos/6, again.png\",0,0.5000,0.5000,false\n\
             <photos>/0.png,0,0.7500,0.2500,false\n\
             photos/3.png,2,1.0000,1.0000,true\n"
        );
        Ok(())
    }

    #[test]
    fn pictures_are_copied_as_they_were_found_and_pixels_as_png() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, names) = prepared(folder.path())?;
        let out = folder.path().join(PICTURES);
        copy_pictures(&out, &Cluster::all(&labels()), &images, &names)?;
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
    fn what_is_there_is_not_touched_but_what_was_left_half_done() -> Result<()> {
        let folder = tempfile::tempdir()?;
        let (images, names) = prepared(folder.path())?;
        let (out, clusters) = (folder.path().join(PICTURES), Cluster::all(&labels()));
        fs::create_dir_all(out.with_extension("partial").join("0"))?;
        fs::write(out.with_extension("partial").join("0/9-9.png"), "half")?;
        copy_pictures(&out, &clusters, &images, &names)?;
        assert!(!out.join("0/9-9.png").exists());
        fs::write(out.join("0/mine.txt"), "sorted by hand")?;
        let error = copy_pictures(&out, &clusters, &images, &names).expect_err("there").to_string();
        assert!(error.contains("is there already") && error.contains("--out"), "{error}");
        assert!(out.join("0/mine.txt").exists());
        Ok(())
    }

    #[test]
    fn names_become_names_of_files() {
        for (name, want) in [
            ("a/b/c.JPG", "c.JPG"),
            ("a.zip#b/c d.png", "c d.png"),
            ("train-images-idx3-ubyte.gz#17", "17"),
            ("..\\x?:*.png", "x___.png"),
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
