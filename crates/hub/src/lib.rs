//! Downloads, and files from the Hugging Face Hub: `hf://datasets/owner/name` and `hf://owner/model`.
//!
//! A revision and a path may follow the name, in which `*` matches any characters, as in
//! `hf://datasets/owner/name@main/data/train-*.parquet`. The hub first names one commit, and the length
//! and digest of each of its files; all files come from it, even if the branch moves during a download. A
//! revision of 40 hexadecimal digits is a commit and pins the files.
//!
//! [`fetch`] downloads the files of a data set, [`PublishedModel`] those of a network, [`http`] any
//! file. This crate knows neither pictures nor networks.
//!
//! The cache has the layout of crate `hf-hub`, which Python shares: `blobs/<digest>`,
//! `snapshots/<commit>/<path>` as links to them, `refs/<revision>`. Downloading is our own ([`http`]):
//! the transport of `hf-hub` 0.5 sends the token to any host that a file is redirected to, compares no
//! digest, and ignores `HF_HUB_CACHE`, `HF_TOKEN` and `HF_HUB_OFFLINE`. A large file is checked by the
//! SHA-256 that the hub states for it, a small one by its name in git.
//!
//! Environment variables: `HF_HOME`, `HF_HUB_CACHE`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_ENDPOINT`,
//! `HF_HUB_OFFLINE`.
//!
//! ```
//! let address = hub::Address::parse("facebook/dinov2-small@main")?;
//! assert_eq!((address.name.as_str(), address.revision.as_str()), ("facebook/dinov2-small", "main"));
//! # anyhow::Ok(())
//! ```

mod address;
pub mod http;
mod model;
mod repository;
mod settings;

pub use address::Address;
pub use model::{ModelFiles, PublishedModel};
pub use repository::{Snapshot, fetch};
pub use settings::Settings;
