//! The server over a real socket.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::thread::JoinHandle;

use data::corrections::Corrections;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::RowAccessor;
use serde_json::{Value, json};

use super::*;
use crate::browser_tests::{HOSTILE, PICTURES, inputs};

/// A server in a thread of the test.
pub(crate) struct TestServer {
    pub(crate) address: String,
    port: u16,
    interrupt: Interrupt,
    thread: Option<JoinHandle<Result<()>>>,
}

impl TestServer {
    pub(crate) fn start(arguments: &ViewArguments) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let port = listener.local_addr()?.port();
        let access = AccessControl::new(port)?;
        let (address, interrupt) = (access.address(), Interrupt::default());
        let served = Arc::new(ServedRun::open(arguments, &interrupt)?);
        let stop = interrupt.clone();
        let thread = std::thread::spawn(move || server::serve(listener, access, served, &stop));
        Ok(Self { address, port, interrupt, thread: Some(thread) })
    }

    fn token(&self) -> &str {
        self.address.split_once("token=").expect("a token").1
    }

    /// Stops the server and waits for its end.
    pub(crate) fn stop(&mut self) -> Result<()> {
        self.interrupt.raise();
        self.thread.take().map_or(Ok(()), |thread| thread.join().expect("no panic"))
    }

    /// Sends a request with these lines before the body; those that every request has are added unless given.
    fn send(&self, first: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Answered> {
        let cookie = format!("assort-view-{}={}", self.port, self.token());
        let host = format!("127.0.0.1:{}", self.port);
        let length = body.len().to_string();
        let usual = [("Host", &*host), ("Cookie", &*cookie), ("Content-Length", &*length)];
        let mut text = format!("{first} HTTP/1.1\r\nConnection: close\r\n");
        let is_given = |name: &str| headers.iter().any(|(given, _)| *given == name);
        for (name, value) in usual.iter().filter(|(name, _)| !is_given(name)).chain(headers) {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        stream.write_all(text.as_bytes())?;
        stream.write_all(b"\r\n")?;
        let _ = stream.write_all(body); // One that is too long is not read to its end.
        let mut bytes = Vec::new();
        let _ = stream.read_to_end(&mut bytes);
        let end =
            bytes.windows(4).position(|at| at == b"\r\n\r\n").context("an end of the head")?;
        let head = String::from_utf8(bytes[..end].to_vec())?.to_lowercase();
        let status = head.split(' ').nth(1).context("a status")?.parse()?;
        Ok(Answered { status, head, body: bytes[end + 4..].to_vec() })
    }

    fn get(&self, path: &str) -> Result<Answered> {
        self.send(&format!("GET {path}"), &[], b"")
    }

    fn edit(&self, revision: u64, edit: Value) -> Result<Answered> {
        let body = json!({ "revision": revision, "edit": edit }).to_string();
        self.send("POST /edit", &[("Content-Type", "application/json")], body.as_bytes())
    }

    /// What the page tells its script.
    fn data(&self) -> Result<Value> {
        let page = self.get("/")?.text();
        let (_, data) = page.split_once("id=\"data\">").context("data")?;
        Ok(serde_json::from_str(data.split_once("</script>").context("an end")?.0)?)
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

struct Answered {
    status: u16,
    /// In lower case.
    head: String,
    body: Vec<u8>,
}

impl Answered {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }
}

pub(crate) fn arguments(folder: &Path) -> Result<ViewArguments> {
    Ok(ViewArguments {
        run: inputs(folder)?.run,
        port: 0,
        corrections: folder.join(Corrections::FILE),
    })
}

#[test]
fn the_page_and_its_parts_are_served_to_the_holder_of_the_token() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let mut server = TestServer::start(&arguments(folder.path())?)?;
    let first = server.send(&format!("GET /?token={}", server.token()), &[("Cookie", "")], b"")?;
    assert_eq!(first.status, 303, "{}", first.head);
    for part in ["location: /\r", "httponly", "samesite=strict", &format!("={}", server.token())] {
        assert!(first.head.contains(part), "{part}: {}", first.head);
    }
    let page = server.get("/")?;
    assert_eq!(page.status, 200);
    for part in [
        "content-security-policy: default-src 'none'; img-src 'self'; connect-src 'self'",
        "frame-ancestors 'none'",
        "x-content-type-options: nosniff",
        "referrer-policy: no-referrer",
        "cache-control: no-store",
    ] {
        assert!(page.head.contains(part), "{part}: {}", page.head);
    }
    let text = page.text();
    assert!(!text.contains("data:image/png;") && !text.contains("<img src"), "pictures come later");
    assert!(text.contains("<figure data-cluster=\"1\" data-from=\"0\" data-to=\"2"), "{text}");

    let data = server.data()?;
    let set = data["served"]["set"].as_str().context("a set")?;
    let thumbnail = server.get(&format!("/thumbnail/{set}/7"))?;
    assert_eq!(thumbnail.status, 200);
    assert!(thumbnail.head.contains("content-type: image/png"), "{}", thumbnail.head);
    assert!(thumbnail.head.contains("max-age=31536000, immutable"), "{}", thumbnail.head);
    assert_eq!(image::load_from_memory(&thumbnail.body)?.width(), 48);
    let full = server.get(&format!("/full/{set}/7"))?;
    assert_eq!(image::load_from_memory(&full.body)?.height(), 36);
    assert_eq!(server.get("/assignment")?.body.len(), 5 * PICTURES);
    assert_eq!(server.get(&format!("/map/{set}"))?.body.len(), 8 * PICTURES);
    assert_eq!(server.get(&format!("/classes/{set}"))?.body.len(), 4 * PICTURES);
    let members: Value = serde_json::from_slice(&server.get("/members/1/0/5")?.body)?;
    assert_eq!(members.as_array().map(Vec::len), Some(5));
    let picture: Value = serde_json::from_slice(&server.get("/picture/4")?.body)?;
    assert_eq!(picture["name"], HOSTILE[4].replace('\u{202e}', "\u{fffd}"));
    assert_eq!(picture["near"].as_array().map(Vec::len), Some(15));
    server.stop()
}

#[test]
fn strangers_are_refused_and_nothing_but_the_run_can_be_asked_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = TestServer::start(&arguments(folder.path())?)?;
    let set = server.data()?["served"]["set"].as_str().context("a set")?.to_owned();
    let other = format!("assort-view-{}={}", server.port, "0".repeat(64));
    for (name, value) in [
        ("Cookie", ""),
        ("Cookie", &*other),
        ("Host", "evil.example"),
        ("Origin", "http://evil.example"),
        ("Sec-Fetch-Site", "cross-site"),
    ] {
        for path in
            ["/", "/assignment", &format!("/thumbnail/{set}/0"), "/none", "/export/clusters.csv"]
        {
            let answer = server.send(&format!("GET {path}"), &[(name, value)], b"")?;
            assert_eq!(answer.status, 403, "{path} with {name}: {value}");
            assert!(!answer.head.contains("set-cookie"));
        }
        let headers = [(name, value), ("Content-Type", "application/json")];
        let undo = br#"{"revision":0,"edit":"undo"}"#;
        assert_eq!(server.send("POST /edit", &headers, undo)?.status, 403);
    }
    for path in [
        "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        &format!("/thumbnail/{set}/..%2f..%2fetc%2fpasswd"),
        &format!("/full/{set}/-1"),
        &format!("/full/{set}/{PICTURES}"),
        "/full/other/1",
        "/export/..%2fnames.safetensors",
        "/export/clusters.exe",
        "/members/1/5/4",
        "/members/9/0/1",
        "/members/1/0/999999",
        "/picture/90",
        "/corrections.toml",
    ] {
        let answer = server.get(path)?;
        assert!((400..500).contains(&answer.status), "{path}: {}", answer.status);
        assert!(!answer.text().contains("root:"), "{path}");
    }
    for method in ["PUT", "DELETE", "POST"] {
        assert_eq!(server.send(&format!("{method} /assignment"), &[], b"")?.status, 405);
    }
    assert_eq!(server.get("/edit")?.status, 405, "an edit is no GET");
    let json = ("Content-Type", "application/json");
    let long = vec![b' '; (4 << 20) + 1];
    for (kind, body, status) in [
        (("Content-Type", "text/plain"), &br#"{"revision":0,"edit":"undo"}"#[..], 415),
        (json, b"{", 400),
        (json, br#"{"revision":0,"edit":"undo","path":"/etc"}"#, 400),
        (json, br#"{"revision":0,"edit":{"remove":{}}}"#, 400),
        (json, &long, 413),
    ] {
        assert_eq!(server.send("POST /edit", &[kind], body)?.status, status);
    }
    assert!(!folder.path().join(Corrections::FILE).exists(), "nothing was corrected");
    Ok(())
}

#[test]
fn edits_are_saved_at_once_undone_and_kept_for_the_next_start() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let arguments = arguments(folder.path())?;
    let mut server = TestServer::start(&arguments)?;
    assert_eq!(server.data()?["served"]["undo"], false);
    let text = || fs::read_to_string(&arguments.corrections);
    for (revision, edit) in [
        json!({ "rename": { "cluster": 1, "name": "<b>Sea" } }),
        json!({ "merge": { "clusters": [1, 2] } }),
        json!({ "move": { "places": [0, 7], "cluster": 1 } }),
        json!({ "mark": { "places": [4], "mark": "outlier" } }),
    ]
    .into_iter()
    .enumerate()
    {
        let before = text().unwrap_or_default();
        assert_eq!(server.edit(revision as u64, edit.clone())?.status, 204, "{edit}");
        assert_ne!(text()?, before, "{edit}");
    }
    let data = server.data()?;
    assert_eq!(
        data["titles"],
        json!(["cluster 0", "cluster 1: <b>Sea", "cluster 3", "marked as outlier"])
    );
    assert_eq!(data["served"]["merged"], json!([1]));
    let page = server.get("/")?.text();
    assert!(page.contains("Cluster 1: <bdi>&lt;b&gt;Sea</bdi>"), "{page}");
    let table = server.get("/export/clusters.csv")?;
    assert!(table.head.contains("attachment; filename=\"clusters.csv\""), "{}", table.head);
    assert!(table.text().contains(",outlier\n") && table.text().contains("<b>Sea"));
    let rows: Value = serde_json::from_slice(&server.get("/export/clusters.json")?.body)?;
    let is_outlier = |row: &&Value| row["mark"] == "outlier" && row["cluster"].is_null();
    let rows = rows.as_array().context("rows")?;
    assert_eq!((rows.len(), rows.iter().filter(is_outlier).count()), (PICTURES, 1));
    let parquet = server.get("/export/clusters.parquet")?.body;
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), parquet)?;
    let parquet = SerializedFileReader::new(fs::File::open(file.path())?)?;
    let mut found = 0;
    for (row, expected) in parquet.get_row_iter(None)?.zip(rows) {
        let row = row?;
        assert_eq!(json!(row.get_string(0)?), expected["name"]);
        assert_eq!(json!(row.get_bool(6)?), expected["reliable"]);
        found += 1;
    }
    assert_eq!(found, PICTURES);

    // An edit that makes no sense changes nothing.
    let saved = text()?;
    for edit in [
        json!({ "rename": { "cluster": 77, "name": "x" } }),
        json!({ "rename": { "cluster": 3, "name": "a\u{202e}b" } }),
        json!({ "merge": { "clusters": [1, 2] } }),
        json!({ "move": { "places": [90], "cluster": 1 } }),
    ] {
        let answer = server.edit(4, edit.clone())?;
        assert_eq!(answer.status, 422, "{edit}: {}", answer.text());
        assert_eq!(text()?, saved, "{edit}");
    }
    assert_eq!(server.edit(4, json!("undo"))?.status, 204);
    assert_eq!(server.data()?["titles"].as_array().map(Vec::len), Some(3), "no mark is left");
    let saved = text()?;
    server.stop()?;

    let server = TestServer::start(&arguments)?;
    assert_eq!(text()?, saved);
    assert_eq!(server.data()?["titles"][1], "cluster 1: <b>Sea");
    assert_eq!(server.edit(1, json!("undo"))?.status, 422, "this session has changed nothing yet");
    Ok(())
}

#[test]
fn two_tabs_and_two_servers_lose_no_edit() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let arguments = arguments(folder.path())?;
    let servers = [TestServer::start(&arguments)?, TestServer::start(&arguments)?];
    let name = |cluster: u32, name: &str| json!({ "rename": { "cluster": cluster, "name": name } });
    assert_eq!(servers[0].edit(0, name(0, "first"))?.status, 204);
    // A tab that shows the state before.
    let late = servers[0].edit(0, name(1, "late"))?;
    assert_eq!((late.status, late.text().contains("another tab")), (409, true));
    // The other server has not seen it; after its answer it has.
    let other = servers[1].edit(0, name(2, "other"))?;
    assert_eq!((other.status, other.text().contains("another program")), (409, true));
    assert_eq!(servers[1].data()?["titles"][0], "cluster 0: first");
    assert_eq!(servers[1].edit(1, name(2, "other"))?.status, 204);
    // A page that is loaded again shows what is in the file.
    let titles = &servers[0].data()?["titles"];
    assert_eq!((&titles[0], &titles[2]), (&json!("cluster 0: first"), &json!("cluster 2: other")));

    // Where the file cannot be used, the edit is refused and the server goes on.
    fs::remove_file(&arguments.corrections)?;
    fs::create_dir(&arguments.corrections)?;
    let refused = servers[0].edit(2, name(3, "x"))?;
    assert_eq!((refused.status, refused.text().starts_with("Not saved")), (500, true));
    fs::remove_dir(&arguments.corrections)?;
    fs::write(&arguments.corrections, "no corrections")?;
    assert_eq!(servers[0].get("/")?.status, 500);
    fs::remove_file(&arguments.corrections)?;
    assert_eq!(servers[0].data()?["titles"][0], "cluster 0");
    Ok(())
}

#[test]
fn a_damaged_picture_is_an_answer_and_the_server_goes_on() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let arguments = arguments(folder.path())?;
    let mut bytes = fs::read(&arguments.run.images)?;
    *bytes.last_mut().context("bytes")? ^= 1;
    fs::write(&arguments.run.images, bytes)?;
    let server = TestServer::start(&arguments)?;
    let set = server.data()?["served"]["set"].as_str().context("a set")?.to_owned();
    for kind in ["thumbnail", "full"] {
        let answer = server.get(&format!("/{kind}/{set}/{}", PICTURES - 1))?;
        assert_eq!(answer.status, 500);
        assert!(answer.text().contains("is damaged"), "{}", answer.text());
        assert!(answer.head.contains("content-type: text/plain"), "{}", answer.head);
        assert_eq!(server.get(&format!("/{kind}/{set}/0"))?.status, 200);
    }
    Ok(())
}
