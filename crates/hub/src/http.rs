//! Downloads over HTTP from servers that may be slow, busy, silent or wrong.
//!
//! A download goes into a partial file, resumes there after an interruption, and gets its final name
//! only when its length and digest are right. A busy or silent server is asked again, after a wait
//! that doubles; a refusal is final, and so is a server that cannot be reached at all: mostly there is
//! no network. Redirects are followed by crate `ureq`, which sends the token to
//! no other address and does not go from https to http.
//!
//! The network is read on a thread of its own, so that the user can interrupt while a server is
//! silent.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use md5::Md5;
use sha1::Sha1;
use sha2::{Digest, Sha256};
use stage::Interrupted;
use stage::digest::hex;
use stage::progress::{Progress, Unit};
use ureq::http::uri::Scheme;
use ureq::http::{Response, StatusCode, Uri};
use ureq::{Agent, Body, ResponseExt};

/// Returns true once the user wants to stop.
pub type IsInterrupted<'a> = &'a (dyn Fn() -> bool + Sync);

/// The expected length and digest of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Expected {
    /// Its length, if it is known.
    pub bytes: Option<u64>,
    /// Its digest.
    pub digest: Checksum,
}

/// The digest of a file in lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Checksum {
    /// SHA-256 of its bytes.
    Sha256(String),
    /// MD5 of its bytes, as some publishers give it.
    Md5(String),
    /// SHA-1 over `blob`, a space, its length, a zero byte, and its bytes: its name in git.
    Git(String),
}

impl Checksum {
    /// The digits of the digest.
    pub fn digits(&self) -> &str {
        match self {
            Self::Sha256(digits) | Self::Md5(digits) | Self::Git(digits) => digits,
        }
    }
}

/// The error of a server that refuses to send a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The status of its answer.
    pub status: StatusCode,
    /// The hub's name for the reason: the header `X-Error-Code`.
    pub code: Option<String>,
    /// The hub's explanation: the header `X-Error-Message`.
    pub message: Option<String>,
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the server answers {}", self.status)?;
        match &self.message {
            Some(message) => write!(f, ": {message}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refused {}

/// An HTTP client that retries, and that the user can interrupt.
#[derive(Clone)]
pub struct Client<'a> {
    agent: Agent,
    interrupt: IsInterrupted<'a>,
    /// The wait before the second attempt; it doubles before each further one.
    first_wait: Duration,
}

/// Attempts before a download fails.
const ATTEMPTS: u32 = 6;

/// The longest wait that a server may ask for.
const LONGEST_WAIT: Duration = Duration::from_secs(120);

/// How long a server may be silent before the next attempt.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);

/// Time between two checks of the interrupt.
const POLL: Duration = Duration::from_millis(100);

/// The longest answer that is held in memory: a list of files.
const MOST_ANSWER_BYTES: usize = 1 << 26;

/// Why an attempt failed.
enum Failure {
    /// Worth another attempt, after the wait that the server asks for.
    Passing(anyhow::Error, Option<Duration>),
    /// Every attempt would fail.
    Final(anyhow::Error),
}

impl<'a> Client<'a> {
    /// A client that waits for a second before the second attempt, then longer.
    pub fn new(interrupt: IsInterrupted<'a>) -> Self {
        Self::with_waits(Duration::from_secs(1), LONGEST_SILENCE, interrupt)
    }

    /// A client with other waits, for tests.
    pub fn with_waits(
        first_wait: Duration,
        longest_silence: Duration,
        interrupt: IsInterrupted<'a>,
    ) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            .timeout_connect(Some(Duration::from_secs(30)))
            .timeout_per_read(Some(longest_silence))
            .user_agent("assort")
            .build()
            .into();
        Self { agent, interrupt, first_wait }
    }

    /// Returns the text at an address.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, refuses, or sends something else.
    pub fn text(&self, url: &str, token: Option<&str>) -> Result<String> {
        self.repeat(|| {
            let response = self.get(url, token, 0)?;
            if is_html(&response) {
                return Err(Failure::Final(web_page()));
            }
            let mut text = Vec::new();
            self.receive(response, |piece| {
                text.extend_from_slice(piece);
                match text.len() <= MOST_ANSWER_BYTES {
                    true => Ok(true),
                    false => Err(Failure::Final(anyhow!(
                        "the answer is longer than {MOST_ANSWER_BYTES} bytes; check the address"
                    ))),
                }
            })?;
            String::from_utf8(text)
                .map_err(|_| Failure::Final(anyhow!("the answer is not text; check the address")))
        })
        .with_context(|| format!("asking `{url}`"))
    }

    /// Downloads a file to `path`. Bytes of an earlier, interrupted download are in `partial`, and
    /// are not downloaded again.
    ///
    /// # Errors
    ///
    /// The server cannot be reached, refuses, or has another file than is expected. Then there is
    /// no file at `path`.
    pub fn fetch(
        &self,
        url: &str,
        token: Option<&str>,
        expected: &Expected,
        partial: &Path,
        path: &Path,
    ) -> Result<()> {
        let context = || format!("downloading `{url}`");
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent).with_context(context)?;
        }
        let mut file = self.open_alone(partial).with_context(context)?;
        if path.exists() && check(path, expected).is_ok() {
            // Another process has just finished it.
            let _ = fs::remove_file(partial);
            return Ok(());
        }
        let label = path.file_name().unwrap_or_default().to_string_lossy();
        let mut progress = Progress::new(&label, expected.bytes.unwrap_or(0), Unit::Bytes);
        let fetched = self.repeat(|| {
            let resumed = self.resume(url, token, expected, &mut file, &mut progress)?;
            verify(&mut file, expected).map_err(|error| {
                let error = match is_web_page(&mut file) {
                    true => web_page(),
                    false => error.context("this is not the expected file"),
                };
                // The next attempt must not resume from wrong bytes.
                match (file.set_len(0), resumed) {
                    (Err(failed), _) => Failure::Final(failed.into()),
                    (Ok(()), true) => Failure::Passing(error, Some(Duration::ZERO)),
                    (Ok(()), false) => Failure::Final(error),
                }
            })
        });
        if fetched.is_err() && file.metadata().is_ok_and(|metadata| metadata.len() == 0) {
            let _ = fs::remove_file(partial);
        }
        fetched
            .map_err(|error| match is_of_disk(&error) {
                true => error.context(format!("writing `{}`", partial.display())),
                false => error,
            })
            .with_context(context)?;
        fs::rename(partial, path).with_context(|| format!("writing `{}`", path.display()))
    }

    /// Opens the partial file once no other process downloads into it.
    fn open_alone(&self, partial: &Path) -> Result<File> {
        let mut has_said = false;
        loop {
            let mut options = File::options();
            let file = options.create(true).truncate(false).read(true).write(true).open(partial);
            let file = file.with_context(|| format!("opening `{}`", partial.display()))?;
            match file.try_lock() {
                Ok(()) if is_at(&file, partial) => return Ok(file),
                // Another process renamed or removed it since it was opened here.
                Ok(()) => {}
                Err(TryLockError::WouldBlock) => {
                    if !has_said {
                        let partial = partial.display();
                        tracing::info!("another process downloads `{partial}`; waiting for it");
                    }
                    has_said = true;
                    self.pause(POLL)?;
                }
                // A file system without locks.
                Err(TryLockError::Error(_)) => return Ok(file),
            }
        }
    }

    /// Repeats an attempt while it fails for a reason that may pass.
    fn repeat<T>(&self, mut attempt: impl FnMut() -> Result<T, Failure>) -> Result<T> {
        let mut wait = self.first_wait;
        for left in (0..ATTEMPTS).rev() {
            match attempt() {
                Ok(done) => return Ok(done),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing(error, _)) if left == 0 => {
                    return Err(error.context(format!("gave up after {ATTEMPTS} attempts")));
                }
                Err(Failure::Passing(error, asked)) => {
                    let pause = asked.unwrap_or(wait).min(LONGEST_WAIT);
                    tracing::info!("{error:#}; trying again in {:.0?}", pause);
                    self.pause(pause)?;
                    wait *= 2;
                }
            }
        }
        bail!("no attempt was made")
    }

    fn pause(&self, pause: Duration) -> Result<()> {
        let end = Instant::now() + pause;
        while Instant::now() < end {
            if (self.interrupt)() {
                return Err(Interrupted.into());
            }
            thread::sleep(pause.min(POLL));
        }
        Ok(())
    }

    /// Downloads the missing bytes of `file`. Returns whether it had bytes before.
    fn resume(
        &self,
        url: &str,
        token: Option<&str>,
        expected: &Expected,
        file: &mut File,
        progress: &mut Progress,
    ) -> Result<bool, Failure> {
        let failed = |error: io::Error| Failure::Final(error.into());
        let mut there = file.metadata().map_err(failed)?.len();
        if expected.bytes.is_some_and(|bytes| there > bytes) {
            file.set_len(0).map_err(failed)?;
            there = 0;
        }
        let resumed = there > 0;
        if resumed && expected.bytes == Some(there) {
            return Ok(resumed);
        }
        let response = self.get(url, token, there)?;
        let Some(start) = start_of_body(&response, expected, file, there)? else {
            return Ok(resumed);
        };
        there = start;
        file.seek(SeekFrom::Start(there)).map_err(failed)?;
        self.receive(response, |piece| {
            file.write_all(piece).map_err(failed)?;
            there += piece.len() as u64;
            progress.at(there, "bytes");
            Ok(expected.bytes.is_none_or(|bytes| there <= bytes))
        })?;
        file.sync_data().map_err(failed)?;
        match expected.bytes {
            // Without an announced length, the end of an answer may be the end of a connection.
            Some(bytes) if there < bytes => {
                Err(Failure::Passing(anyhow!("received only {there} of {bytes} bytes"), None))
            }
            _ => Ok(resumed),
        }
    }

    /// Requests a file from byte `from` on.
    fn get(&self, url: &str, token: Option<&str>, from: u64) -> Result<Response<Body>, Failure> {
        let response = self.call(url, token, from)?;
        // `ureq` drops the token with the first redirect. A repository that was renamed redirects
        // within its host, which needs the token again.
        let landed = response.get_uri();
        let is_denied = matches!(response.status().as_u16(), 401 | 403 | 404);
        match token {
            Some(_) if is_denied && *landed != *url && is_same_host(landed, url) => {
                answered(self.call(&landed.to_string(), token, from)?, from)
            }
            _ => answered(response, from),
        }
    }

    fn call(&self, url: &str, token: Option<&str>, from: u64) -> Result<Response<Body>, Failure> {
        let request = self.agent.get(url).config().https_only(is_https(url)).build();
        // The digests are of the uncompressed file.
        let mut request = request.header("Accept-Encoding", "identity");
        if let Some(token) = token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        if from > 0 {
            request = request.header("Range", format!("bytes={from}-"));
        }
        let (send, answer) = sync_channel(1);
        thread::spawn(move || {
            // Nobody receives it after an interrupt.
            let _ = send.send(request.call());
        });
        match self.next(&answer)? {
            Some(answer) => answer.map_err(|error| match is_final(&error) {
                true => Failure::Final(error.into()),
                false => passing(error),
            }),
            None => Err(Failure::Final(anyhow!("the thread that reads the network panicked"))),
        }
    }

    /// Passes the body of an answer to `take`, piece by piece, until that returns `false`.
    fn receive(
        &self,
        response: Response<Body>,
        mut take: impl FnMut(&[u8]) -> Result<bool, Failure>,
    ) -> Result<(), Failure> {
        let mut body = response.into_body().into_with_config().limit(u64::MAX).reader();
        let (send, pieces) = sync_channel(16);
        thread::spawn(move || {
            loop {
                let mut piece = vec![0; 1 << 16];
                let read = body.read(&mut piece).map(|length| {
                    piece.truncate(length);
                    piece
                });
                let is_last = read.as_ref().map_or(true, Vec::is_empty);
                if send.send(read).is_err() || is_last {
                    break;
                }
            }
        });
        while let Some(piece) = self.next(&pieces)? {
            // As text, see `is_of_disk`.
            let piece = piece.map_err(|error| passing(anyhow!("reading the answer: {error}")))?;
            if piece.is_empty() || !take(&piece)? {
                return Ok(());
            }
        }
        Err(Failure::Final(anyhow!("the thread that reads the network panicked")))
    }

    /// The next value from a thread; `None` once it has ended.
    fn next<T>(&self, thread: &Receiver<T>) -> Result<Option<T>, Failure> {
        loop {
            if (self.interrupt)() {
                return Err(Failure::Final(Interrupted.into()));
            }
            match thread.recv_timeout(POLL) {
                Ok(value) => return Ok(Some(value)),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
            }
        }
    }
}

impl fmt::Debug for Client<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("first_wait", &self.first_wait).finish_non_exhaustive()
    }
}

/// Whether the disk failed. Network errors are not `io::Error`s in these chains.
pub fn is_of_disk(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| cause.is::<io::Error>())
}

fn passing(error: impl Into<anyhow::Error>) -> Failure {
    Failure::Passing(error.into(), None)
}

/// Whether the same request will not succeed soon.
fn is_final(error: &ureq::Error) -> bool {
    use ureq::Error::{
        BadUri, HostNotFound, Http, InvalidProxyUrl, Io, Protocol, RedirectFailed,
        RequireHttpsOnly, TooManyRedirects,
    };
    match error {
        Io(error) => is_unreachable(error),
        error => matches!(
            error,
            BadUri(_)
                | HostNotFound
                | Http(_)
                | InvalidProxyUrl
                | Protocol(_)
                | RedirectFailed
                | RequireHttpsOnly(_)
                | TooManyRedirects
        ),
    }
}

/// Whether no connection can be made: there is no such name, no way there, or nobody listens.
fn is_unreachable(error: &io::Error) -> bool {
    use io::ErrorKind::{AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable};
    // The standard library has no kind for a name that it cannot resolve.
    let is_unresolved = error.to_string().starts_with("failed to lookup address information");
    let kinds = [AddrNotAvailable, ConnectionRefused, HostUnreachable, NetworkUnreachable];
    is_unresolved || kinds.contains(&error.kind())
}

/// Returns the byte of a file that an answer starts at, or `None` if the file is complete.
///
/// - `there`: bytes that `file` has, from which on the file was requested.
fn start_of_body(
    response: &Response<Body>,
    expected: &Expected,
    file: &mut File,
    there: u64,
) -> Result<Option<u64>, Failure> {
    let (status, range) = (response.status(), header(response, "content-range"));
    if status == StatusCode::RANGE_NOT_SATISFIABLE {
        // The server has no more bytes: the file is complete, or it is another one.
        return match verify(file, expected) {
            Ok(()) => Ok(None),
            Err(_) => {
                Err(discarded(file, "the partial file of the last download is of another file"))
            }
        };
    }
    if is_html(response) {
        return Err(Failure::Final(web_page()));
    }
    if let (Some(bytes), Some(announced)) = (expected.bytes, whole_length(response))
        && announced != bytes
    {
        return Err(passing(anyhow!("the server has a file of {announced} bytes, not {bytes}")));
    }
    if status == StatusCode::PARTIAL_CONTENT {
        return match range.as_deref().and_then(start_of_range) == Some(there) {
            true => Ok(Some(there)),
            false => Err(discarded(file, "the server sends another range than the requested one")),
        };
    }
    if there > 0 {
        // The server sends the whole file, although a range was requested.
        file.set_len(0).map_err(|error| Failure::Final(error.into()))?;
    }
    Ok(Some(0))
}

/// Empties a partial file that must not be resumed. The next attempt follows at once.
fn discarded(file: &File, reason: &'static str) -> Failure {
    match file.set_len(0) {
        Ok(()) => Failure::Passing(anyhow!(reason), Some(Duration::ZERO)),
        Err(error) => Failure::Final(error.into()),
    }
}

/// Accepts an answer with the requested bytes, and one that says that no byte follows `from`.
fn answered(response: Response<Body>, from: u64) -> Result<Response<Body>, Failure> {
    let refused = Refused {
        status: response.status(),
        code: header(&response, "x-error-code"),
        message: header(&response, "x-error-message"),
    };
    let asked = header(&response, "retry-after").and_then(|text| text.parse().ok());
    match refused.status.as_u16() {
        200 | 206 => Ok(response),
        416 if from > 0 => Ok(response),
        408 | 425 | 429 | 500 | 502..=504 => {
            Err(Failure::Passing(refused.into(), asked.map(Duration::from_secs)))
        }
        _ => Err(Failure::Final(refused.into())),
    }
}

fn header(response: &Response<Body>, name: &str) -> Option<String> {
    Some(response.headers().get(name)?.to_str().ok()?.to_owned())
}

fn is_html(response: &Response<Body>) -> bool {
    header(response, "content-type").is_some_and(|kind| kind.starts_with("text/html"))
}

/// The length of the whole file, if an answer announces it.
fn whole_length(response: &Response<Body>) -> Option<u64> {
    match response.status() {
        StatusCode::PARTIAL_CONTENT => {
            header(response, "content-range")?.rsplit_once('/')?.1.parse().ok()
        }
        _ => header(response, "content-length")?.parse().ok(),
    }
}

/// The first number of `bytes 5-9/10`.
fn start_of_range(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

fn is_https(url: &str) -> bool {
    url.parse::<Uri>().is_ok_and(|uri| uri.scheme() == Some(&Scheme::HTTPS))
}

/// Whether two addresses have the same scheme, host and port.
fn is_same_host(uri: &Uri, url: &str) -> bool {
    let place = |uri: &Uri| (uri.scheme().cloned(), uri.authority().cloned());
    url.parse().is_ok_and(|other| place(uri) == place(&other))
}

fn web_page() -> anyhow::Error {
    anyhow!(
        "the server sends a web page instead of the file; it may want you to log in, or the network \
         you are in may"
    )
}

/// Whether a file begins as a web page does.
fn is_web_page(file: &mut File) -> bool {
    let mut start = Vec::new();
    let read = file.rewind().and_then(|()| file.take(256).read_to_end(&mut start));
    let start = start.trim_ascii_start().to_ascii_lowercase();
    read.is_ok()
        && [b"<!doctype html".as_slice(), b"<html"].iter().any(|tag| start.starts_with(tag))
}

/// Downloads a file from the first address that has the expected one, unless `path` already holds it.
///
/// The partial file of a failed download is kept: the next attempt resumes it, also from another
/// address, because the digest is the same.
///
/// - `advice`: what to do instead when no address has it.
///
/// # Errors
///
/// No address has it, the disk fails, or the user interrupts.
pub fn fetch_file(
    client: &Client,
    urls: impl Iterator<Item = String>,
    expected: &Expected,
    path: &Path,
    advice: &str,
) -> Result<()> {
    if path.exists() {
        match check(path, expected) {
            Ok(()) => return Ok(()),
            Err(error) => tracing::info!("downloading `{}` again: {error:#}", path.display()),
        }
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let partial = path.with_file_name(format!("{name}.incomplete"));
    let mut reasons = Vec::new();
    for url in urls {
        match client.fetch(&url, None, expected, &partial, path) {
            Ok(()) => return Ok(()),
            // Another address would not help.
            Err(error) if error.is::<Interrupted>() || is_of_disk(&error) => {
                return Err(error);
            }
            Err(error) => reasons.push(format!("{error:#}")),
        }
    }
    bail!("could not download `{name}`: {}; try again later, or {advice}", reasons.join("; "))
}

/// Fails unless a file has the length and the digest that are expected.
///
/// # Errors
///
/// The message says what it has instead.
pub fn check(path: &Path, expected: &Expected) -> Result<()> {
    verify(&mut File::open(path)?, expected)
}

fn verify(file: &mut File, expected: &Expected) -> Result<()> {
    let length = file.metadata()?.len();
    if let Some(bytes) = expected.bytes {
        ensure!(length == bytes, "it has {length} bytes, not {bytes}");
    }
    file.rewind()?;
    let (found, stated) = match &expected.digest {
        Checksum::Sha256(stated) => (digest::<Sha256>(file, &[])?, stated),
        Checksum::Md5(stated) => (digest::<Md5>(file, &[])?, stated),
        Checksum::Git(stated) => {
            (digest::<Sha1>(file, format!("blob {length}\0").as_bytes())?, stated)
        }
    };
    ensure!(found == *stated, "its checksum is {found}, not {stated}");
    Ok(())
}

fn digest<D: Digest>(file: &mut File, before: &[u8]) -> Result<String> {
    let mut hash = D::new();
    hash.update(before);
    let mut buffer = vec![0; 1 << 16];
    loop {
        let read = file.read(&mut buffer)?;
        if read == 0 {
            return Ok(hex(&hash.finalize()));
        }
        hash.update(&buffer[..read]);
    }
}

/// Whether a path still leads to an open file.
#[cfg(unix)]
fn is_at(file: &File, path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
    let there = fs::metadata(path).map(identity);
    file.metadata().map(identity).is_ok_and(|ours| there.is_ok_and(|there| there == ours))
}

#[cfg(not(unix))]
fn is_at(_: &File, path: &Path) -> bool {
    path.exists()
}

/// The user's folder for files that can be downloaded again.
///
/// # Errors
///
/// Neither `XDG_CACHE_HOME` nor a home is set.
pub fn cache_folder() -> Result<PathBuf> {
    let variable = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    if let Some(folder) = variable("XDG_CACHE_HOME") {
        return Ok(folder.into());
    }
    let home = variable("HOME").or_else(|| variable("USERPROFILE"));
    let home = home.context("no home folder to keep downloads in; set XDG_CACHE_HOME")?;
    Ok(Path::new(&home).join(".cache"))
}
