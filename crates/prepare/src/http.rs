//! Fetching files over HTTP, from servers that do not always behave.
//!
//! A download is written beside its place as it comes, goes on there after an interruption, and has
//! its name only when its length and digest are right. A server that is busy is asked again, each time
//! after a longer wait; one that says no is not. Redirections are followed here and not by the library,
//! so that what we say to prove who we are goes to no other host than the one it is meant for.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use md5::Md5;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use stage::Interrupted;
use stage::container::hex;
use stage::progress::Progress;
use ureq::http::{Response, StatusCode, Uri};
use ureq::{Agent, Body};

use crate::Interrupt;

/// What a file must be, as far as that is known.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Expected {
    /// Its length.
    pub bytes: Option<u64>,
    /// Its digest.
    pub digest: Option<Checksum>,
}

/// The digest of a file in lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checksum {
    /// SHA-256 of its bytes.
    Sha256(String),
    /// MD5 of its bytes: what some publishers give.
    Md5(String),
    /// SHA-1 over `blob`, a space, its length, a zero byte, and its bytes: its name in git.
    Git(String),
}

/// Talks to servers until its user wants it to stop.
#[derive(Clone)]
pub struct Client<'a> {
    agent: Agent,
    interrupt: Interrupt<'a>,
    /// The first of the waits between two attempts; each is twice the one before.
    first_wait: Duration,
}

/// How often a server is asked before it is given up.
const ATTEMPTS: u32 = 6;

/// The longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// How many redirections are followed.
const MOST_REDIRECTIONS: usize = 10;

/// The longest answer that is held in memory: a list of files.
const MOST_ANSWER_BYTES: u64 = 1 << 26;

/// Why an attempt failed.
enum Failure {
    /// Perhaps not for long; the wait that the server asks for.
    Passing(anyhow::Error, Option<Duration>),
    /// For good.
    Final(anyhow::Error),
}

impl<'a> Client<'a> {
    /// A client that waits for a second before it asks again, then longer.
    pub fn new(interrupt: Interrupt<'a>) -> Self {
        Self::with_first_wait(Duration::from_secs(1), interrupt)
    }

    /// A client with another first wait, for tests.
    pub fn with_first_wait(first_wait: Duration, interrupt: Interrupt<'a>) -> Self {
        let agent = Agent::config_builder()
            .max_redirects(0)
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_recv_response(Some(Duration::from_secs(60)))
            .user_agent("assort")
            .build()
            .into();
        Self { agent, interrupt, first_wait }
    }

    /// The body of an answer of moderate length.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, or says no.
    pub fn text(&self, url: &str, token: Option<&str>) -> Result<String> {
        self.repeat(|| {
            let response = self.get(url, token, None)?;
            let mut text = String::new();
            let mut body = response.into_body().into_reader().take(MOST_ANSWER_BYTES + 1);
            body.read_to_string(&mut text).map_err(passing)?;
            match text.len() as u64 <= MOST_ANSWER_BYTES {
                true => Ok(text),
                false => Err(Failure::Final(anyhow!("it answers without end"))),
            }
        })
        .with_context(|| format!("asking `{url}`"))
    }

    /// Fetches a file to `path`, which is there, whole and right, or not at all. What was fetched
    /// before an interruption lies in `partial`, and need not come again.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, says no, or has another file than is expected.
    pub fn fetch(
        &self,
        url: &str,
        token: Option<&str>,
        expected: &Expected,
        partial: &Path,
        path: &Path,
    ) -> Result<()> {
        let context = || format!("fetching `{url}`");
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(context)?;
        }
        let label = path.file_name().unwrap_or_default().to_string_lossy();
        let mut progress = Progress::new(&label, expected.bytes.unwrap_or(0));
        let fetched = self.repeat(|| {
            self.go_on(url, token, expected, partial, &mut progress)?;
            check(partial, expected).map_err(|error| {
                // What is whole but wrong is of no use to go on from.
                let _ = fs::remove_file(partial);
                Failure::Passing(error, None)
            })
        });
        fetched.with_context(context)?;
        fs::rename(partial, path).with_context(|| format!("writing `{}`", path.display()))
    }

    /// Repeats an attempt that failed for a reason that may pass.
    fn repeat<T>(&self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T> {
        let mut wait = self.first_wait;
        for left in (0..ATTEMPTS).rev() {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error, _)) if left == 0 => {
                    return Err(error.context(format!("given up after {ATTEMPTS} attempts")));
                }
                Err(Failure::Passing(error, asked)) => {
                    let pause = asked.unwrap_or(wait).min(LONGEST_WAIT);
                    tracing::info!("{error:#}; asking again in {:.0?}", pause);
                    let end = Instant::now() + pause;
                    while Instant::now() < end {
                        if (self.interrupt)() {
                            return Err(Interrupted.into());
                        }
                        thread::sleep(pause.min(Duration::from_millis(100)));
                    }
                    wait *= 2;
                }
            }
        }
        bail!("no attempt was made")
    }

    /// Asks for a file from byte `from` on, if that is given, and follows redirections.
    fn get(
        &self,
        url: &str,
        token: Option<&str>,
        from: Option<u64>,
    ) -> Result<Response<Body>, Failure> {
        let first = host_of(url).map_err(Failure::Final)?;
        let mut url = url.to_owned();
        for _ in 0..=MOST_REDIRECTIONS {
            let mut request = self.agent.get(&url);
            let host = host_of(&url).map_err(Failure::Final)?;
            if let Some(token) = token.filter(|_| host == first) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if let Some(from) = from {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(passing)?;
            let status = response.status();
            if !status.is_redirection() {
                return sorted_out(response);
            }
            let location = header(&response, "location").unwrap_or_default();
            url = joined(&url, &location).map_err(Failure::Final)?;
        }
        Err(Failure::Final(anyhow!("it redirects more than {MOST_REDIRECTIONS} times")))
    }

    /// Fetches what is missing of `partial`.
    fn go_on(
        &self,
        url: &str,
        token: Option<&str>,
        expected: &Expected,
        partial: &Path,
        progress: &mut Progress,
    ) -> Result<(), Failure> {
        let mut options = OpenOptions::new();
        options.create(true).truncate(false).write(true);
        let failed = |error: io::Error| {
            Failure::Final(anyhow!(error).context(format!("writing `{}`", partial.display())))
        };
        let mut file = options.open(partial).map_err(failed)?;
        let mut there = file.metadata().map_err(failed)?.len();
        if expected.bytes.is_some_and(|bytes| there > bytes) {
            there = 0;
        }
        if there > 0 && expected.bytes == Some(there) {
            return Ok(());
        }
        let response = self.get(url, token, (there > 0).then_some(there))?;
        if header(&response, "content-type").is_some_and(|kind| kind.starts_with("text/html")) {
            return Err(Failure::Final(anyhow!(
                "it answers with a web page instead of the file; it may want you to log in"
            )));
        }
        let range = header(&response, "content-range");
        let goes_on = response.status() == StatusCode::PARTIAL_CONTENT
            && range.as_deref().and_then(start_of_range) == Some(there);
        if !goes_on {
            // The whole file, whether it was asked for or not.
            if response.status() == StatusCode::PARTIAL_CONTENT {
                file.set_len(0).map_err(failed)?;
                return Err(Failure::Passing(anyhow!("it answers with another part"), None));
            }
            there = 0;
        }
        file.set_len(there).map_err(failed)?;
        file.seek(SeekFrom::Start(there)).map_err(failed)?;
        // One byte more than there should be tells a file that is too long.
        let most = expected.bytes.map_or(u64::MAX, |bytes| bytes + 1 - there);
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader().take(most);
        let mut buffer = vec![0; 1 << 16];
        loop {
            let read = body.read(&mut buffer).map_err(passing)?;
            if read == 0 {
                break;
            }
            file.write_all(&buffer[..read]).map_err(failed)?;
            if (self.interrupt)() {
                return Err(Failure::Final(Interrupted.into()));
            }
            there += read as u64;
            progress.at(there, "bytes");
        }
        file.sync_data().map_err(failed)?;
        match expected.bytes {
            // It said that less would come than there is: the rest is asked for.
            Some(bytes) if there < bytes => {
                Err(Failure::Passing(anyhow!("only {there} of {bytes} bytes came"), None))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Client<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("first_wait", &self.first_wait).finish_non_exhaustive()
    }
}

fn passing(error: impl Into<anyhow::Error>) -> Failure {
    Failure::Passing(error.into(), None)
}

/// An answer that has what was asked for, or why it has not.
fn sorted_out(response: Response<Body>) -> Result<Response<Body>, Failure> {
    let status = response.status();
    let asked = header(&response, "retry-after").and_then(|text| text.parse().ok());
    let asked = asked.map(Duration::from_secs);
    match status.as_u16() {
        200 | 206 => Ok(response),
        401 | 403 => Err(Failure::Final(anyhow!(
            "it answers {status}: the file is not for everyone; accept its terms where it is \
             published, and set HF_TOKEN to a token of yours that may read it"
        ))),
        408 | 425 | 429 | 500 | 502..=504 => {
            Err(Failure::Passing(anyhow!("it answers {status}"), asked))
        }
        // A part that is not there: what lies here is longer than the file.
        416 => Err(Failure::Final(anyhow!(
            "it answers {status}: what was fetched of it before is not of this file"
        ))),
        _ => Err(Failure::Final(anyhow!("it answers {status}"))),
    }
}

fn header(response: &Response<Body>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_owned())
}

/// The first number of `bytes 5-9/10`.
fn start_of_range(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

/// Scheme, host and port of an address: whom a token is meant for.
fn host_of(url: &str) -> Result<String> {
    let uri: Uri = url.parse().with_context(|| format!("`{url}` is not an address"))?;
    let (scheme, host) = (uri.scheme_str(), uri.authority());
    match (scheme, host) {
        (Some(scheme @ ("http" | "https")), Some(host)) => Ok(format!("{scheme}://{host}")),
        _ => bail!("`{url}` is not an address of http or https"),
    }
}

/// Where a redirection leads.
fn joined(from: &str, location: &str) -> Result<String> {
    ensure!(!location.is_empty(), "it redirects to nowhere");
    if location.contains("://") {
        ensure!(
            !from.starts_with("https://") || location.starts_with("https://"),
            "it redirects from https to `{location}`"
        );
        return Ok(location.to_owned());
    }
    let host = host_of(from)?;
    if let Some(other) = location.strip_prefix("//") {
        let (scheme, _) = host.split_once("://").context("a scheme")?;
        return Ok(format!("{scheme}://{other}"));
    }
    match location.starts_with('/') {
        true => Ok(format!("{host}{location}")),
        false => Ok(format!("{}/{location}", from.rsplit_once('/').map_or(from, |(path, _)| path))),
    }
}

/// Whether a file is what it must be.
///
/// # Errors
///
/// It is not, or cannot be read.
pub fn check(path: &Path, expected: &Expected) -> Result<()> {
    let length = fs::metadata(path)?.len();
    if let Some(bytes) = expected.bytes {
        ensure!(length == bytes, "it has {length} bytes, not {bytes}");
    }
    let (found, stated) = match &expected.digest {
        None => return Ok(()),
        Some(Checksum::Sha256(stated)) => (digest::<Sha256>(path, &[])?, stated),
        Some(Checksum::Md5(stated)) => (digest::<Md5>(path, &[])?, stated),
        Some(Checksum::Git(stated)) => {
            (digest::<Sha1>(path, format!("blob {length}\0").as_bytes())?, stated)
        }
    };
    ensure!(found == *stated, "its checksum is {found}, not {stated}");
    Ok(())
}

fn digest<D: Digest>(path: &Path, before: &[u8]) -> Result<String> {
    let mut hash = D::new();
    hash.update(before);
    let mut file = BufReader::with_capacity(1 << 16, File::open(path)?);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}

/// SHA-256 of a file.
///
/// # Errors
///
/// It cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    digest::<Sha256>(path, &[])
}

/// The user's own folder for what can be fetched again.
///
/// # Errors
///
/// There is neither `XDG_CACHE_HOME` nor a home.
pub fn cache_folder() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = variable("XDG_CACHE_HOME") {
        return Ok(folder.into());
    }
    let home = variable("HOME").or_else(|| variable("USERPROFILE"));
    let home = home.context("there is no home to keep files in; set XDG_CACHE_HOME")?;
    Ok(Path::new(&home).join(".cache"))
}
