//! Recognises files of unsupported formats and says what to do with them.

/// An unsupported kind of file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Foreign {
    /// What it is, with its article.
    pub what: &'static str,
    /// What to do with it.
    pub remedy: &'static str,
}

const CONVERT: &str = "only JPEG, PNG and WebP are supported; convert it";
const RENDER: &str = "render it as PNG";
const UNPACK: &str = "unpack it";
const EXPORT: &str =
    "write its pictures as files, in a folder for each class, or as bytes in a Parquet file";
const AS_PARQUET: &str = "write it as Parquet, in Python with `Dataset.to_parquet` or `pyarrow`";
const AS_MANIFEST: &str =
    "write it as CSV with a column `path` and, if the classes are known, a column `label`";
const AS_LIST: &str = "if it lists the paths of pictures, one per line, rename it to end in .csv";
const FETCH: &str = "get the file itself, in its repository with `git lfs pull`";
const DOWNLOAD: &str = "download the file again, if need be in a browser";
const UNENCRYPTED: &str = "write it without encryption";
const UNPICKLE: &str = "reading one can run any code; take the set in another form";

impl Foreign {
    /// Whether it is a picture or a raw photograph.
    pub fn is_picture(&self) -> bool {
        self.remedy == CONVERT
    }
}

/// How many bytes of a file [`recognise`] looks at.
pub const START: usize = 512;

/// Kinds by the first bytes of their files; the first match counts.
const BY_START: &[(&[u8], &str, &str)] = &[
    (b"GIF8", "a GIF picture", CONVERT),
    (b"BM", "a BMP picture", CONVERT),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "a JPEG XL picture", CONVERT),
    (b"\xff\x0a", "a JPEG XL picture", CONVERT),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture", CONVERT),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 picture", CONVERT),
    (b"II*\0\x10\0\0\0CR", "a raw photograph of a camera", CONVERT),
    (b"FUJIFILMCCD-RAW", "a raw photograph of a camera", CONVERT),
    (b"IIRO", "a raw photograph of a camera", CONVERT),
    (b"IIU\0", "a raw photograph of a camera", CONVERT),
    (b"FOVb", "a raw photograph of a camera", CONVERT),
    (b"II*\0", "a TIFF picture or a raw photograph of a camera", CONVERT),
    (b"MM\0*", "a TIFF picture or a raw photograph of a camera", CONVERT),
    (b"8BPS", "a Photoshop picture", CONVERT),
    (b"qoif", "a QOI picture", CONVERT),
    (b"\x76\x2f\x31\x01", "an OpenEXR picture", CONVERT),
    (b"%PDF", "a PDF document", EXPORT),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", "a RAR archive", UNPACK),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file", EXPORT),
    (b"MATLAB ", "a MATLAB file", EXPORT),
    (b"\x93NUMPY", "a NumPy array", EXPORT),
    (b"ARROW1", "an Arrow file", AS_PARQUET),
    (b"FEA1", "an Arrow file", AS_PARQUET),
    (b"\xff\xff\xff\xff", "an Arrow file", AS_PARQUET),
    (b"PARE", "an encrypted Parquet file", UNENCRYPTED),
    (b"SQLite format 3\0", "an SQLite database", EXPORT),
    (b"\x80\x02", "a Python pickle", UNPICKLE),
    (b"\x80\x03", "a Python pickle", UNPICKLE),
    (b"\x80\x04", "a Python pickle", UNPICKLE),
    (b"\x80\x05", "a Python pickle", UNPICKLE),
    (b"version https://git-lfs", "a pointer of Git LFS", FETCH),
];

/// Kinds of text by the first bytes after white space, in lower case.
const BY_TEXT: &[(&[u8], &str, &str)] = &[
    (b"<!doctype html", "a web page", DOWNLOAD),
    (b"<html", "a web page", DOWNLOAD),
    (b"<?xml", "an XML document", EXPORT),
    (b"<svg", "an SVG drawing", RENDER),
    (b"{", "a JSON document", AS_MANIFEST),
    (b"[", "a JSON document", AS_MANIFEST),
];

/// Kinds by the ends of their names, for files whose first bytes are ambiguous.
const BY_NAME: &[(&str, &str, &str)] = &[
    (".npz", "an archive of NumPy arrays", EXPORT),
    (".pt", "a file of PyTorch", EXPORT),
    (".pth", "a file of PyTorch", EXPORT),
    (".tfrecord", "a TFRecord file", EXPORT),
    (".tfrecords", "a TFRecord file", EXPORT),
    (".mdb", "an LMDB database", EXPORT),
    (".tga", "a TGA picture", CONVERT),
    (".txt", "a text", AS_LIST),
];

/// Recognises an unsupported file by its first [`START`] bytes and its name. Returns `None` for a
/// file that may be supported.
pub fn recognise(start: &[u8], name: &str) -> Option<Foreign> {
    if is_tar(start) {
        return None;
    }
    let name = name.to_ascii_lowercase();
    let text = start.trim_ascii_start().to_ascii_lowercase();
    let by_start = BY_START.iter().find(|(magic, ..)| start.starts_with(magic));
    let by_text = BY_TEXT.iter().find(|(magic, ..)| text.starts_with(magic));
    let by_name = BY_NAME.iter().find(|(end, ..)| name.ends_with(end));
    let found = of_box(start)
        .or(by_start.or(by_text).map(|&(_, what, remedy)| (what, remedy)))
        .or(by_name.map(|&(_, what, remedy)| (what, remedy)))
        .or(is_pnm(start).then_some(("a PPM, PGM or PBM picture", CONVERT)));
    found.map(|(what, remedy)| Foreign { what, remedy })
}

/// Recognises a file made of boxes (ISO base media) by its brand.
fn of_box(start: &[u8]) -> Option<(&'static str, &'static str)> {
    let brand = start.get(4..12)?.strip_prefix(b"ftyp")?;
    Some(match brand {
        b"avif" | b"avis" => ("an AVIF picture", CONVERT),
        b"crx " => ("a raw photograph of a camera", CONVERT),
        b"heic" | b"heix" | b"heim" | b"heis" | b"hevc" | b"hevx" | b"mif1" | b"msf1" => {
            ("a HEIC picture", CONVERT)
        }
        _ => ("a video", "save some of its frames as pictures"),
    })
}

/// Whether a file begins with a tar header. Its first bytes are then the name of an entry, which
/// may look like any format.
fn is_tar(start: &[u8]) -> bool {
    let Some(header) = start.get(..512) else { return false };
    let stated: String = header[148..156].iter().map(|&byte| char::from(byte)).collect();
    let stated = stated.trim_matches(|sign: char| sign == '\0' || sign == ' ');
    let outside = header[..148].iter().chain(&header[156..]);
    let sum = outside.map(|&byte| u32::from(byte)).sum::<u32>() + 8 * u32::from(b' ');
    u32::from_str_radix(stated, 8) == Ok(sum)
}

/// Whether a file begins with `P1` to `P7` and a space.
fn is_pnm(start: &[u8]) -> bool {
    matches!(start, [b'P', b'1'..=b'7', space, ..] if space.is_ascii_whitespace())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::example::tar;

    #[test]
    fn files_are_recognised_by_bytes_before_names() {
        let cases: [(&[u8], &str, &str); 15] = [
            (b"\0\0\0\x18ftypheic\0\0", "a.jpg", "a HEIC picture"),
            (b"\0\0\0\x20ftypmif1", "a.heif", "a HEIC picture"),
            (b"\0\0\0\x18ftypavif", "a", "an AVIF picture"),
            (b"\0\0\0\x18ftypcrx ", "a.cr3", "a raw photograph of a camera"),
            (b"\0\0\0\x18ftypisom", "a.mp4", "a video"),
            (b"\xff\x0a\xfa", "a.jxl", "a JPEG XL picture"),
            (b"II*\0\x10\0\0\0CR\x02\0", "a.CR2", "a raw photograph of a camera"),
            (b"MM\0*\0", "a.dng", "a TIFF picture or a raw photograph of a camera"),
            (b"P6 4 4 255 ", "a.ppm", "a PPM, PGM or PBM picture"),
            (b"\0\0\x02\0", "a.TGA", "a TGA picture"),
            (b"7z\xbc\xaf\x27\x1c\0\x04", "a.tar", "a 7z archive"),
            (b"\n <!DOCTYPE HTML><title>", "a.zip", "a web page"),
            (b"PK\x03\x04", "a.npz", "an archive of NumPy arrays"),
            (b" {\"path\": \"a.jpg\"}\n", "a.jsonl", "a JSON document"),
            (b"a.jpg\nb.jpg\n", "list.txt", "a text"),
        ];
        for (start, name, what) in cases {
            assert_eq!(recognise(start, name).map(|foreign| foreign.what), Some(what), "{name}");
        }
        // The bytes of a tar archive begin with the name of its first entry.
        for entry in ["BMW/1.jpg", "[b]/1.png", "P6 /1.png", "{0}/1.png", "GIF8/1.png"] {
            assert_eq!(recognise(&tar(&[(entry, b"x")])[..START], "x.tar"), None, "{entry}");
        }
        for (start, name) in [(&b"PK\x03\x04"[..], "a.zip"), (b"a/1.png\0\0", "a"), (b"", "a.tar")]
        {
            assert_eq!(recognise(start, name), None, "{name}");
        }
    }
}
