//! Networks of a hub on this machine that behaves, and of ones that do not (Pretrained networks, case T19).

mod server;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hub::http::{Checksum, Client};
use hub::{Address, ModelFiles, PublishedModel, Settings};
use serde_json::json;

use server::{Server, git, part, say, sha, whole};

const FIRST: &str = "0123456789abcdef0123456789abcdef01234567";
const SECOND: &str = "fedcba9876543210fedcba9876543210fedcba98";

type RepositoryFiles = BTreeMap<&'static str, Vec<u8>>;

/// The files of a small network; `mark` tells two commits apart.
fn files(mark: u8) -> RepositoryFiles {
    BTreeMap::from([
        ("config.json", vec![b'{', mark, b'}']),
        ("preprocessor_config.json", vec![b'[', mark, b']']),
        ("model.safetensors", vec![mark; 70_000]),
        ("pytorch_model.bin", vec![0; 10]),
    ])
}

/// How the hub lists a commit: weights are large files with a SHA-256, the rest is in git.
fn listed(commit: &str, files: &RepositoryFiles) -> Vec<u8> {
    let sibling = |(name, bytes): (&&str, &Vec<u8>)| match name.ends_with(".json") {
        true => json!({ "rfilename": name, "size": bytes.len(), "blobId": git(bytes) }),
        false => json!({ "rfilename": name, "size": bytes.len(), "blobId": "of the pointer",
                         "lfs": { "sha256": sha(bytes), "size": bytes.len() } }),
    };
    let siblings: Vec<_> = files.iter().map(sibling).collect();
    json!({ "sha": commit, "siblings": siblings }).to_string().into_bytes()
}

/// A hub with `owner/name`, whose branch `main` is at the first commit.
fn a_hub(files: RepositoryFiles) -> Server {
    Server::new(move |request, _, out| {
        let path = request.0.as_str();
        if path.starts_with("/api/models/owner/name/revision/") {
            return whole(out, &listed(FIRST, &files));
        }
        let name = path.strip_prefix(&format!("/owner/name/resolve/{FIRST}/")).unwrap_or_default();
        match files.get(name) {
            Some(bytes) => part(request, out, bytes),
            None => say(out, "404 Not Found", &["X-Error-Code: EntryNotFound"], 0, b""),
        }
    })
}

fn settings(server: &Server, cache: &Path) -> Settings {
    let (endpoint, token) = (server.address.clone(), Some("secret".to_owned()));
    Settings { endpoint, cache: cache.to_owned(), token, is_offline: false }
}

/// A client that repeats a request at once, and waits for an answer longer than a busy machine takes.
fn client() -> Client<'static> {
    Client::with_waits(Duration::from_millis(1), Duration::from_secs(60), &|| false)
}

fn address(text: &str) -> Address {
    Address::parse(text).expect("an address")
}

fn get(text: &str, settings: &Settings) -> anyhow::Result<ModelFiles> {
    PublishedModel::find(&address(text), settings, &client())?.fetch(settings, &client())
}

/// The message of a failure to get `owner/name`.
fn refusal(server: &Server) -> String {
    let folder = tempfile::tempdir().expect("a folder");
    let error = get("owner/name", &settings(server, folder.path())).expect_err("refused");
    assert!(
        !folder
            .path()
            .join("models--owner--name/snapshots")
            .join(FIRST)
            .join("model.safetensors")
            .exists()
    );
    format!("{error:#}")
}

#[test]
fn a_network_is_listed_fetched_once_and_then_found_without_the_hub() {
    let server = a_hub(files(b'1'));
    let folder = tempfile::tempdir().expect("a folder");
    let mut settings = settings(&server, folder.path());
    let model = PublishedModel::find(&address("owner/name"), &settings, &client()).expect("listed");
    assert_eq!((model.repository.as_str(), model.commit.as_str()), ("owner/name", FIRST));
    let digest = Checksum::Sha256(sha(&files(b'1')["model.safetensors"]));
    assert_eq!(model.weights().collect::<Vec<_>>(), [("model.safetensors", &digest)]);
    assert_eq!(model.missing_bytes(), 70_006);
    assert_eq!(server.requests().len(), 1, "nothing is downloaded yet");

    let found = model.fetch(&settings, &client()).expect("fetched");
    assert_eq!(fs::read(&found.weights[0]).expect("there"), files(b'1')["model.safetensors"]);
    assert_eq!(fs::read(found.preprocessor.expect("one")).expect("there"), b"[1]");
    assert_eq!(server.requests().len(), 4, "no pickle is downloaded");

    // The branch is not looked up again, and the same digests are known without the hub.
    let again = PublishedModel::find(&address("owner/name"), &settings, &client()).expect("kept");
    assert_eq!(again.weights().collect::<Vec<_>>(), [("model.safetensors", &digest)]);
    assert_eq!((again.commit.as_str(), again.missing_bytes()), (FIRST, 0));
    settings.is_offline = true;
    for text in ["owner/name".to_owned(), format!("owner/name@{FIRST}")] {
        assert_eq!(get(&text, &settings).expect("kept").weights, found.weights);
    }
    assert_eq!(server.requests().len(), 4);
}

#[test]
fn a_branch_that_moves_between_two_files_mixes_no_commits() {
    let server = Server::new(|request, number, out| {
        let path = request.0.as_str();
        if path.contains("/api/") {
            return whole(out, &listed(FIRST, &files(b'1')));
        }
        // From the second request on, the branch is at the second commit.
        let at = |commit: &str| path.strip_prefix(&format!("/owner/name/resolve/{commit}/"));
        let (bytes, other) = (files(b'1'), files(b'2'));
        match (at(FIRST), at("main"), number) {
            (Some(name), _, _) => part(request, out, &bytes[name]),
            (_, Some(name), 1..) => part(request, out, &other[name]),
            _ => say(out, "404 Not Found", &[], 0, b""),
        }
    });
    let folder = tempfile::tempdir().expect("a folder");
    let found = get("owner/name", &settings(&server, folder.path())).expect("fetched");
    assert_eq!(fs::read(&found.configuration).expect("there"), b"{1}");
    assert_eq!(fs::read(&found.weights[0]).expect("there")[0], b'1');

    // Between looking the network up and fetching it: the commit that was found is fetched.
    let moved = Server::new(|request, number, out| match (request.0.contains("/api/"), number) {
        (true, 0) => whole(out, &listed(FIRST, &files(b'1'))),
        (true, _) => whole(out, &listed(SECOND, &files(b'2'))),
        _ => {
            let name = request.0.rsplit('/').next().expect("a name");
            let mark = if request.0.contains(FIRST) { b'1' } else { b'2' };
            part(request, out, &files(mark)[name]);
        }
    });
    let folder = tempfile::tempdir().expect("a folder");
    let settings = settings(&moved, folder.path());
    PublishedModel::find(&address("owner/name"), &settings, &client()).expect("listed");
    let later = PublishedModel::find(&address("owner/name"), &settings, &client());
    let error = later.expect_err("the hub has another commit in place of the first");
    assert!(format!("{error:#}").contains("in place of"), "{error:#}");
}

#[test]
fn the_token_is_not_sent_to_the_host_that_has_the_weights() {
    let store =
        Server::new(|request, _, out| part(request, out, &files(b'1')["model.safetensors"]));
    let location = format!("Location: {}/blob", store.address);
    let server = Server::new(move |request, _, out| match request.0.as_str() {
        path if path.contains("/api/") => whole(out, &listed(FIRST, &files(b'1'))),
        path if path.ends_with("/model.safetensors") => say(out, "302 Found", &[&location], 0, b""),
        path => part(request, out, &files(b'1')[path.rsplit('/').next().expect("a name")]),
    });
    let folder = tempfile::tempdir().expect("a folder");
    get("owner/name", &settings(&server, folder.path())).expect("fetched");
    assert!(server.requests().iter().all(|request| request.1["authorization"] == "Bearer secret"));
    assert_eq!(store.requests().len(), 1);
    assert!(!store.requests()[0].1.contains_key("authorization"));
}

#[test]
fn weights_in_shards_are_those_that_the_index_names() {
    let shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    let index = json!({ "weight_map": { "a": shards[0], "b": shards[1], "c": shards[0] } });
    let mut all = files(b'1');
    all.remove("model.safetensors");
    all.extend(shards.map(|shard| (shard, shard.as_bytes().to_vec())));
    all.insert("model.safetensors.index.json", index.to_string().into_bytes());
    let server = a_hub(all.clone());
    let folder = tempfile::tempdir().expect("a folder");
    let settings = settings(&server, folder.path());
    let found = get("owner/name", &settings).expect("fetched");
    let names: Vec<_> =
        found.weights.iter().map(|path| path.file_name().expect("a name")).collect();
    assert_eq!(names, shards);
    let offline = Settings { is_offline: true, ..settings };
    assert_eq!(get("owner/name", &offline).expect("kept"), found);

    // The hub lacks a shard that the index names.
    all.remove(shards[1]);
    let message = refusal(&a_hub(all.clone()));
    assert!(message.contains(shards[1]) && message.contains("is missing"), "{message}");
    all.insert("model.safetensors.index.json", br#"{"weight_map":{"a":"../../x"}}"#.to_vec());
    let message = refusal(&a_hub(all));
    assert!(message.contains("not beside it"), "{message}");
}

#[test]
fn pickles_are_never_downloaded_and_the_message_names_another_repository() {
    let mut pickled = files(b'1');
    pickled.remove("model.safetensors");
    let server = a_hub(pickled);
    let message = refusal(&server);
    for part in ["pytorch_model.bin", "any program", "timm/vit_small_patch16_224.dino"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(server.requests().len(), 1);
    let none = refusal(&a_hub(BTreeMap::from([("README.md", vec![1])])));
    assert!(none.contains("README.md") && none.contains("model.safetensors"), "{none}");

    let folder = tempfile::tempdir().expect("a folder");
    fs::write(folder.path().join("config.json"), "{}").expect("written");
    fs::write(folder.path().join("dino.pth"), "x").expect("written");
    let error = ModelFiles::in_folder(folder.path()).expect_err("a pickle").to_string();
    assert!(error.contains("dino.pth") && error.contains("pickle"), "{error}");
}

#[test]
fn each_refusal_says_what_to_do() {
    let answers = |on_list: bool, status: &'static str, headers: &'static [&'static str]| {
        Server::new(move |request, _, out| match (request.0.contains("/api/"), on_list) {
            (true, false) => whole(out, &listed(FIRST, &files(b'1'))),
            _ => say(out, status, headers, 0, b""),
        })
    };
    let gated: &[&str] = &["X-Error-Code: GatedRepo", "X-Error-Message: Access is restricted."];
    let fine_grained: &[&str] =
        &["X-Error-Message: Please enable access to public gated repositories"];
    let cases: [(bool, &str, &[&str], &[&str]); 9] = [
        (
            false,
            "401 Unauthorized",
            gated,
            &["accept its licence at https://huggingface.co/owner/name", "HF_TOKEN", "restricted"],
        ),
        (
            false,
            "403 Forbidden",
            gated,
            &["accept its licence at https://huggingface.co/owner/name", "HF_TOKEN"],
        ),
        (false, "403 Forbidden", fine_grained, &["permission to read public gated"]),
        (true, "401 Unauthorized", &[], &["check its name", "HF_TOKEN", "hf download"]),
        (true, "404 Not Found", &["X-Error-Code: RepoNotFound"], &["check its name"]),
        (true, "404 Not Found", &["X-Error-Code: RevisionNotFound"], &["no revision `main`"]),
        (true, "429 Too Many Requests", &[], &["wait some minutes", "HF_TOKEN", "6 attempts"]),
        (false, "503 Service Unavailable", &[], &["try again later", "6 attempts"]),
        (true, "200 OK", &["Content-Type: text/html"], &["web page", "hf download"]),
    ];
    for (on_list, status, headers, parts) in cases {
        let message = refusal(&answers(on_list, status, headers));
        for part in parts {
            assert!(message.contains(part), "{status}, {part}: {message}");
        }
    }
}

#[test]
fn a_busy_hub_is_asked_again() {
    let server = Server::new(|request, number, out| match number {
        0 => say(out, "429 Too Many Requests", &["Retry-After: 0"], 0, b""),
        2 => say(out, "503 Service Unavailable", &[], 0, b""),
        _ if request.0.contains("/api/") => whole(out, &listed(FIRST, &files(b'1'))),
        _ => part(request, out, &files(b'1')[request.0.rsplit('/').next().expect("a name")]),
    });
    let folder = tempfile::tempdir().expect("a folder");
    get("owner/name", &settings(&server, folder.path())).expect("fetched in the end");
}

#[test]
fn weights_that_come_in_part_are_fetched_on_and_never_kept_in_part() {
    // The first time in part, or always.
    let cut = |always: bool| {
        Server::new(move |request, number, out| {
            let (all, name) = (files(b'1'), request.0.rsplit('/').next().expect("a name"));
            match (request.0.contains("/api/"), name) {
                (true, _) => whole(out, &listed(FIRST, &all)),
                (false, "model.safetensors") if always || number < 4 => {
                    say(out, "200 OK", &[], 70_000, &all[name][..20_000]);
                }
                _ => part(request, out, &all[name]),
            }
        })
    };
    let (folder, server) = (tempfile::tempdir().expect("a folder"), cut(false));
    let found = get("owner/name", &settings(&server, folder.path())).expect("fetched");
    assert_eq!(fs::read(&found.weights[0]).expect("there"), files(b'1')["model.safetensors"]);
    assert!(server.requests().iter().any(|request| request.1.contains_key("range")));
    let message = refusal(&cut(true));
    assert!(message.contains("model.safetensors") && message.contains("6 attempts"), "{message}");
}

#[test]
fn weights_with_another_digest_are_never_kept() {
    let server = Server::new(|request, _, out| match request.0.contains("/api/") {
        true => whole(out, &listed(FIRST, &files(b'1'))),
        false => {
            let name = request.0.rsplit('/').next().expect("a name");
            let mark = if name == "model.safetensors" { b'2' } else { b'1' };
            part(request, out, &files(mark)[name]);
        }
    });
    let message = refusal(&server);
    assert!(message.contains("checksum") && message.contains("model.safetensors"), "{message}");
}

#[test]
fn damaged_weights_in_the_cache_are_downloaded_again() {
    let server = a_hub(files(b'1'));
    let folder = tempfile::tempdir().expect("a folder");
    let settings = settings(&server, folder.path());
    let found = get("owner/name", &settings).expect("fetched");
    let blob = fs::canonicalize(&found.weights[0]).expect("a link");
    fs::write(&blob, vec![0; 70_000]).expect("written");
    let offline = Settings { is_offline: true, ..settings.clone() };
    let error = get("owner/name", &offline).expect_err("damaged").to_string();
    assert!(error.contains("damaged"), "{error}");
    get("owner/name", &settings).expect("fetched again");
    assert_eq!(fs::read(&blob).expect("there"), files(b'1')["model.safetensors"]);
}

#[test]
fn without_a_network_and_a_cached_copy_the_message_says_what_to_fetch() {
    let folder = tempfile::tempdir().expect("a folder");
    let offline = Settings {
        endpoint: "http://127.0.0.1:1".into(),
        cache: folder.path().to_owned(),
        token: None,
        is_offline: true,
    };
    let parts = [
        "hf download owner/name --revision main",
        "config.json",
        "model.safetensors",
        "`backbone`",
    ];
    let error = get("owner/name", &offline).expect_err("not there").to_string();
    for part in parts.iter().chain(&["HF_HUB_OFFLINE"]) {
        assert!(error.contains(part), "{part}: {error}");
    }
    let unreachable = Settings { is_offline: false, ..offline };
    let error = format!("{:#}", get("owner/name", &unreachable).expect_err("no server"));
    for part in parts {
        assert!(error.contains(part), "{part}: {error}");
    }
    assert!(!error.contains("attempts"), "there is no network to wait for: {error}");
    let error = get("datasets/owner/name", &unreachable).expect_err("a data set").to_string();
    assert!(error.contains("not the address of a network"), "{error}");
}

/// As timm's repositories are: they have no `preprocessor_config.json`.
#[test]
fn a_repository_without_a_preprocessor_is_whole() {
    let mut all = files(b'1');
    all.remove("preprocessor_config.json");
    let server = a_hub(all);
    let folder = tempfile::tempdir().expect("a folder");
    let settings = settings(&server, folder.path());
    let found = get("owner/name", &settings).expect("fetched");
    assert_eq!(found.preprocessor, None::<PathBuf>);
    let asked = server.requests().len();
    get("owner/name", &settings).expect("kept");
    assert_eq!(server.requests().len(), asked, "the mark of the absent file is kept");
}
