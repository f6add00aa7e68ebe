//! `assort cluster` on a folder of pictures, with a narrow published network made here.
#![cfg(unix)]

#[path = "../../crates/hub/tests/server/mod.rs"]
mod server;

use std::collections::BTreeMap;
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use image::RgbImage;
use serde_json::{Value, json};
use server::{Server, git, say, sha, whole};
use tests::bench::{assort, stderr};
use tests::pictures::{self, PICTURES, PLAIN};
use tests::published;

/// TEMI in a second: few heads, few steps. Everything else is the program's own experiment.
const QUICK: &str = "
extends = ['data/photos', 'method/frozen-pretrained', 'method/temi']
[shared]
precision = 'f32'
[temi]
heads = 2
[temi.run]
passes = 1.0
least-steps = 40
";

/// `assort cluster` in `folder`, on its pictures.
fn command(folder: &Path, words: &[&str]) -> Command {
    command_on("pictures", folder, words)
}

/// `assort cluster PATH` in `folder`.
fn command_on(path: &str, folder: &Path, words: &[&str]) -> Command {
    let mut command = assort();
    command.args(["cluster", path]).args(words);
    if !words.contains(&"--device") {
        command.args(["--device", "cpu"]);
    }
    if !words.contains(&"--backbone") {
        command.args(["--backbone", "network"]);
    }
    command.current_dir(folder);
    command
}

/// Runs `assort cluster` in `folder` and returns what it printed.
fn cluster(folder: &Path, words: &[&str]) -> Output {
    command(folder, words).output().expect("started")
}

fn succeeds(folder: &Path, words: &[&str]) -> String {
    let output = cluster(folder, words);
    assert!(output.status.success(), "{words:?}: {}", stderr(&output));
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// A folder with pictures of three classes in one folder, a network, and the quick experiment.
fn photographs() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let [source, pictures, network, configs] =
        ["source", "pictures", "network", "configs"].map(|name| folder.path().join(name));
    for path in [&source, &pictures, &network, &configs] {
        fs::create_dir(path).expect("created");
    }
    pictures::write(&source, PLAIN, 0).expect("written");
    for class in PLAIN.classes {
        for file in fs::read_dir(source.join(class)).expect("there").flatten() {
            let name = format!("{class}-{}", file.file_name().to_string_lossy());
            fs::rename(file.path(), pictures.join(name)).expect("moved");
        }
    }
    published::write(&network);
    fs::write(configs.join("photos.toml"), QUICK).expect("written");
    folder
}

/// How many pictures the run's `embed` step took from an earlier run.
fn known(folder: &Path) -> u64 {
    let log = fs::read_to_string(folder.join("runs/photos-pictures/0/0-embed/log.jsonl"));
    let log = log.expect("a log");
    let known = log.lines().find_map(|line| {
        serde_json::from_str::<Value>(line).expect("JSON").get("known").and_then(Value::as_u64)
    });
    known.expect("it says so")
}

/// The cluster of each picture by its name.
fn clusters(folder: &Path) -> BTreeMap<String, usize> {
    let table = folder.join("runs/photos-pictures/0/report/clusters.csv");
    let table = fs::read_to_string(table).expect("a table");
    let line = |line: &str| {
        let mut cells = line.split(',');
        let name = cells.next().expect("a name").to_owned();
        (name, cells.next().and_then(|cell| cell.parse().ok()).expect("a number"))
    };
    table.lines().skip(1).map(line).collect()
}

fn files_in(folder: &Path) -> usize {
    let folders = fs::read_dir(folder).expect("there").flatten();
    folders.map(|folder| fs::read_dir(folder.path()).expect("there").count()).sum()
}

#[test]
fn a_folder_is_grouped_and_only_added_pictures_are_embedded_again() {
    let folder = photographs();
    let folder = folder.path();
    let words = ["--clusters", "3", "--copy-to", "sorted", "--link-to", "links", "--json"];
    let output = cluster(folder, &words);
    let [printed, progress] =
        [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    assert!(output.status.success(), "{progress}");
    let events = progress.lines().filter(|line| line.starts_with('{'));
    let mut events = events.map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let embedded = events.rfind(|event| event["label"] == "embed");
    assert_eq!(embedded.map(|event| event["done"].clone()), Some(json!(90)), "{progress}");
    let results: Value = serde_json::from_str(&printed).expect("nothing but one object");
    for (key, path) in [("page", "report/report.html"), ("table", "report/clusters.csv")] {
        assert_eq!(results[key], format!("runs/photos-pictures/0/{path}"));
        assert!(folder.join(results[key].as_str().expect("a path")).is_file(), "{key}");
    }
    assert_eq!([&results["copies"], &results["links"]], ["sorted", "links"]);
    assert_eq!((&results["clusters"], &results["is-estimate"]), (&json!(3), &json!(false)));
    assert!(results["plausible-range"].is_null());
    let mut sizes = BTreeMap::new();
    for cluster in clusters(folder).into_values() {
        *sizes.entry(cluster.to_string()).or_insert(0) += 1;
    }
    assert_eq!(results["sizes"], json!(sizes));
    for key in ["agreement-of-heads", "agreement-with-k-means"] {
        assert!(results.get(key).is_some(), "{key}: {results}");
    }
    assert!(results["agreement-of-heads"].as_f64() > Some(-1.), "{results}");
    assert!(results["reliable-share"].as_f64() <= Some(1.), "{results}");
    assert_eq!([files_in(&folder.join("sorted")), files_in(&folder.join("links"))], [PICTURES; 2]);
    assert_eq!(known(folder), 0);

    // Another number of clusters embeds nothing again.
    let step = fs::canonicalize(folder.join("runs/photos-pictures/0/0-embed")).expect("there");
    succeeds(folder, &["--clusters", "4"]);
    let again = fs::canonicalize(folder.join("runs/photos-pictures/0/0-embed")).expect("there");
    assert_eq!(step, again);

    // Of added pictures, only those are embedded.
    let more = tempfile::tempdir().expect("a folder");
    pictures::write(more.path(), PLAIN, 1).expect("written");
    for number in [1, 4, 7] {
        let from = more.path().join(format!("corners/{number:03}.png"));
        fs::rename(from, folder.join(format!("pictures/new-{number}.png"))).expect("moved");
    }
    let printed = succeeds(folder, &["--clusters", "3"]);
    for part in
        ["93 pictures in 3 clusters", "pictures by cluster: 0: ", "page: runs/", "table: runs/"]
    {
        assert!(printed.contains(part), "{part}: {printed}");
    }
    assert!(!printed.contains("assort report") && !printed.contains("ACC"), "{printed}");
    assert_eq!(known(folder), 90);
    assert_eq!(stored(folder, "pretraining"), 1, "one network serves all pictures");
}

/// How many results of a step the store holds.
fn stored(folder: &Path, step: &str) -> usize {
    let store = fs::read_dir(folder.join("runs/.store")).expect("a store").flatten();
    let is_result = |entry: &fs::DirEntry| {
        entry.path().is_dir() && entry.file_name().to_string_lossy().starts_with(step)
    };
    store.filter(is_result).count()
}

/// How many pictures have the same number in both, and the most that any three numbers give.
fn kept(one: &BTreeMap<String, usize>, other: &BTreeMap<String, usize>) -> (usize, usize) {
    let agree = |map: [usize; 3]| {
        one.iter()
            .filter(|(name, old)| other.get(*name).is_some_and(|&new| map[new] == **old))
            .count()
    };
    let all = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]];
    (agree(all[0]), all.into_iter().map(agree).max().expect("some"))
}

#[test]
fn clusters_keep_their_numbers_when_pictures_are_added_and_values_change() {
    let folder = photographs();
    let folder = folder.path();
    succeeds(folder, &["--clusters", "3"]);
    let first = clusters(folder);
    let more = tempfile::tempdir().expect("a folder");
    pictures::write(more.path(), PLAIN, 1).expect("written");
    for number in [1, 4, 7] {
        let from = more.path().join(format!("corners/{number:03}.png"));
        fs::rename(from, folder.join(format!("pictures/new-{number}.png"))).expect("moved");
    }
    // Other heads, which number their clusters anyhow.
    let quick = QUICK.replace("heads = 2", "heads = 3");
    fs::write(folder.join("configs/photos.toml"), quick).expect("written");
    let message = stderr(&cluster(folder, &["--clusters", "3"]));
    assert!(message.contains("have the same cluster number"), "{message}");
    let next = clusters(folder);
    assert_eq!(next.len(), PICTURES + 3);
    let (same, most) = kept(&first, &next);
    assert!(same == most && same > PICTURES / 2, "{same} of {most}");
}

/// A line of the table: cluster, name of the cluster, mark.
fn corrected(table: &Path) -> BTreeMap<String, [String; 3]> {
    let table = fs::read_to_string(table).expect("a table");
    let line = |line: &str| {
        let cells: Vec<String> = line.split(',').map(str::to_owned).collect();
        let [name, cluster, _, _, _, cluster_name, mark] = cells.try_into().expect("seven columns");
        (name, [cluster, cluster_name, mark])
    };
    table.lines().skip(1).map(line).collect()
}

/// Corrections as a person writes them who knows the files: of a run that numbered its clusters 7, 5 and 9.
fn corrections(pictures: &Path, [first, second, third]: [&[&String]; 3]) -> String {
    let id = |name: &String| format!("\"{}\"", sha(&fs::read(pictures.join(name)).expect("there")));
    let cluster = |number: u32, name: &str, members: &[&String]| {
        let exemplars: Vec<String> = members.iter().take(16).map(|name| id(name)).collect();
        format!("[[cluster]]\nnumber = {number}\n{name}\nexemplars = [{}]\n", exemplars.join(", "))
    };
    [
        "format-version = 1\n".to_owned(),
        cluster(7, "name = \"=Bars\"", first),
        cluster(5, "", second),
        cluster(9, "", third),
        "[[merge]]\nclusters = [7, 5]\n".to_owned(),
        format!("[[picture]]\nid = {}\nname = \"x\"\ncluster = 9\n", id(first[0])),
        format!("[[picture]]\nid = {}\nname = \"y\"\nmark = \"outlier\"\n", id(third[0])),
    ]
    .concat()
}

#[test]
fn corrections_outlive_added_pictures_and_name_the_clusters_of_later_ones() {
    let folder = photographs();
    let folder = folder.path();
    let (run, pictures) = (folder.join("runs/photos-pictures/0"), folder.join("pictures"));
    succeeds(folder, &["--clusters", "3"]);
    let first = clusters(folder);
    let members = |number: usize| -> Vec<&String> {
        first.iter().filter(|(_, own)| **own == number).map(|(name, _)| name).collect()
    };
    let members = [0, 1, 2].map(members);
    let text = corrections(&pictures, [&members[0], &members[1], &members[2]]);
    fs::write(run.join("corrections.toml"), &text).expect("written");

    let more = tempfile::tempdir().expect("a folder");
    pictures::write(more.path(), PLAIN, 1).expect("written");
    let from = more.path().join("corners/001.png");
    fs::rename(from, pictures.join("new.png")).expect("moved");
    fs::remove_file(pictures.join(members[1][0])).expect("removed");
    let output = cluster(folder, &["--clusters", "3", "--copy-to", "sorted"]);
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    assert!(
        message.contains("applying the corrections of `runs/photos-pictures/0/corr"),
        "{message}"
    );
    assert_eq!(fs::read_to_string(run.join("corrections.toml")).expect("there"), text);

    let found = corrected(&run.join("report/clusters.csv"));
    let plain = clusters_without_corrections(folder);
    let [bars, other] = [members[0][1], members[2][1]].map(|name| plain[name].to_string());
    assert_eq!(found.len(), PICTURES);
    for (name, [cluster, cluster_name, mark]) in &found {
        let want = match plain[name].to_string() {
            _ if name == members[2][0] => ["", "", "outlier"],
            _ if name == members[0][0] => [other.as_str(), "", ""],
            own if own == other => [other.as_str(), "", ""],
            _ => [bars.as_str(), "'=Bars", ""],
        };
        assert_eq!([cluster.as_str(), cluster_name, mark], want, "{name}");
    }
    assert!(folder.join(format!("sorted/{bars}-=Bars")).is_dir());
    assert_eq!(fs::read_dir(folder.join("sorted/outliers")).expect("there").count(), 1);

    // Other pictures: of the merged clusters, one by one.
    let later = folder.join("later");
    fs::create_dir(&later).expect("created");
    for name in [members[0][0], members[1][1], members[2][0]] {
        fs::copy(pictures.join(name), later.join(name)).expect("copied");
    }
    let mut command = assort();
    command.args(["predict", "runs/photos-pictures/0", "--images", "later", "--device", "cpu"]);
    let output = command.current_dir(folder).output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(stdout.contains(&format!("{bars} (=Bars): 2")), "{stdout}");
    let table = stdout.lines().find_map(|line| line.trim().strip_prefix("table: "));
    let found = corrected(&folder.join(table.expect("a path")));
    assert_eq!(found[members[1][1]], [bars.as_str(), "'=Bars", ""]);
    assert_eq!(
        found[members[0][0]],
        [bars.as_str(), "'=Bars", ""],
        "moves are of the run's pictures"
    );
    assert_eq!(found[members[2][0]], [other.as_str(), "", ""]);
}

/// The cluster of each picture, as the run has it.
fn clusters_without_corrections(folder: &Path) -> BTreeMap<String, usize> {
    let mut command = assort();
    command.args(["report", "runs/photos-pictures/0", "--no-corrections"]).current_dir(folder);
    let output = command.output().expect("started");
    let message = stderr(&output);
    assert!(output.status.success() && !message.contains("corrections"), "{message}");
    clusters(folder)
}

/// A server of `assort view`, asked as a browser asks it.
struct View {
    process: Child,
    /// Host and port.
    host: String,
    cookie: String,
}

impl View {
    fn start(folder: &Path, words: &[&str]) -> Self {
        let mut command = assort();
        command.arg("view").args(words).current_dir(folder).stdout(Stdio::piped());
        let mut process = command.spawn().expect("started");
        let mut address = String::new();
        let output = process.stdout.take().expect("an output");
        BufReader::new(output).read_line(&mut address).expect("an address");
        let (host, token) = (address.trim().strip_prefix("http://"))
            .and_then(|address| address.split_once("/?token="))
            .unwrap_or_else(|| panic!("`{address}` is no address with a token"));
        let mut view = Self { process, host: host.to_owned(), cookie: String::new() };
        let answer = view.ask(&format!("GET /?token={token}"), "");
        assert!(answer.starts_with("HTTP/1.1 303"), "{answer}");
        let cookie = answer.lines().find_map(|line| line.strip_prefix("set-cookie: "));
        view.cookie = cookie.and_then(|cookie| cookie.split(';').next()).expect("one").to_owned();
        view
    }

    fn ask(&self, first: &str, body: &str) -> String {
        let Self { host, cookie, .. } = self;
        let mut stream = TcpStream::connect(host).expect("it listens");
        let length = body.len();
        let request = format!(
            "{first} HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\nConnection: close\r\n\
             Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}"
        );
        stream.write_all(request.as_bytes()).expect("sent");
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).expect("an answer");
        String::from_utf8_lossy(&answer).into_owned()
    }

    /// Stops it as Ctrl-C does, which is its usual end.
    fn interrupt(mut self) {
        let id = self.process.id().to_string();
        assert!(Command::new("kill").args(["-INT", &id]).status().expect("started").success());
        let status = self.process.wait().expect("it ends");
        assert!(status.success(), "{status}");
    }
}

impl Drop for View {
    fn drop(&mut self) {
        let _ = self.process.kill(); // After a failed assertion.
        let _ = self.process.wait();
    }
}

#[test]
fn a_served_run_is_corrected_and_its_report_shows_the_corrections() {
    let folder = photographs();
    let folder = folder.path();
    succeeds(folder, &["--clusters", "3"]);
    let run = folder.join("runs/photos-pictures/0");
    let map = run.join("report/cache/map.safetensors");
    let computed = || fs::metadata(&map).and_then(|file| file.modified()).expect("a map");
    let first = computed();

    let view = View::start(folder, &["runs/photos-pictures/0"]);
    let page = view.ask("GET /", "");
    assert!(page.starts_with("HTTP/1.1 200") && page.contains("Cluster 2"), "{page}");
    let edit = json!({ "revision": 0, "edit": { "rename": { "cluster": 2, "name": "Bars" } } });
    let answer = view.ask("POST /edit", &edit.to_string());
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    view.interrupt();
    let corrections = fs::read_to_string(run.join("corrections.toml")).expect("written");
    assert!(corrections.contains("name = \"Bars\""), "{corrections}");

    let mut command = assort();
    command.args(["report", "runs/photos-pictures/0"]).current_dir(folder);
    let output = command.output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    let table = corrected(&run.join("report/clusters.csv"));
    let named = table.values().filter(|[_, name, _]| name == "Bars").count();
    assert_eq!(named, table.values().filter(|[cluster, ..]| cluster == "2").count());
    assert!(named > 0);
    assert_eq!(computed(), first, "the map was computed once");
}

#[test]
fn a_large_picture_is_stored_smaller_and_copied_as_it_was() {
    let folder = photographs();
    let folder = folder.path();
    let large = RgbImage::from_fn(700, 600, |x, y| image::Rgb([x as u8, y as u8, (x + y) as u8]));
    large.save(folder.join("pictures/large.png")).expect("written");
    let original = fs::read(folder.join("pictures/large.png")).expect("there");
    let copy = |words: &[&str], out: &str| {
        let output = cluster(folder, &[&["--clusters", "3", "--copy-to", out], words].concat());
        let message = stderr(&output);
        assert!(output.status.success(), "{message}");
        let clusters = fs::read_dir(folder.join(out)).expect("there").flatten();
        let mut files = clusters.flat_map(|cluster| fs::read_dir(cluster.path()).expect("there"));
        let is_it = |path: &std::path::PathBuf| path.to_string_lossy().contains("large.png");
        let found = files.find_map(|file| Some(file.expect("there").path()).filter(is_it));
        (fs::read(found.expect("a copy")).expect("there"), message)
    };
    let (whole, message) = copy(&[], "sorted");
    assert!(whole == original && !message.contains("reduced"), "{message}");

    // Where the original is gone, what was prepared is copied.
    let report = |out: &str| {
        let mut command = assort();
        command.args(["report", "runs/photos-pictures/0", "--copy-to", out]).current_dir(folder);
        stderr(&command.output().expect("started"))
    };
    assert!(!report("again").contains("reduced"));
    fs::rename(folder.join("pictures"), folder.join("elsewhere")).expect("moved");
    let message = report("reduced");
    assert!(message.contains("1 copies") && message.contains("512 pixels"), "{message}");
}

#[test]
fn the_backbone_is_fetched_once_from_a_hub_and_without_a_hub_the_message_says_how() {
    let folder = photographs();
    let folder = folder.path();
    let commit = "0123456789abcdef0123456789abcdef01234567";
    let names = ["config.json", "preprocessor_config.json", "model.safetensors"];
    let files: BTreeMap<&str, Vec<u8>> = names
        .map(|name| (name, fs::read(folder.join("network").join(name)).expect("there")))
        .into();
    let sibling = |(name, bytes): (&&str, &Vec<u8>)| match name.ends_with(".json") {
        true => json!({ "rfilename": name, "size": bytes.len(), "blobId": git(bytes) }),
        false => json!({ "rfilename": name, "size": bytes.len(), "lfs": { "sha256": sha(bytes) } }),
    };
    let listing =
        json!({ "sha": commit, "siblings": files.iter().map(sibling).collect::<Vec<_>>() });
    let hub = Server::new(move |request, _, out| {
        match (
            request.0.contains("/api/"),
            files.get(request.0.rsplit('/').next().expect("a name")),
        ) {
            (true, _) => whole(out, listing.to_string().as_bytes()),
            (false, Some(bytes)) => whole(out, bytes),
            (false, None) => say(out, "404 Not Found", &[], 0, b""),
        }
    });
    let run = |endpoint: &str, clusters: &str| {
        let words = ["--clusters", clusters, "--backbone", "hf://owner/name"];
        let mut command = command(folder, &words);
        command.env("HF_ENDPOINT", endpoint).env("HF_HOME", folder.join("hub"));
        command.env_remove("HF_HUB_OFFLINE").env_remove("HF_HUB_CACHE");
        command.output().expect("started")
    };
    let output = run("http://127.0.0.1:1", "3");
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(2), "{message}");
    for part in ["hf download owner/name", "model.safetensors", "--backbone scratch"] {
        assert!(message.contains(part), "{part}: {message}");
    }
    assert!(!message.contains("attempts") && !message.contains("asking again"), "{message}");
    assert!(!folder.join("runs").exists(), "said before the pictures are prepared");

    let output = run(&hub.address, "3");
    assert!(output.status.success(), "{}", stderr(&output));
    let fetched = hub.requests().iter().filter(|request| !request.0.contains("/api/")).count();
    assert_eq!(fetched, 3, "each file once");
    let output = run("http://127.0.0.1:1", "4");
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn the_number_of_clusters_is_estimated_once_where_none_is_given() {
    let folder = photographs();
    let estimate = || {
        let output = cluster(folder.path(), &[]);
        let message = stderr(&output);
        assert!(output.status.success(), "{message}");
        assert!(message.contains("clusters is an estimate"), "{message}");
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(printed.contains("the number is an estimate"), "{printed}");
        message.contains("estimating the number of clusters")
    };
    assert!(estimate());
    let mut command = assort();
    command.args(["clusters", "runs/photos-pictures/0", "--json"]).current_dir(folder.path());
    let output = command.output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    let printed = String::from_utf8_lossy(&output.stdout);
    let scored: Value =
        serde_json::from_str(printed.lines().last().expect("a line")).expect("JSON");
    let candidates = scored["candidates"].as_array().expect("a list");
    let most = candidates.iter().filter_map(|candidate| candidate["clusters"].as_u64()).max();
    assert_eq!(most, Some(PICTURES as u64 / 4), "a quarter of the pictures by default");
    assert!(!estimate(), "the same pictures are not estimated again");
    let kept = folder.path().join("runs/photos-pictures/0/number-of-clusters.json");
    let text = fs::read_to_string(&kept).expect("a kept estimate");
    fs::write(&kept, text.replacen("2", "3", 1)).expect("a damaged estimate");
    assert!(estimate(), "a damaged estimate is computed anew");
    let some = fs::read_dir(folder.path().join("pictures")).expect("there").flatten().next();
    fs::remove_file(some.expect("a picture").path()).expect("removed");
    assert!(estimate(), "other pictures may need another number");
}

#[test]
fn another_folder_of_the_same_name_gets_a_run_of_its_own() {
    let folder = photographs();
    let folder = folder.path();
    succeeds(folder, &["--clusters", "3"]);
    let page = folder.join("runs/photos-pictures/0/report/report.html");
    let first = fs::read(&page).expect("a page");
    let other = folder.join("other/pictures");
    fs::create_dir_all(&other).expect("created");
    for picture in fs::read_dir(folder.join("pictures")).expect("there").flatten().take(60) {
        fs::copy(picture.path(), other.join(picture.file_name())).expect("copied");
    }
    let mut command = assort();
    command.args(["cluster", "other/pictures", "--device", "cpu", "--backbone", "network"]);
    let output = command.args(["--clusters", "3"]).current_dir(folder).output().expect("started");
    let message = stderr(&output);
    let printed = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(printed.contains("assort view runs/photos-pictures-2/0"), "{printed}{message}");
    assert!(message.contains("the run `runs/photos-pictures` is of"), "{message}");
    assert_eq!(fs::read(&page).expect("a page"), first, "the first run stays as it is");
}

/// Words that only users of an experiment, or of a single program, understand.
const FOREIGN: [&str; 9] = [
    "--set",
    "--source",
    "--images",
    "--to",
    "` in table `[",
    "`[",
    "broken-share",
    "`format",
    "exit status",
];

/// Runs `assort cluster PATH`, which must refuse with this exit status. Returns the message: one line, which no other
/// program's line explains.
fn refusal(path: &str, folder: &Path, words: &[&str], status: i32) -> String {
    let output = command_on(path, folder, words).output().expect("started");
    let message = stderr(&output);
    assert_eq!(output.status.code(), Some(status), "{path} {words:?}: {message}");
    for foreign in FOREIGN {
        assert!(!message.contains(foreign), "{path} {words:?}: `{foreign}` in {message}");
    }
    only_message(&message)
}

/// The one line of stderr that is not of the log, whose lines begin with a date.
fn only_message(stderr: &str) -> String {
    let is_of_log = |line: &&str| line.starts_with("20");
    let lines: Vec<&str> = stderr.lines().filter(|line| !is_of_log(line)).collect();
    assert_eq!(lines.len(), 1, "{stderr}");
    assert!(
        lines[0].starts_with("assort: ") && stderr.ends_with(&format!("{}\n", lines[0])),
        "{stderr}"
    );
    lines[0].to_owned()
}

/// Writes a folder of small pictures, each of one colour.
fn write_plain(folder: &Path, colours: &[u8]) {
    fs::create_dir(folder).expect("created");
    for (number, &colour) in colours.iter().enumerate() {
        let picture = RgbImage::from_pixel(9, 8, image::Rgb([colour; 3]));
        picture.save(folder.join(format!("{number}.png"))).expect("written");
    }
}

#[test]
fn what_cannot_be_clustered_is_refused_before_anything_runs() {
    let folder = photographs();
    let folder = folder.path();
    for name in ["empty", "texts", "other"] {
        fs::create_dir(folder.join(name)).expect("created");
    }
    write_plain(&folder.join("one"), &[0]);
    write_plain(&folder.join("three"), &[0, 100, 200]);
    fs::write(folder.join("texts/notes.txt"), "1").expect("written");
    fs::write(folder.join("file"), "1").expect("written");
    fs::write(folder.join("text.jpg"), "1").expect("written");
    fs::write(folder.join("other/config.json"), r#"{"model_type": "bert"}"#).expect("written");
    fs::write(folder.join("other/model.safetensors"), "1").expect("written");
    let cases = [
        ("missing", &[][..], &["PATH `missing`", "no such folder"][..]),
        ("missing", &["--link-to", "links"], &["PATH `missing`", "no such folder"]),
        ("empty", &[], &["PATH `empty`", "no JPEG, PNG or WebP pictures", "pass another"]),
        ("texts", &[], &["PATH `texts`", "no JPEG, PNG or WebP pictures", "pass another"]),
        ("text.jpg", &[], &["PATH `text.jpg`", "neither a JPEG nor a PNG", "pass a picture"]),
        ("one", &[], &["PATH `one`", "only 1 picture", "at least 2"]),
        ("one", &["--clusters", "2"], &["PATH `one`", "only 1 picture", "at least 2"]),
        ("three", &[], &["PATH `three`", "only 3 pictures", "--clusters 2"]),
        ("three", &["--clusters", "10"], &["--clusters 10", "only 3 pictures"]),
        ("pictures", &["--clusters", "91"], &["--clusters 91", "only 90 pictures"]),
        ("pictures", &["--backbone", "no-such"], &["--backbone", "no-such", "dinov2-small"]),
        ("pictures", &["--backbone", "no/such"], &["--backbone", "`no/such` is missing", "name a"]),
        ("pictures", &["--backbone", "no.safetensors"], &["--backbone", "is missing", "name a"]),
        ("pictures", &["--backbone", "empty"], &["--backbone", "config.json"]),
        ("pictures", &["--backbone", "other"], &["--backbone", "`bert` is not known"]),
        ("pictures", &["--backbone", "file"], &["--backbone", "not a safetensors file"]),
        ("pictures", &["--out", "file"], &["--out", "is a file"]),
        ("pictures", &["--out", "file/page"], &["--out", "is a file"]),
        ("pictures", &["--copy-to", "file/sorted"], &["--copy-to", "is a file"]),
        ("pictures", &["--runs", "file"], &["--runs", "is a file"]),
        ("pictures", &["--device", "cuda:99"], &["--device cuda:99"]),
    ];
    for (path, words, parts) in cases {
        let line = refusal(path, folder, words, 2);
        for part in parts {
            assert!(line.contains(part), "{path} {words:?}: `{part}` in {line}");
        }
        assert!(!folder.join("runs/.store").exists(), "{path} {words:?}");
    }
    let message = stderr(&cluster(folder, &["--clusters", "1"]));
    assert!(message.contains("from 2"), "{message}");
}

#[test]
fn what_only_a_step_finds_out_is_said_in_the_words_of_the_command() {
    let folder = photographs();
    let folder = folder.path();
    write_plain(&folder.join("same"), &[7; 6]);
    write_plain(&folder.join("broken"), &[7; 2]);
    write_plain(&folder.join("some"), &[7, 90, 180]);
    fs::write(folder.join("some/notes.jpg"), "no picture").expect("written");
    for name in ["1.jpg", "2.jpg", "3.jpg"] {
        fs::write(folder.join("broken").join(name), "no picture").expect("written");
    }
    fs::create_dir(folder.join("damaged")).expect("created");
    for file in fs::read_dir(folder.join("network")).expect("there").flatten() {
        fs::copy(file.path(), folder.join("damaged").join(file.file_name())).expect("copied");
    }
    let weights = fs::File::options().write(true).open(folder.join("damaged/model.safetensors"));
    weights.and_then(|file| file.set_len(900)).expect("truncated");
    for (path, words, status, parts) in [
        (
            "same",
            &["--clusters", "2"][..],
            4,
            &["copies", "--clusters", "--backbone", "runs/photos-same/errors.log"][..],
        ),
        ("same", &[], 2, &["6 pictures", "--clusters K"]),
        (
            "broken",
            &[],
            2,
            &["PATH `broken`", "3 of 5 pictures", "50 %", "`1.jpg`", "repair or remove"],
        ),
        (
            "pictures",
            &["--backbone", "damaged"],
            2,
            &["--backbone: `damaged/model.safetensors`", "another --backbone"],
        ),
    ] {
        let line = refusal(path, folder, words, status);
        for part in parts {
            assert!(line.contains(part), "{path} {words:?}: `{part}` in {line}");
        }
    }
    let kept = |name: &str| fs::read_to_string(folder.join("runs").join(name).join("errors.log"));
    for (name, part) in [
        ("photos-same", "temi: all images fell into one cluster"),
        ("photos-broken", "prepare: 3 of 5 pictures"),
        ("photos-pictures", "pretrained: `damaged/model.safetensors`"),
    ] {
        let text = kept(name).expect("the messages of the steps");
        assert!(text.contains(part), "{name}: {text}");
    }

    // A few unreadable pictures are skipped, and a file has their names.
    let output = command_on("some", folder, &["--clusters", "2"]).output().expect("started");
    let message = stderr(&output);
    assert!(output.status.success(), "{message}");
    assert!(
        message.contains("cannot read 1 picture") && message.contains("/skipped.json`"),
        "{message}"
    );

    // What is not said in other words is shown with what the command can change.
    fs::write(folder.join("configs/photos.toml"), QUICK.replace("heads = 2", "heads = 0"))
        .expect("written");
    let output = cluster(folder, &["--clusters", "3"]);
    let line = only_message(&stderr(&output));
    for part in ["the step `temi` failed", "heads", "tables and keys in this message", "--clusters"]
    {
        assert!(line.contains(part), "`{part}` in {line}");
    }
}

#[test]
fn pictures_at_any_depth_of_an_archive_are_grouped_and_predicted() {
    let folder = photographs();
    let folder = folder.path();
    for (number, picture) in
        fs::read_dir(folder.join("pictures")).expect("there").flatten().enumerate()
    {
        let place = folder.join(["holiday", "holiday/2023/summer", "holiday/2024"][number % 3]);
        fs::create_dir_all(&place).expect("created");
        fs::rename(picture.path(), place.join(picture.file_name())).expect("moved");
    }
    let packed =
        Command::new("tar").args(["-cf", "holiday.tar", "holiday"]).current_dir(folder).status();
    assert!(packed.expect("started").success());
    let output = command_on("holiday.tar", folder, &["--clusters", "3"]).output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    let printed = String::from_utf8(output.stdout).expect("UTF-8");
    assert!(printed.starts_with(&format!("{PICTURES} pictures in 3 clusters")), "{printed}");
    assert!(!printed.contains("agreement with the folders"), "{printed}");
    let mut predict = assort();
    predict.args(["predict", "photos-holiday", "--images", "holiday.tar", "--device", "cpu"]);
    let output = predict.current_dir(folder).output().expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn the_folders_of_the_pictures_are_compared_with_the_clusters() {
    let folder = photographs();
    let folder = folder.path();
    pictures::write(&folder.join("sorted-by-hand"), PLAIN, 0).expect("written");
    let output = command_on("sorted-by-hand", folder, &["--clusters", "3"]).output();
    let output = output.expect("started");
    assert!(output.status.success(), "{}", stderr(&output));
    let printed = String::from_utf8(output.stdout).expect("UTF-8");
    for part in ["agreement with the folders, in percent:", "ACC", "NMI", "ARI"] {
        assert!(printed.contains(part), "{part}: {printed}");
    }
}

#[test]
fn results_inside_the_folder_of_pictures_are_no_pictures() {
    let folder = photographs();
    let pictures = folder.path().join("pictures");
    // The command reads its experiments from the current folder.
    fs::rename(folder.path().join("configs"), pictures.join("configs")).expect("moved");
    let run = |clusters: &str| {
        let mut command = assort();
        command.args([
            "cluster",
            ".",
            "--device",
            "cpu",
            "--backbone",
            "../network",
            "--out",
            "page",
        ]);
        command.args(["--clusters", clusters, "--copy-to", &format!("../{clusters}")]);
        let output = command.current_dir(&pictures).output().expect("started");
        assert!(output.status.success(), "{}", stderr(&output));
        files_in(&folder.path().join(clusters))
    };
    assert_eq!(run("3"), PICTURES);
    assert!(pictures.join("runs").is_dir() && pictures.join("page/clusters.csv").is_file());
    let data = || fs::read_dir(pictures.join("runs/.data")).expect("there").count();
    let prepared = data();
    assert_eq!(run("4"), PICTURES);
    assert_eq!(data(), prepared, "nothing is prepared again");
}

#[test]
fn unusable_folders_for_sorted_pictures_are_refused_before_anything_runs() {
    let folder = photographs();
    let folder = folder.path();
    fs::create_dir(folder.join("other")).expect("created");
    fs::write(folder.join("other/mine.png"), "1").expect("written");
    for (words, part) in [
        (&["--copy-to", "other"][..], "exists already"),
        (&["--link-to", "other"], "exists already"),
        (&["--copy-to", "pictures/sorted"], "inside the folder of pictures"),
        (&["--link-to", "other/../pictures"], "inside the folder of pictures"),
        (&["--copy-to", "sorted", "--link-to", "./sorted"], "the same folder"),
        (&["--runs", "pictures"], "among the pictures"),
        (&["--out", "pictures"], "among the pictures"),
    ] {
        let output = cluster(folder, &[&["--clusters", "3"], words].concat());
        let message = stderr(&output);
        assert_eq!(output.status.code(), Some(2), "{words:?}: {message}");
        assert!(message.contains(part), "{words:?}: {message}");
        assert!(!folder.join("runs/.store").exists(), "{words:?}");
    }
}

#[test]
fn folders_of_an_earlier_grouping_are_refused_before_anything_runs() {
    let folder = photographs();
    let folder = folder.path();
    let steps = || ["pretraining", "embed", "temi"].map(|step| stored(folder, step));
    let words = ["--clusters", "3", "--copy-to", "sorted", "--link-to", "links"];
    succeeds(folder, &words);
    succeeds(folder, &words);
    let before = steps();
    let refused = |words: &[&str]| {
        let line = refusal("pictures", folder, words, 2);
        assert!(line.contains("holds an earlier grouping"), "{words:?}: {line}");
        assert_eq!(steps(), before, "{words:?}");
    };
    refused(&["--clusters", "4", "--copy-to", "sorted"]);
    refused(&["--clusters", "4", "--link-to", "links"]);
    fs::remove_file(folder.join("pictures/bars-000.png")).expect("removed");
    refused(&words);
    refused(&["--copy-to", "sorted"]);
}
