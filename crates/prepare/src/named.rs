//! Downloads published data sets by name, such as `named://cifar-10`.
//!
//! Each file of a set has a list of addresses, which are tried in order, and a digest: an MD5 from
//! the publisher or from torchvision, or the SHA-256 of the file that this project's results were
//! made with. Files are cached in the folder `assort` of the user's cache folder, and their digest
//! is checked on every use. The terms of each set are in `data/README.md`.

use std::path::PathBuf;

use anyhow::{Context, Result};
use hub::http::{self, Checksum, Client, Expected};

use crate::Interrupt;
use crate::folder::SOURCE;

/// A published data set.
#[derive(Debug)]
pub struct Set {
    /// Its name after `named://`.
    pub name: &'static str,
    files: &'static [Published],
    /// The folder of training pictures in the archive.
    within: &'static str,
}

#[derive(Debug)]
struct Published {
    name: &'static str,
    /// Its addresses, without the file name.
    places: &'static [&'static str],
    bytes: Option<u64>,
    digest: Digest,
}

#[derive(Debug)]
enum Digest {
    Md5(&'static str),
    Sha256(&'static str),
}

const TORONTO: &[&str] = &["https://www.cs.toronto.edu/~kriz/", "http://www.cs.toronto.edu/~kriz/"];

const ZALANDO: &[&str] = &[
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
];

const FAST_AI: &[&str] = &["https://s3.amazonaws.com/fast-ai-imageclas/"];

const fn md5(
    name: &'static str,
    places: &'static [&'static str],
    bytes: Option<u64>,
    digest: &'static str,
) -> Published {
    Published { name, places, bytes, digest: Digest::Md5(digest) }
}

const fn sha256(
    name: &'static str,
    places: &'static [&'static str],
    digest: &'static str,
) -> Published {
    Published { name, places, bytes: None, digest: Digest::Sha256(digest) }
}

/// All sets.
pub const SETS: [Set; 8] = [
    Set {
        name: "cifar-10",
        files: &[md5("cifar-10-binary.tar.gz", TORONTO, None, "c32a1d4ab5d03f1284b67883e8d87530")],
        within: "",
    },
    Set {
        name: "cifar-100",
        files: &[md5("cifar-100-binary.tar.gz", TORONTO, None, "03b5dce01913d631647c71ecec9e9cb8")],
        within: "",
    },
    Set {
        name: "stl-10",
        files: &[md5(
            "stl10_binary.tar.gz",
            &["http://ai.stanford.edu/~acoates/stl10/", "https://cs.stanford.edu/~acoates/stl10/"],
            None,
            "91f7769df0f17e558f3565bffb0c7dfb",
        )],
        within: "",
    },
    Set {
        name: "fashion-mnist",
        files: &[
            sha256(
                "train-images-idx3-ubyte.gz",
                ZALANDO,
                "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
            ),
            sha256(
                "train-labels-idx1-ubyte.gz",
                ZALANDO,
                "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
            ),
            sha256(
                "t10k-images-idx3-ubyte.gz",
                ZALANDO,
                "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
            ),
            sha256(
                "t10k-labels-idx1-ubyte.gz",
                ZALANDO,
                "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
            ),
        ],
        within: "",
    },
    Set {
        name: "tiny-imagenet",
        files: &[md5(
            "tiny-imagenet-200.zip",
            &["http://cs231n.stanford.edu/", "https://cs231n.stanford.edu/"],
            Some(248_100_043),
            "90528d7ca1a48142e341f4ef8d21d0de",
        )],
        within: "tiny-imagenet-200/train",
    },
    Set {
        name: "imagenette",
        files: &[md5("imagenette2.tgz", FAST_AI, None, "fe2fc210e6bb7c5664d602c3cd71e612")],
        within: "imagenette2/train",
    },
    Set {
        name: "imagenette-320",
        files: &[md5("imagenette2-320.tgz", FAST_AI, None, "3df6f0d01a2c9592104656642f5e78a3")],
        within: "imagenette2-320/train",
    },
    Set {
        name: "imagenette-160",
        files: &[md5("imagenette2-160.tgz", FAST_AI, None, "e793b78cc4c9e9a4ccc0c1155377a412")],
        within: "imagenette2-160/train",
    },
];

/// Returns the set of this name.
///
/// # Errors
///
/// There is no such set; the message lists all names.
pub fn find(name: &str) -> Result<&'static Set> {
    SETS.iter().find(|set| set.name == name).with_context(|| {
        let names: Vec<&str> = SETS.iter().map(|set| set.name).collect();
        format!("no set `named://{name}`; the sets are {}", names.join(", "))
    })
}

/// Downloads the missing files of a set. Returns the path of its archive or folder, and the folder
/// within the archive to read.
///
/// # Errors
///
/// There is no such set, or no address has the expected file.
pub fn fetch(name: &str, interrupt: Interrupt) -> Result<(PathBuf, String)> {
    let set = find(name)?;
    let folder = http::cache_folder()?.join("assort").join(name);
    let client = Client::new(interrupt);
    let advice = format!("download it yourself and pass it with {SOURCE}");
    for file in set.files {
        let urls = file.places.iter().map(|place| format!("{place}{}", file.name));
        http::fetch_file(&client, urls, &expected(file), &folder.join(file.name), &advice)?;
    }
    let path = match set.files {
        [file] => folder.join(file.name),
        _ => folder,
    };
    Ok((path, set.within.to_owned()))
}

fn expected(file: &Published) -> Expected {
    let digest = match file.digest {
        Digest::Md5(digest) => Checksum::Md5(digest.to_owned()),
        Digest::Sha256(digest) => Checksum::Sha256(digest.to_owned()),
    };
    Expected { bytes: file.bytes, digest }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_set_has_places_and_a_digest_of_the_right_length() {
        for set in &SETS {
            assert!(!set.files.is_empty() && find(set.name).expect("there").name == set.name);
            for file in set.files {
                assert!(!file.places.is_empty() && file.places.iter().all(|p| p.ends_with('/')));
                let (digest, digits) = match file.digest {
                    Digest::Md5(digest) => (digest, 32),
                    Digest::Sha256(digest) => (digest, 64),
                };
                assert!(digest.len() == digits, "{}", file.name);
                assert!(digest.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')));
            }
        }
        let message = find("cifar").expect_err("no such set").to_string();
        assert!(message.contains("cifar-10, cifar-100"), "{message}");
    }
}
