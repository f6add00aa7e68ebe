//! Short names of published networks.

use anyhow::{Result, ensure};

/// A published network that is known by a short name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NamedNetwork {
    /// The short name.
    pub name: &'static str,
    /// Owner and name of its repository on the hub.
    pub repository: &'static str,
    /// The commit; if `None`, the first one that the cache records.
    pub commit: Option<&'static str>,
    /// SHA-256 of `model.safetensors`, where it is known.
    pub sha256: Option<&'static str>,
    /// Bytes to download, about.
    pub bytes: u64,
    /// The licence of the weights.
    pub licence: &'static str,
}

const APACHE: &str = "Apache-2.0";

/// The licence of DINOv3 is not an open-source one.
pub const DINOV3: &str = "DINOv3 License (Meta, 19 August 2025): free of charge, also commercially; \
    redistribution only with a copy of it, acknowledgement in publications, no military use";

/// The licence of EUPE, whose repositories also name DINOv3.
pub const EUPE: &str = "FAIR Noncommercial Research License: research only, no commercial use";

/// The networks. Commits and digests are those that several independent projects pin; without one, the
/// first download decides.
pub const NAMES: [NamedNetwork; 12] = [
    NamedNetwork {
        commit: Some("ed25f3a31f01632728cabb09d1542f84ab7b0056"),
        sha256: Some("ae1e99fcefd534ed978cdeb8326f08030c96e28b7a81ffcbc98a857c84d14be1"),
        ..named("dinov2-small", "facebook/dinov2-small", 88_200_000, APACHE)
    },
    NamedNetwork {
        commit: Some("f9e44c814b77203eaa57a6bdbbd535f21ede1415"),
        ..named("dinov2-base", "facebook/dinov2-base", 346_000_000, APACHE)
    },
    NamedNetwork {
        commit: Some("47b73eefe95e8d44ec3623f8890bd894b6ea2d6c"),
        sha256: Some("399fba97a95f22c36834418bc69373364a99af3a1153da1c0fb31db567c92e23"),
        ..named("dinov2-large", "facebook/dinov2-large", 1_217_522_888, APACHE)
    },
    named("dinov2-giant", "facebook/dinov2-giant", 4_500_000_000, APACHE),
    named("dinov2-registers-small", "facebook/dinov2-with-registers-small", 88_200_000, APACHE),
    named("dinov2-registers-base", "facebook/dinov2-with-registers-base", 346_000_000, APACHE),
    named("dino-small", "timm/vit_small_patch16_224.dino", 87_000_000, APACHE),
    named("dino-base", "timm/vit_base_patch16_224.dino", 343_000_000, APACHE),
    named("dinov3-small", "timm/vit_small_patch16_dinov3.lvd1689m", 86_400_000, DINOV3),
    named("dinov3-base", "timm/vit_base_patch16_dinov3.lvd1689m", 343_000_000, DINOV3),
    named("clip-base", "openai/clip-vit-base-patch32", 605_000_000, "MIT (its code)"),
    named("siglip2-base", "timm/vit_base_patch16_siglip_224.v2_webli", 372_000_000, APACHE),
];

const fn named(
    name: &'static str,
    repository: &'static str,
    bytes: u64,
    licence: &'static str,
) -> NamedNetwork {
    NamedNetwork { name, repository, commit: None, sha256: None, bytes, licence }
}

/// The network of a short name.
pub fn find(name: &str) -> Option<&'static NamedNetwork> {
    NAMES.iter().find(|named| named.name == name)
}

/// Fails if a word is not a short name.
///
/// # Errors
///
/// The message lists the names.
pub fn refuse_unknown(word: &str) -> Result<()> {
    let all: Vec<_> = NAMES.iter().map(|named| named.name).collect();
    ensure!(
        find(word).is_some(),
        "there is no backbone `{word}`: it is one of {}, an address like hf://owner/name@revision, or the \
         path of a folder with config.json and model.safetensors",
        all.join(", ")
    );
    Ok(())
}

/// Returns the licence of a repository's weights if its name shows that they are not open source. `None` means
/// unknown.
pub fn licence_of(repository: &str) -> Option<&'static str> {
    let name = repository.to_lowercase();
    [("eupe", EUPE), ("dinov3", DINOV3)]
        .into_iter()
        .find_map(|(word, licence)| name.contains(word).then_some(licence))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_repositories_show_restricted_licences() {
        assert_eq!(licence_of("timm/vit_small_patch16_dinov3_qkvb.eupe_lvd1689m"), Some(EUPE));
        assert_eq!(licence_of("timm/vit_small_patch16_dinov3.lvd1689m"), Some(DINOV3));
        assert_eq!(licence_of("facebook/dinov2-small"), None);
    }

    #[test]
    fn names_are_distinct_and_digests_are_whole() {
        for named in &NAMES {
            assert_eq!(find(named.name), Some(named));
            let is_hex = |text: &str| text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
            assert!(named.commit.is_none_or(|commit| commit.len() == 40 && is_hex(commit)));
            assert!(named.sha256.is_none_or(|digest| digest.len() == 64 && is_hex(digest)));
            hub::Address::parse(named.repository).expect("an address");
        }
        let error = refuse_unknown("dinov2-smal").expect_err("a typing error").to_string();
        assert!(error.contains("`dinov2-smal`") && error.contains("dinov2-small,"), "{error}");
    }
}
