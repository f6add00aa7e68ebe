//! Fetching from a real server on this machine that behaves, and from ones that do not.

mod server;

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use hub::http::{self, Checksum, Client, Expected};
use hub::{Address, Settings, Snapshot};

use server::{Server, git, part, say, sha, unannounced, whole};

fn bytes() -> Vec<u8> {
    (0..300_000u32).map(|i| (i.wrapping_mul(i) / 7 % 251) as u8).collect()
}

fn expected(bytes: &[u8]) -> Expected {
    Expected { bytes: Some(bytes.len() as u64), digest: Checksum::Sha256(sha(bytes)) }
}

/// As the publisher of a named set states it: by a digest alone.
fn of_unknown_length(bytes: &[u8]) -> Expected {
    Expected { bytes: None, ..expected(bytes) }
}

/// A client that repeats a request at once, and waits for an answer longer than a busy machine takes.
fn client() -> Client<'static> {
    Client::with_waits(Duration::from_millis(1), Duration::from_secs(60), &|| false)
}

/// Downloads `/file` after an attempt that left `partial`. Returns the file, or the message.
fn fetch(server: &Server, expected: &Expected, partial: &[u8]) -> Result<Vec<u8>, String> {
    fetch_by(&client(), server, expected, partial)
}

fn fetch_by(
    client: &Client<'_>,
    server: &Server,
    expected: &Expected,
    partial: &[u8],
) -> Result<Vec<u8>, String> {
    let folder = tempfile::tempdir().expect("a folder");
    let [beside, path] = ["file.incomplete", "file"].map(|name| folder.path().join(name));
    if !partial.is_empty() {
        fs::write(&beside, partial).expect("written");
    }
    let url = format!("{}/file", server.address);
    match client.fetch(&url, Some("secret"), expected, &beside, &path) {
        Ok(()) => {
            assert!(!beside.exists());
            Ok(fs::read(path).expect("there"))
        }
        Err(error) => {
            assert!(!path.exists(), "a failed download has no name");
            let left = fs::metadata(&beside).map(|metadata| metadata.len());
            assert_ne!(left.ok(), Some(0), "an empty partial file is of no use");
            Err(format!("{error:#}"))
        }
    }
}

#[test]
fn a_good_server_is_asked_once_and_only_for_what_is_missing() {
    let server = Server::new(|request, _, out| part(request, out, &bytes()));
    assert_eq!(fetch(&server, &expected(&bytes()), b""), Ok(bytes()));
    assert_eq!(fetch(&server, &expected(&bytes()), &bytes()[..1000]), Ok(bytes()));
    assert_eq!(fetch(&server, &expected(&bytes()), &bytes()), Ok(bytes()));
    let requests = server.requests();
    assert_eq!(requests.len(), 2, "what is whole is not asked for");
    assert_eq!(requests[0].1.get("range"), None);
    assert_eq!(requests[1].1["range"], "bytes=1000-");
    assert_eq!(requests[0].1["authorization"], "Bearer secret");
}

#[test]
fn a_connection_that_breaks_goes_on_where_it_broke() {
    let server = Server::new(|request, number, out| match number {
        0 => say(out, "200 OK", &[], bytes().len(), &bytes()[..100_000]),
        _ => part(request, out, &bytes()),
    });
    assert_eq!(fetch(&server, &expected(&bytes()), b""), Ok(bytes()));
    let range = &server.requests()[1].1["range"];
    assert!(range.starts_with("bytes=") && range != "bytes=0-", "{range}");
}

#[test]
fn what_lies_there_of_another_file_is_fetched_anew() {
    // The file changed between two attempts: the rest does not fit the partial file.
    let server = Server::new(|request, _, out| part(request, out, &bytes()));
    assert_eq!(fetch(&server, &expected(&bytes()), &[1; 5000]), Ok(bytes()));
    assert_eq!(fetch(&server, &expected(&bytes()), &[1; 400_000]), Ok(bytes()));
    // A server that knows no parts sends it whole.
    let server = Server::new(|_, _, out| whole(out, &bytes()));
    assert_eq!(fetch(&server, &expected(&bytes()), &bytes()[..1000]), Ok(bytes()));
    // After a range that was not requested, the whole file is requested.
    let server = Server::new(|request, number, out| match number {
        0 => say(out, "206 Partial Content", &["Content-Range: bytes 5-9/300000"], 5, b"xxxxx"),
        _ => part(request, out, &bytes()),
    });
    assert_eq!(fetch(&server, &expected(&bytes()), &bytes()[..1000]), Ok(bytes()));
}

#[test]
fn a_file_that_is_not_the_expected_one_is_never_kept() {
    let mut other = bytes();
    other[7] ^= 1;
    let server = Server::new(move |request, _, out| part(request, out, &other));
    let message = fetch(&server, &expected(&bytes()), b"").expect_err("another file");
    assert!(message.contains("checksum") && message.contains("/file"), "{message}");
    let longer = Server::new(|_, _, out| whole(out, &[&bytes()[..], b"more"].concat()));
    let message = fetch(&longer, &expected(&bytes()), b"").expect_err("too long");
    assert!(message.contains("300004 bytes, not 300000"), "{message}");
    assert_eq!(server.requests().len(), 1, "asking again does not help");
    // Without an announced length.
    let longer = Server::new(|_, _, out| unannounced(out, &[&bytes()[..], b"more"].concat()));
    let message = fetch(&longer, &expected(&bytes()), b"").expect_err("too long");
    assert!(message.contains("300004 bytes, not 300000"), "{message}");
}

#[test]
fn a_lie_about_the_length_is_found_out() {
    // Less than there is: the rest is asked for.
    let server = Server::new(|request, number, out| match number {
        0 => say(out, "200 OK", &[], 500, &bytes()),
        _ => part(request, out, &bytes()),
    });
    assert_eq!(fetch(&server, &expected(&bytes()), b""), Ok(bytes()));
    let server = Server::new(|request, number, out| match number {
        0 => unannounced(out, &bytes()[..500]),
        _ => part(request, out, &bytes()),
    });
    assert_eq!(fetch(&server, &expected(&bytes()), b""), Ok(bytes()));
    assert_eq!(server.requests()[1].1["range"], "bytes=500-");
    // More than there is, each time: there is an end to asking.
    let server = Server::new(|_, _, out| say(out, "200 OK", &[], 1 << 40, &bytes()[..10]));
    let message = fetch(&server, &expected(&bytes()), b"").expect_err("cut short");
    assert!(message.contains("gave up after 6 attempts"), "{message}");
    assert!(message.contains("1099511627776 bytes, not 300000"), "{message}");
    assert_eq!(server.requests().len(), 6);
}

#[test]
fn a_busy_server_is_asked_again_and_one_that_says_no_is_not() {
    for status in ["429 Too Many Requests", "503 Service Unavailable", "500 Internal Server Error"]
    {
        let server = Server::new(move |request, number, out| match number {
            0 => say(out, status, &["Retry-After: 0"], 0, b""),
            1 => say(out, status, &[], 0, b""),
            _ => part(request, out, &bytes()),
        });
        assert_eq!(fetch(&server, &expected(&bytes()), b""), Ok(bytes()), "{status}");
        assert_eq!(server.requests().len(), 3);
    }
    for (status, part) in [("404 Not Found", "404"), ("401 Unauthorized", "401")] {
        let server = Server::new(move |_, _, out| say(out, status, &[], 0, b""));
        let message = fetch(&server, &expected(&bytes()), b"").expect_err(status);
        assert!(message.contains(part), "{message}");
        assert_eq!(server.requests().len(), 1, "{status}");
    }
    let page = Server::new(|_, _, out| {
        say(out, "200 OK", &["Content-Type: text/html; charset=utf-8"], 6, b"<html>");
    });
    let message = fetch(&page, &expected(&bytes()), b"").expect_err("a page");
    assert!(message.contains("a web page"), "{message}");
    assert_eq!(page.requests().len(), 1);
    // As the login page of a network sends it.
    let page = Server::new(|_, _, out| whole(out, b"\n<!DOCTYPE html><title>Log in</title>"));
    let message = fetch(&page, &of_unknown_length(&bytes()), b"").expect_err("a page");
    assert!(message.contains("a web page"), "{message}");
}

#[test]
fn a_token_goes_to_no_other_host() {
    let other = Server::new(|request, _, out| part(request, out, &bytes()));
    let target = format!("Location: {}/elsewhere", other.address);
    // A repository that was renamed, and is not for everyone.
    let server = Server::new(move |request, _, out| match request.0.as_str() {
        "/file" => say(out, "302 Found", &["Location: /here?from=http://a/b"], 0, b""),
        _ if request.1.contains_key("authorization") => {
            say(out, "307 Temporary Redirect", &[&target], 0, b"");
        }
        _ => say(out, "401 Unauthorized", &[], 0, b""),
    });
    assert_eq!(fetch(&server, &expected(&bytes()), b""), Ok(bytes()));
    let asked: Vec<(String, bool)> = (server.requests().into_iter())
        .map(|request| (request.0, request.1.contains_key("authorization")))
        .collect();
    let here = || "/here?from=http://a/b".to_owned();
    assert_eq!(asked, [("/file".into(), true), (here(), false), (here(), true)]);
    let elsewhere = other.requests();
    assert_eq!(elsewhere.len(), 1);
    assert!(!elsewhere[0].1.contains_key("authorization"), "the token was sent elsewhere");

    // Another port is another host: here the token is refused, and not sent again.
    let denied = Server::new(|_, _, out| say(out, "401 Unauthorized", &[], 0, b""));
    let target = format!("Location: {}/x", denied.address);
    let server = Server::new(move |_, _, out| say(out, "302 Found", &[&target], 0, b""));
    assert!(fetch(&server, &expected(&bytes()), b"").is_err());
    assert_eq!(denied.requests().len(), 1);
    assert!(!denied.requests()[0].1.contains_key("authorization"));

    let circle = Server::new(|_, _, out| say(out, "302 Found", &["Location: /file"], 0, b""));
    let message = fetch(&circle, &expected(&bytes()), b"").expect_err("a circle");
    assert!(message.contains("too many redirects"), "{message}");
    assert!(circle.requests().len() < 15, "asking again does not help");
    let out_of_http =
        Server::new(|_, _, out| say(out, "302 Found", &["Location: file:///etc/passwd"], 0, b""));
    assert!(fetch(&out_of_http, &expected(&bytes()), b"").is_err());
}

#[test]
fn a_server_that_cannot_be_reached_is_asked_once() {
    let closed = {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
        format!("http://{}", listener.local_addr().expect("bound"))
    };
    // A part of a name has at most 63 letters, so nobody needs to be asked for this one.
    let unresolvable = format!("http://{}.invalid", "a".repeat(64));
    for address in [closed, unresolvable] {
        let error = client().text(&format!("{address}/f"), None).expect_err("nobody is there");
        let error = format!("{error:#}");
        assert!(error.contains(&address) && !error.contains("attempts"), "{error}");
    }
    // A server that hangs up without an answer is there, so it is asked again.
    let rude = Server::new(|_, _, _| {});
    let error = client().text(&format!("{}/f", rude.address), None).expect_err("no answer");
    assert!(format!("{error:#}").contains("6 attempts"), "{error:#}");
    assert_eq!(rude.requests().len(), 6);
}

#[test]
fn mirrors_are_asked_in_order() {
    let folder = tempfile::tempdir().expect("a folder");
    let gone = Server::new(|_, _, out| say(out, "404 Not Found", &[], 0, b""));
    let wrong = Server::new(|_, _, out| whole(out, b"<not the file>"));
    let good = Server::new(|request, _, out| part(request, out, &bytes()));
    let urls = || [&gone, &wrong, &good].map(|server| format!("{}/f", server.address)).into_iter();
    let path = folder.path().join("deep/f");
    let get = |path: &Path| http::fetch_file(&client(), urls(), &expected(&bytes()), path, "");
    get(&path).expect("the last one has it");
    assert_eq!(fs::read(&path).expect("there"), bytes());
    get(&path).expect("it is there");
    assert_eq!(good.requests().len(), 1);
    fs::write(&path, b"damaged").expect("written");
    get(&path).expect("fetched again");
    assert_eq!(fs::read(&path).expect("there"), bytes());
    let none = [format!("{}/f", gone.address)].into_iter();
    let other = folder.path().join("g");
    let error = http::fetch_file(&client(), none, &expected(&bytes()), &other, "");
    assert!(format!("{:#}", error.expect_err("none has it")).contains("404"));
}

#[test]
fn a_server_that_falls_silent_is_asked_for_the_rest() {
    let server = Server::new(|request, number, out| match number {
        0 => {
            say(out, "200 OK", &[], bytes().len(), &bytes()[..100_000]);
            thread::sleep(Duration::from_secs(20));
        }
        1 => thread::sleep(Duration::from_secs(20)),
        _ => part(request, out, &bytes()),
    });
    let client = Client::with_waits(Duration::from_millis(1), Duration::from_secs(2), &|| false);
    let start = Instant::now();
    assert_eq!(fetch_by(&client, &server, &expected(&bytes()), b""), Ok(bytes()));
    assert!(start.elapsed() < Duration::from_secs(15), "it waited for {:?}", start.elapsed());
    assert_eq!(server.requests()[2].1["range"], "bytes=100000-");
}

#[test]
fn an_interrupt_ends_the_wait_for_a_silent_server_and_keeps_what_came() {
    // Silent before the answer, and within it.
    for sent in [0, 50_000] {
        let server = Server::new(move |_, _, out| {
            if sent > 0 {
                say(out, "200 OK", &[], bytes().len(), &bytes()[..sent]);
            }
            thread::sleep(Duration::from_secs(60));
        });
        let folder = tempfile::tempdir().expect("a folder");
        let [partial, path] = ["partial", "file"].map(|name| folder.path().join(name));
        let (interrupted, start) = (AtomicBool::new(false), OnceLock::new());
        let interrupt = || interrupted.load(Ordering::Relaxed);
        let minute = Duration::from_secs(60);
        let client = Client::with_waits(minute, minute, &interrupt);
        let error = thread::scope(|scope| {
            scope.spawn(|| {
                let there = || fs::metadata(&partial).map_or(0, |metadata| metadata.len());
                for _ in 0..3000 {
                    if !server.requests().is_empty() && there() == sent as u64 {
                        break;
                    }
                    thread::sleep(Duration::from_millis(10));
                }
                start.get_or_init(Instant::now);
                interrupted.store(true, Ordering::Relaxed);
            });
            let url = format!("{}/file", server.address);
            client.fetch(&url, None, &expected(&bytes()), &partial, &path).expect_err("interrupted")
        });
        assert!(error.is::<stage::Interrupted>(), "{error:#}");
        let waited = start.get().expect("interrupted").elapsed();
        assert!(waited < Duration::from_secs(15), "it waited for {waited:?}");
        assert_eq!(fs::read(&partial).unwrap_or_default(), bytes()[..sent]);
    }
}

#[test]
fn a_download_of_unknown_length_resumes_and_ends() {
    let server = Server::new(|request, _, out| part(request, out, &bytes()));
    let expected = of_unknown_length(&bytes());
    assert_eq!(fetch(&server, &expected, &bytes()[..1000]), Ok(bytes()));
    assert_eq!(server.requests().len(), 1);
    // The program was killed between the last byte and the final name: the server answers 416.
    assert_eq!(fetch(&server, &expected, &bytes()), Ok(bytes()));
    assert_eq!(server.requests().len(), 2);
    // Longer than the file, and as long but another one: from the start.
    let longer = [&bytes()[..], b"more"].concat();
    assert_eq!(fetch(&server, &expected, &longer), Ok(bytes()));
    assert_eq!(fetch(&server, &expected, &vec![1; bytes().len()]), Ok(bytes()));
    // Without anything to resume, 416 is a refusal.
    let server = Server::new(|_, _, out| say(out, "416 Range Not Satisfiable", &[], 0, b""));
    let message = fetch(&server, &expected, b"").expect_err("refused");
    assert!(message.contains("416"), "{message}");
}

#[test]
fn a_compressed_answer_is_the_file_as_it_was_published() {
    // Many servers announce the compression of a .gz file as one of the transfer.
    let server = Server::new(|_, _, out| {
        say(out, "200 OK", &["Content-Encoding: gzip"], bytes().len(), &bytes());
    });
    assert_eq!(fetch(&server, &expected(&bytes()), b""), Ok(bytes()));
    assert_eq!(server.requests()[0].1["accept-encoding"], "identity");
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_an_error_of_the_disk_and_no_other_address_is_asked() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("f");
    std::os::unix::fs::symlink("/dev/full", folder.path().join("f.incomplete")).expect("linked");
    let [first, second] =
        [(); 2].map(|()| Server::new(|request, _, out| part(request, out, &bytes())));
    let urls = [&first, &second].map(|server| format!("{}/f", server.address)).into_iter();
    let error = http::fetch_file(&client(), urls, &expected(&bytes()), &path, "");
    let error = error.expect_err("no room");
    let of_disk = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    assert_eq!(of_disk.expect("of the disk").kind(), std::io::ErrorKind::StorageFull);
    assert!(format!("{error:#}").contains("f.incomplete"), "{error:#}");
    assert_eq!((first.requests().len(), second.requests().len()), (1, 0));
}

#[test]
fn two_that_download_the_same_file_do_not_disturb_each_other() {
    let server = Server::new(|request, _, out| {
        thread::sleep(Duration::from_millis(300));
        part(request, out, &bytes());
    });
    let folder = tempfile::tempdir().expect("a folder");
    let [partial, path] = ["partial", "file"].map(|name| folder.path().join(name));
    let url = format!("{}/file", server.address);
    thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let fetched = client().fetch(&url, None, &expected(&bytes()), &partial, &path);
                fetched.expect("downloaded");
                assert_eq!(fs::read(&path).expect("there"), bytes());
            });
        }
    });
    assert_eq!(server.requests().len(), 1, "the others wait for the first");
    assert_eq!(fs::read_dir(folder.path()).expect("there").count(), 1);
}

#[test]
fn an_outage_of_all_mirrors_loses_nothing() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("f");
    let down = || {
        Server::new(|request, number, out| match (number, request.1.get("range")) {
            (0, None) => say(out, "200 OK", &[], bytes().len(), &bytes()[..200_000]),
            _ => say(out, "503 Service Unavailable", &[], 0, b""),
        })
    };
    let servers = [down(), down()];
    let urls = servers.each_ref().map(|server| format!("{}/f", server.address));
    let expected = of_unknown_length(&bytes());
    let error = http::fetch_file(&client(), urls.into_iter(), &expected, &path, "ask a friend");
    let error = format!("{:#}", error.expect_err("an outage"));
    assert!(error.contains("503") && error.ends_with("ask a friend"), "{error}");
    let kept = fs::read(folder.path().join("f.incomplete")).expect("kept");
    assert_eq!(kept, bytes()[..200_000]);
    // Later, another mirror sends the rest.
    let up = Server::new(|request, _, out| part(request, out, &bytes()));
    let urls = [format!("{}/f", up.address)].into_iter();
    http::fetch_file(&client(), urls, &expected, &path, "").expect("downloaded");
    assert_eq!(fs::read(&path).expect("there"), bytes());
    assert_eq!(up.requests()[0].1["range"], "bytes=200000-");
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one data set: two large files, one in a folder, and a small one.
fn a_hub(data: &'static [u8]) -> Server {
    Server::new(move |request, _, out| {
        let small = b"a small file";
        let resolve = format!("/datasets/owner/name/resolve/{COMMIT}/");
        match request.0.as_str() {
            "/api/datasets/owner/name/revision/main?blobs=true" => {
                let list = serde_json::json!({ "sha": COMMIT, "siblings": [
                    { "rfilename": "data/train 0.tar", "size": data.len(), "blobId": "unused",
                      "lfs": { "sha256": sha(data), "size": data.len(), "pointerSize": 1 } },
                    { "rfilename": "README.tar", "size": small.len(), "blobId": git(small) },
                    { "rfilename": "../outside.tar", "size": 1, "blobId": git(b"x") },
                    { "rfilename": "notes.md", "size": 1, "blobId": git(b"x") },
                ]});
                whole(out, list.to_string().as_bytes());
            }
            path if path == format!("{resolve}data/train%200.tar") => part(request, out, data),
            path if path == format!("{resolve}README.tar") => part(request, out, small),
            _ => say(out, "404 Not Found", &[], 0, b""),
        }
    })
}

/// The archives of a repository, as paths.
fn archives(
    address: &Address,
    settings: &Settings,
    client: &Client,
) -> anyhow::Result<Vec<PathBuf>> {
    let choose = |mut names: Vec<String>| {
        names.retain(|name| name.ends_with(".tar") && name.starts_with(&address.pattern));
        anyhow::ensure!(!names.is_empty(), "no files");
        Ok(names)
    };
    let Snapshot { folder, names } = hub::fetch(address, settings, client, choose)?;
    Ok(names.into_iter().map(|name| folder.join(name)).collect())
}

fn settings(server: &Server, cache: PathBuf) -> Settings {
    let token = Some("secret".to_owned());
    Settings { endpoint: server.address.clone(), cache, token, is_offline: false }
}

#[test]
fn a_data_set_of_the_hub_is_kept_as_python_keeps_it() {
    static DATA: [u8; 5000] = [3; 5000];
    let server = a_hub(&DATA);
    let folder = tempfile::tempdir().expect("a folder");
    let mut settings = settings(&server, folder.path().join("hub"));
    let address = Address::parse("datasets/owner/name").expect("an address");
    let paths = archives(&address, &settings, &client()).expect("fetched");
    let root = folder.path().join("hub/datasets--owner--name");
    let snapshot = root.join("snapshots").join(COMMIT);
    assert_eq!(paths, [snapshot.join("README.tar"), snapshot.join("data/train 0.tar")]);
    assert_eq!(fs::read(&paths[1]).expect("there"), DATA);
    assert_eq!(fs::read_to_string(root.join("refs/main")).expect("there"), COMMIT);
    assert_eq!(fs::read(root.join("blobs").join(sha(&DATA))).expect("there"), DATA);
    let target = fs::read_link(&paths[1]).expect("a link");
    assert_eq!(target, Path::new("../../../blobs").join(sha(&DATA)));
    assert!(!folder.path().join("hub/datasets--owner--name/snapshots/outside.tar").exists());

    let asked = server.requests().len();
    assert_eq!(archives(&address, &settings, &client()).expect("kept"), paths);
    assert_eq!(server.requests().len(), asked + 1, "only the commit is asked for");
    settings.is_offline = true;
    settings.endpoint = "http://127.0.0.1:1".into();
    assert_eq!(archives(&address, &settings, &client()).expect("kept"), paths);
    let pinned = Address::parse(&format!("datasets/owner/name@{COMMIT}/data")).expect("an address");
    assert_eq!(archives(&pinned, &settings, &client()).expect("kept"), paths[1..]);
    let other = Address::parse("datasets/owner/name@v2").expect("an address");
    let error = archives(&other, &settings, &client()).expect_err("not kept");
    assert!(error.to_string().contains("HF_HUB_OFFLINE"), "{error:#}");
}

#[test]
fn a_hub_that_states_other_files_is_refused() {
    static DATA: [u8; 500] = [4; 500];
    let cases: [(&str, serde_json::Value); 4] = [
        ("is not one of the hub", serde_json::json!({ "error": "no" })),
        ("as a commit", serde_json::json!({ "sha": "../../x", "siblings": [] })),
        ("no files", serde_json::json!({ "sha": COMMIT, "siblings": [] })),
        (
            "as the digest",
            serde_json::json!({ "sha": COMMIT, "siblings": [
                { "rfilename": "a.tar", "size": 1, "blobId": "../../../../outside" }]}),
        ),
    ];
    for (part, answer) in cases {
        let server = Server::new(move |_, _, out| whole(out, answer.to_string().as_bytes()));
        let folder = tempfile::tempdir().expect("a folder");
        let settings = settings(&server, folder.path().join("hub"));
        let address = Address::parse("datasets/owner/name").expect("an address");
        let error = archives(&address, &settings, &client()).expect_err(part);
        assert!(format!("{error:#}").contains(part), "{part}: {error:#}");
    }
    // A repository that is not public, or that is not there: the hub answers alike.
    let server = Server::new(|_, _, out| say(out, "401 Unauthorized", &[], 0, b""));
    let folder = tempfile::tempdir().expect("a folder");
    let denied = settings(&server, folder.path().join("hub"));
    let address = Address::parse("datasets/owner/name").expect("an address");
    let error = archives(&address, &denied, &client()).expect_err("not public");
    let error = format!("{error:#}");
    assert!(error.contains("HF_TOKEN") && error.contains("check its name"), "{error}");
    // The blob is not what its digest says.
    let server = Server::new(|request, _, out| match request.0.starts_with("/api") {
        true => {
            let list = serde_json::json!({ "sha": COMMIT, "siblings": [
                { "rfilename": "a.tar", "size": 500, "blobId": git(b"other") }]});
            whole(out, list.to_string().as_bytes());
        }
        false => part(request, out, &DATA),
    });
    let folder = tempfile::tempdir().expect("a folder");
    let settings = settings(&server, folder.path().join("hub"));
    let address = Address::parse("datasets/owner/name").expect("an address");
    let error = archives(&address, &settings, &client()).expect_err("another blob");
    assert!(format!("{error:#}").contains("checksum"), "{error:#}");
}
