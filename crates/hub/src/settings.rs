//! The user's settings, which Python's `huggingface_hub` shares.

use std::fs;
use std::path::PathBuf;

use anyhow::Result;

use crate::http;

/// The user's settings, from environment variables.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The server: `HF_ENDPOINT`.
    pub endpoint: String,
    /// Where files are kept: `HF_HUB_CACHE`, or `hub` in `HF_HOME`.
    pub cache: PathBuf,
    /// The user's access token: `HF_TOKEN`, or the file `HF_TOKEN_PATH`, or `token` in `HF_HOME`.
    pub token: Option<String>,
    /// Whether to use the cache only: `HF_HUB_OFFLINE`.
    pub is_offline: bool,
}

impl Settings {
    /// Settings from the variables that `variable` looks up.
    ///
    /// # Errors
    ///
    /// No cache folder is known.
    pub fn read(variable: impl Fn(&str) -> Option<String>) -> Result<Self> {
        let variable = |name: &str| variable(name).filter(|value| !value.trim().is_empty());
        let home = match variable("HF_HOME") {
            Some(home) => PathBuf::from(home),
            None => http::cache_folder()?.join("huggingface"),
        };
        let token_file = variable("HF_TOKEN_PATH").map_or(home.join("token"), PathBuf::from);
        let token = variable("HF_TOKEN").or_else(|| fs::read_to_string(token_file).ok());
        let token = token.map(|token| token.trim().to_owned()).filter(|token| !token.is_empty());
        let is_yes = |value: String| ["1", "on", "yes", "true"].contains(&&*value.to_lowercase());
        let endpoint = variable("HF_ENDPOINT").unwrap_or("https://huggingface.co".into());
        Ok(Self {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            cache: variable("HF_HUB_CACHE").map_or(home.join("hub"), PathBuf::from),
            token,
            is_offline: variable("HF_HUB_OFFLINE").is_some_and(is_yes),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    #[test]
    fn settings_are_those_of_the_environment() {
        let folder = tempfile::tempdir().expect("a folder");
        let home = folder.path().display().to_string();
        let read = |variables: &[(&str, &str)]| {
            let find = |name: &str| {
                let found = variables.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| (*value).to_owned())
            };
            Settings::read(find).expect("a home")
        };
        fs::write(folder.path().join("token"), "of the file\n").expect("written");
        let settings = read(&[("HF_HOME", &home)]);
        assert_eq!(settings.endpoint, "https://huggingface.co");
        assert_eq!(settings.cache, folder.path().join("hub"));
        assert_eq!(settings.token.as_deref(), Some("of the file"));
        assert!(!settings.is_offline);
        let settings = read(&[
            ("HF_HOME", &home),
            ("HF_HUB_CACHE", "elsewhere"),
            ("HF_TOKEN", "of the variable"),
            ("HF_ENDPOINT", "http://mirror/"),
            ("HF_HUB_OFFLINE", "1"),
        ]);
        assert_eq!(settings.endpoint, "http://mirror");
        assert_eq!(settings.cache, Path::new("elsewhere"));
        assert_eq!(settings.token.as_deref(), Some("of the variable"));
        assert!(settings.is_offline);
        assert!(!read(&[("HF_HOME", &home), ("HF_HUB_OFFLINE", "0")]).is_offline);
        fs::write(folder.path().join("other"), "of another file").expect("written");
        let other = folder.path().join("other").display().to_string();
        let settings = read(&[("HF_HOME", &home), ("HF_TOKEN_PATH", &other)]);
        assert_eq!(settings.token.as_deref(), Some("of another file"));
    }
}
