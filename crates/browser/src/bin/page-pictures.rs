//! `page-pictures`: takes the pictures of the documentation from the page of a run.
//!
//! It starts `assort view` on the run and opens the page in a headless browser, as a person would.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};

use anyhow::{Context, Result, ensure};
use browser::{Browser, chromium, page};
use clap::Parser;

/// Takes pictures of the page of a run: its map, and the steps of a correction.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask pictures")]
struct PicturesArguments {
    /// The folder of the run. Its corrections are removed afterwards; a run that has some is refused.
    run: PathBuf,
    /// Folder to write into.
    #[arg(long, value_name = "DIR", default_value = "docs")]
    out: PathBuf,
    /// How the names of the files begin.
    #[arg(long, value_name = "TEXT")]
    name: String,
    /// The cluster to correct; without it, there is only the map.
    #[arg(long, value_name = "K", requires_all = ["call", "into"])]
    cluster: Option<usize>,
    /// What to call this cluster.
    #[arg(long, value_name = "TEXT")]
    call: Option<String>,
    /// The cluster to move its picture of lowest score to.
    #[arg(long, value_name = "K")]
    into: Option<usize>,
    /// The program `assort`; cargo xtask passes it.
    #[arg(long, value_name = "PATH", hide = true)]
    assort: PathBuf,
}

/// Most bytes of a picture.
const MOST_BYTES: usize = 300_000;

/// The window, and that of the map, which is above the row of buttons.
const SIZE: [usize; 2] = [1000, 700];
const MAP_SIZE: [usize; 2] = [1000, 800];

fn main() -> ExitCode {
    stage::console::start_logging();
    stage::finish("pictures", &run(&PicturesArguments::parse()))
}

fn run(arguments: &PicturesArguments) -> Result<()> {
    let corrections = arguments.run.join("corrections.toml");
    ensure!(
        !corrections.exists(),
        "`{}` exists; these pictures are of a run without corrections",
        corrections.display()
    );
    let program = chromium().context("there is no chromium on the path; install it")?;
    let folder = tempfile::tempdir()?;
    let mut browser = Browser::start(&program, folder.path())?;
    let server = Server::start(&arguments.assort, &arguments.run)?;
    browser.resize(MAP_SIZE, "light")?;
    browser.open(&server.address)?;
    browser.until("plot")?;
    let taken = take(&mut browser, arguments);
    drop(server);
    if corrections.exists() {
        fs::remove_file(&corrections)?;
    }
    taken
}

/// Takes all pictures.
fn take(browser: &mut Browser, arguments: &PicturesArguments) -> Result<()> {
    let keep = |name: &str, picture: &[u8]| -> Result<()> {
        let path = arguments.out.join(format!("{}-{name}.png", arguments.name));
        let length = picture.len();
        ensure!(
            length <= MOST_BYTES,
            "`{}` would have {length} bytes; show less on it",
            path.display()
        );
        fs::create_dir_all(&arguments.out)?;
        fs::write(&path, picture).with_context(|| format!("writing `{}`", path.display()))?;
        stage::console::print_line(path.display())
    };
    if arguments.cluster.is_some() {
        page::hover_first_point(browser)?;
    }
    browser.value("byId('map').scrollIntoView({ block: 'start', behavior: 'instant' })")?;
    keep("map", &browser.screenshot_of("#map")?)?;
    let (Some(cluster), Some(name), Some(into)) =
        (arguments.cluster, &arguments.call, arguments.into)
    else {
        return Ok(());
    };
    browser.resize(SIZE, "light")?;
    let section = format!("#c{cluster}");
    let to_section = format!(
        "document.querySelector('{section}').scrollIntoView({{ block: 'start', behavior: 'instant' }})"
    );
    let shown = format!("document.querySelectorAll('{section} a.p img').length > 20");
    browser.value(&to_section)?;
    browser.until(&shown)?;
    browser.click_until(&format!("{section} button"), "byId('rename').open")?;
    let text = serde_json::to_string(name)?;
    browser.value(&format!("byId('rename-name').value = {text}"))?;
    keep("correction-1", &browser.screenshot()?)?;
    browser.click("#rename-save")?;
    browser.until(&format!(
        "!isBusy && document.querySelector('{section} h3').textContent.includes({text})"
    ))?;

    // The picture of lowest score stands last.
    browser.click("#select")?;
    let last = format!("{section} figure:nth-of-type(2) a.p:last-of-type");
    browser.click_until(&last, "byId('selected-count').textContent === '1 selected'")?;
    browser.click_until("#move", "byId('move-dialog').open")?;
    browser.value(&format!("byId('move-to').value = '{into}'"))?;
    browser.value(
        "document.querySelector('a.p.selected').scrollIntoView({ block: 'start', behavior: 'instant' })",
    )?;
    keep("correction-2", &browser.screenshot()?)?;
    browser.click("#move-save")?;
    browser.until("!isBusy && byId('saved').textContent === 'All corrections are saved'")?;
    browser.value(&to_section)?;
    browser.until(&shown)?;
    keep("correction-3", &browser.screenshot()?)
}

/// `assort view` on a run.
struct Server {
    process: Child,
    address: String,
}

impl Server {
    fn start(assort: &Path, run: &Path) -> Result<Self> {
        let mut command = Command::new(assort);
        command.arg("view").arg(run).stdout(Stdio::piped());
        let mut process = command.spawn().context("starting `assort view`")?;
        let output = process.stdout.take().context("an output")?;
        let mut server = Self { process, address: String::new() };
        BufReader::new(output).read_line(&mut server.address)?;
        ensure!(!server.address.is_empty(), "`assort view` ended; its message is above");
        server.address.truncate(server.address.trim_end().len());
        Ok(server)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
