//! The page in a real browser: headless Chromium, by the DevTools protocol over two pipes.
//!
//! Skipped with a message where no `chromium` is on the path. `ASSORT_SCREENSHOTS=DIR` keeps the pictures
//! that are taken, to look at.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use data::images::{self, StoredPicture};
use data::{Embeddings, Images, Labels, Names, Picture, PseudoLabels};
use serde_json::{Value, json};
use stage::{Interrupt, Split};

use crate::analysis::tests::grouped;
use crate::run_files::RunFiles;
use crate::view::tests::TestServer;
use crate::{PAGE, ReportArguments, run, view};

/// A browser with one page.
struct Browser {
    process: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    calls: u64,
    session: Option<String>,
    events: Vec<Value>,
    /// Where the page may ask, if it is served.
    server: Option<String>,
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The browser on the path.
fn chromium() -> Option<PathBuf> {
    let folders = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let paths =
        std::env::split_paths(&folders).flat_map(|folder| names.map(|name| folder.join(name)));
    paths.into_iter().find(|path| path.is_file())
}

impl Browser {
    fn start(program: &Path, profile: &Path) -> Result<Self> {
        let mut process = Command::new("sh")
            .args(["-c", "exec \"$@\" 3<&0 4>&1 0</dev/null 1>/dev/null 2>/dev/null", "sh"])
            .arg(program)
            .args(["--headless", "--no-sandbox", "--remote-debugging-pipe", "--no-first-run"])
            .args(["--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"])
            .arg(format!("--user-data-dir={}", profile.display()))
            .arg("about:blank")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let input = process.stdin.take().context("an input")?;
        let mut output = BufReader::new(process.stdout.take().context("an output")?);
        let (send, messages) = channel();
        std::thread::spawn(move || {
            let mut message = Vec::new();
            while output.read_until(0, &mut message).is_ok_and(|count| count > 0) {
                message.pop();
                let parsed = serde_json::from_slice(&message).expect("JSON");
                message.clear();
                if send.send(parsed).is_err() {
                    break;
                }
            }
        });
        let mut browser = Self {
            process,
            input,
            messages,
            calls: 0,
            session: None,
            events: Vec::new(),
            server: None,
        };
        let target = browser.call("Target.createTarget", json!({ "url": "about:blank" }))?;
        let target = json!({ "targetId": target["targetId"], "flatten": true });
        let session = browser.call("Target.attachToTarget", target)?;
        browser.session = session["sessionId"].as_str().map(str::to_owned);
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({}))?;
        }
        Ok(browser)
    }

    fn call(&mut self, method: &str, parameters: Value) -> Result<Value> {
        self.calls += 1;
        let mut message = json!({ "id": self.calls, "method": method, "params": parameters });
        if let Some(session) = &self.session {
            message["sessionId"] = session.as_str().into();
        }
        self.input.write_all(&[&*serde_json::to_vec(&message)?, &[0]].concat())?;
        loop {
            let answer = self.next().with_context(|| format!("waiting for {method}"))?;
            if answer["id"] == self.calls {
                if let Some(error) = answer.get("error") {
                    bail!("{method}: {error}");
                }
                return Ok(answer["result"].clone());
            }
            self.events.push(answer);
        }
    }

    fn next(&self) -> Result<Value> {
        Ok(self.messages.recv_timeout(Duration::from_secs(60))?)
    }

    /// Opens a page and waits until it is loaded.
    fn open(&mut self, address: &str) -> Result<()> {
        self.events.clear();
        self.call("Page.navigate", json!({ "url": address }))?;
        let is_loaded = |event: &Value| event["method"] == "Page.loadEventFired";
        while !self.events.iter().any(is_loaded) {
            let event = self.next()?;
            self.events.push(event);
        }
        Ok(())
    }

    fn value(&mut self, expression: &str) -> Result<Value> {
        let parameters =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", parameters)?;
        if let Some(error) = answer.get("exceptionDetails") {
            bail!("{expression}: {error}");
        }
        Ok(answer["result"]["value"].clone())
    }

    /// Waits until an expression is true on the page.
    fn until(&mut self, expression: &str) -> Result<()> {
        let waits = format!(
            "new Promise((done, fail) => {{ const start = Date.now(); (function look() {{ if ({expression}) done(); \
             else if (Date.now() - start > 30000) fail(new Error('it never came true')); \
             else setTimeout(look, 20); }})(); }})"
        );
        self.value(&waits).map(drop)
    }

    fn text(&mut self, expression: &str) -> Result<String> {
        Ok(self
            .value(expression)?
            .as_str()
            .with_context(|| format!("{expression} is no text"))?
            .to_owned())
    }

    fn mouse(&mut self, kind: &str, [x, y]: [f64; 2]) -> Result<()> {
        let button = if kind == "mouseMoved" { "none" } else { "left" };
        let parameters = json!({ "type": kind, "x": x, "y": y, "button": button, "clickCount": 1 });
        self.call("Input.dispatchMouseEvent", parameters).map(drop)
    }

    fn drag(&mut self, along: &[[f64; 2]]) -> Result<()> {
        self.mouse("mouseMoved", along[0])?;
        self.mouse("mousePressed", along[0])?;
        for &at in &along[1..] {
            let parameters = json!({ "type": "mouseMoved", "x": at[0], "y": at[1], "button": "left", "buttons": 1 });
            self.call("Input.dispatchMouseEvent", parameters)?;
        }
        self.mouse("mouseReleased", along[along.len() - 1])
    }

    /// The value of an expression, once it no longer changes and no picture in the window is loading: such a
    /// picture moves what is below it.
    fn steady(&mut self, expression: &str) -> Result<Value> {
        self.value(&format!(
            "(async () => {{ let last, now, rounds = 0; \
             const loads = image => {{ const r = image.getBoundingClientRect(); return !image.complete && \
             image.src.startsWith('http') && r.width && r.bottom > 0 && r.top < innerHeight; }}; do {{ last = now; now = {expression}; \
             await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))); \
             }} while (rounds++ < 40 && (String(now) !== String(last) || Array.from(document.images).some(loads))); \
             return now; }})()"
        ))
    }

    fn click(&mut self, selector: &str) -> Result<()> {
        let at = self.steady(&format!(
            "(() => {{ const e = document.querySelector('{selector}'); \
             e.scrollIntoView({{ block: 'center', behavior: 'instant' }}); \
             const r = e.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2]; }})()"
        ))?;
        self.drag(&[[at[0].as_f64().context("x")?, at[1].as_f64().context("y")?]])
    }

    /// Moves the pointer to a picture of the map, until its tip shows. Returns where that is.
    fn hover_first_point(&mut self) -> Result<[f64; 2]> {
        for _ in 0..10 {
            let at = self.steady(FIRST_POINT)?;
            let at = [at[0].as_f64().context("x")?, at[1].as_f64().context("y")?];
            self.mouse("mouseMoved", at)?;
            if self.value("byId('tip').hidden")? == false {
                return Ok(at);
            }
        }
        bail!("the map shows no tip")
    }

    /// Clicks until an expression is true: what loads late may have moved the target just before a click.
    fn click_until(&mut self, selector: &str, expression: &str) -> Result<()> {
        for _ in 0..10 {
            self.click(selector)?;
            if self.value(expression)? == true {
                return Ok(());
            }
        }
        bail!("{expression} did not become true by clicks on {selector}")
    }

    fn key(&mut self, key: &str) -> Result<()> {
        for kind in ["keyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({ "type": kind, "key": key }))?;
        }
        Ok(())
    }

    /// Takes a picture of the window in a width and a colour scheme.
    fn screenshot(&mut self, width: usize, scheme: &str) -> Result<Vec<u8>> {
        let size = json!({ "width": width, "height": 1400, "deviceScaleFactor": 1, "mobile": width < 500 });
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", features)?;
        self.value(
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))",
        )?;
        let shot = self.call("Page.captureScreenshot", json!({ "format": "png" }))?;
        Ok(BASE64_STANDARD.decode(shot["data"].as_str().context("a picture")?)?)
    }

    /// What went wrong on the page, and what it asked the network for.
    fn faults(&self) -> Vec<String> {
        let fault = |event: &Value| {
            let (kind, what) = (event["method"].as_str()?, &event["params"]);
            let is_fault = match kind {
                "Runtime.exceptionThrown" => true,
                "Log.entryAdded" => what["entry"]["level"] == "error",
                "Runtime.consoleAPICalled" => what["type"] == "error",
                "Page.javascriptDialogOpening" => true,
                "Network.requestWillBeSent" => {
                    let address = what["request"]["url"].as_str()?;
                    let own = self.server.as_deref().unwrap_or("file:");
                    !address.starts_with(own) && !address.starts_with("data:")
                }
                _ => false,
            };
            is_fault.then(|| event.to_string())
        };
        self.events.iter().filter_map(fault).collect()
    }
}

/// Names that a page, a terminal or a spreadsheet might take for something else.
pub(crate) const HOSTILE: [&str; 6] = [
    "<img src=x onerror=alert(1)>.png",
    "=cmd().jpg",
    "new\nline.png",
    "\u{1b}[31mred\u{7}.png",
    "photo\u{202e}gnp.exe",
    "</script><script>alert(2)</script>\u{fffd}.png",
];

pub(crate) const PICTURES: usize = 90;

/// A run of coloured pictures in four groups, with hostile names.
pub(crate) fn inputs(folder: &Path) -> Result<ReportArguments> {
    let path = folder.join("images.safetensors");
    let picture = |number: usize| -> Result<_> {
        let base = [[200, 60, 40], [40, 90, 200], [60, 170, 80], [190, 160, 40]][number % 4];
        let pixel = |i: usize| -> u8 {
            let (row, column) = (i / 3 / 48, i / 3 % 48);
            let wave = (row * (1 + number % 5) + column * 3 + number * 7) % 50;
            (base[i % 3] + wave) as u8
        };
        let pixels = (0..36 * 48 * 3).map(pixel).collect();
        Ok((StoredPicture::raw(Picture::new(36, 48, 3, pixels)?, 3)?, Split::Train))
    };
    images::write(&path, 3, (0..PICTURES).map(picture).collect::<Result<_>>()?)?;
    let images = Images::open(&path)?;
    let data_set = images.data_set().clone();
    let mut names: Vec<String> = (0..PICTURES).map(|row| format!("holiday/{row:03}.png")).collect();
    for (place, name) in HOSTILE.iter().enumerate() {
        names[place] = (*name).to_owned();
    }
    let (rows, groups) = grouped(PICTURES, 16, 4, 0.9);
    let index: Vec<u32> = (0..PICTURES as u32).collect();
    let assignment: Vec<u32> = groups
        .iter()
        .zip(0..)
        .map(|(&group, i)| if i % 11 == 0 { 3 - group } else { group })
        .collect();
    let arguments = ReportArguments {
        run: RunFiles {
            images: path,
            names: folder.join("names.safetensors"),
            pseudo_labels: folder.join("pseudo-labels.safetensors"),
            embeddings: Some(folder.join("embeddings.safetensors")),
            labels: Some(folder.join("labels.safetensors")),
            steps: vec![],
            title: "Holiday <b>&</b>".into(),
            cache: Some(folder.join("cache")),
        },
        shown: 6,
        thumbnails: 80,
        corrections: None,
        corrected_data: None,
        corrected_pseudo_labels: None,
        json: false,
        merge: vec![],
        pictures: false,
        copy_to: None,
        link_to: None,
        source: None,
        out: folder.join("report"),
    };
    Names { data_set: data_set.clone(), names }.write(&arguments.run.names)?;
    let classes = ["<i>dune</i>", "sea", "wood", "town"].map(str::to_owned).to_vec();
    Labels {
        data_set: data_set.clone(),
        labels: groups.iter().map(|&g| Some(g)).collect(),
        classes,
    }
    .write(arguments.run.labels.as_deref().context("labels")?)?;
    Embeddings {
        data_set: data_set.clone(),
        index: index.clone(),
        width: 16,
        projection_width: 1,
        views: 0,
        backbone: rows,
        projection: vec![1.; PICTURES],
        backbone_views: vec![],
    }
    .write(arguments.run.embeddings.as_deref().context("embeddings")?)?;
    let mut confidence: Vec<f32> = (0..PICTURES).map(|i| (i * 37 % 100) as f32 / 100.).collect();
    confidence[..HOSTILE.len()].fill(1.); // The surest are on the page.
    PseudoLabels {
        data_set,
        clusters: 4,
        index,
        kmeans_assignment: groups,
        assignment,
        score: confidence.clone(),
        confidence,
        reliable: vec![true; PICTURES],
        stability: None,
        projection_width: 1,
        prototypes: vec![0.; 4],
    }
    .write(&arguments.run.pseudo_labels)?;
    Ok(arguments)
}

/// Where a picture of the map is in the window.
const FIRST_POINT: &str = "(() => {
    const c = byId('map-canvas');
    c.scrollIntoView({ block: 'center', behavior: 'instant' });
    const r = c.getBoundingClientRect(), side = Math.min(r.width, r.height) - 24;
    const row = Array.from(analysed).findIndex(place => thumbnailOf(place));
    const [x, y] = [mapX, mapY].map(at => at[row] / 65535 - .5);
    return [r.left + r.width / 2 + x * side, r.top + r.height / 2 + y * side];
})()";

#[test]
fn the_page_works_in_a_browser() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(mut browser) = started(&folder.path().join("profile"))? else { return Ok(()) };
    let arguments = inputs(folder.path())?;
    run(&arguments, &Interrupt::default())?;
    let page = std::fs::canonicalize(arguments.out.join(PAGE))?;
    browser.screenshot(1280, "light")?; // Sets the size.
    browser.open(&format!("file://{}", page.display()))?;

    names_are_inert(&mut browser, 80)?;
    the_map_answers(&mut browser)?;
    a_picture_opens(&mut browser)?;
    shots_fit(&mut browser, "")?;
    assert_eq!(browser.faults(), Vec::<String>::new());
    Ok(())
}

/// A browser that is installed here, with an empty profile.
fn started(profile: &Path) -> Result<Option<Browser>> {
    let Some(program) = chromium() else {
        println!("skipped: there is no chromium on the path");
        return Ok(None);
    };
    match Browser::start(&program, profile) {
        Ok(browser) => Ok(Some(browser)),
        Err(error) => {
            println!("skipped: `{}` does not start here: {error:#}", program.display());
            Ok(None)
        }
    }
}

/// The page fits wide and narrow windows, and follows the colour scheme.
fn shots_fit(browser: &mut Browser, name: &str) -> Result<()> {
    let mut brightness = Vec::new();
    for (width, scheme) in [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")] {
        browser.value("scrollTo({ top: 0, behavior: 'instant' })")?;
        let shot = browser.screenshot(width, scheme)?;
        let wide = browser.value("document.documentElement.scrollWidth")?;
        assert!(wide.as_u64().is_some_and(|wide| wide <= width as u64), "{wide} pixels of {width}");
        keep(&format!("{name}{width}-{scheme}"), &shot)?;
        let picture = image::load_from_memory(&shot)?.to_luma8();
        let sum: u64 = picture.pixels().map(|pixel| u64::from(pixel[0])).sum();
        brightness.push(sum / u64::from(picture.width() * picture.height()));
    }
    let is_darker = brightness[0] > brightness[1] + 50 && brightness[2] > brightness[3] + 50;
    assert!(is_darker, "{brightness:?}");
    Ok(())
}

fn keep(name: &str, shot: &[u8]) -> Result<()> {
    if let Some(kept) = std::env::var_os("ASSORT_SCREENSHOTS") {
        std::fs::write(Path::new(&kept).join(format!("{name}.png")), shot)?;
    }
    Ok(())
}

#[test]
fn the_served_page_is_corrected_in_a_browser() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(mut browser) = started(&folder.path().join("profile"))? else { return Ok(()) };
    let mut server = TestServer::start(&view::tests::arguments(folder.path())?)?;
    let (own, _) = server.address.split_once('?').context("a token")?;
    browser.server = Some(own.to_owned());
    browser.screenshot(1280, "light")?; // Sets the size.
    browser.open(&server.address)?;
    assert_eq!(browser.text("location.href")?, own, "the token is gone");
    browser.until("plot")?;

    // Pictures come when their section is seen.
    browser.value(
        "document.querySelectorAll('section.cluster').forEach(own => own.scrollIntoView())",
    )?;
    browser.until("document.querySelectorAll('a.p').length === 90")?;
    names_are_inert(&mut browser, 90)?;
    the_map_answers(&mut browser)?;
    browser.click("#c1 a.p")?;
    assert_eq!(browser.value("view.open")?, true);
    let first = browser.value("viewed")?;
    assert_eq!(browser.value("Number(document.querySelector('#c1 a.p').id.slice(1))")?, first);
    browser.until("byId('view-near').children.length === 15")?;
    assert!(browser.text("byId('view-facts').textContent")?.contains("Second-best cluster"));
    browser.until("byId('view-picture').naturalWidth === 48")?;
    browser.key("ArrowRight")?;
    browser.until(&format!("viewed !== {first}"))?;
    browser.key("ArrowLeft")?;
    browser.until(&format!("viewed === {first}"))?;
    browser.click_until("#view-close", "!view.open")?;
    shots_fit(&mut browser, "served-")?;
    browser.screenshot(1280, "light")?;

    clusters_are_named_and_merged(&mut browser)?;
    pictures_are_moved_and_marked(&mut browser)?;
    for (width, scheme) in [(1280, "light"), (390, "dark")] {
        browser.screenshot(width, scheme)?; // Sets the size.
        browser.value("byId('c1').scrollIntoView({ behavior: 'instant' })")?;
        browser.until("document.querySelectorAll('#c1 a.p').length > 20")?;
        let shot = browser.screenshot(width, scheme)?;
        keep(&format!("served-corrected-{width}"), &shot)?;
    }
    browser.screenshot(1280, "light")?;

    assert_eq!(browser.faults(), Vec::<String>::new());

    // All of it is there after a reload.
    browser.open(own)?;
    browser.until("plot")?;
    let heading =
        browser.text("document.querySelector('#c1 h3').firstChild.parentNode.textContent")?;
    assert!(heading.starts_with("Cluster 1: <i>Sea</i> "), "{heading}");
    assert_eq!(
        browser.value("[byId('c2'), byId('c4') || byId('c5')].map(Boolean)")?,
        json!([false, true])
    );
    assert_eq!(browser.value("document.querySelectorAll('section.cluster i').length")?, 0);
    assert_eq!(browser.faults(), Vec::<String>::new());

    // A conflict is said, and what another program wrote is shown.
    std::fs::remove_file(folder.path().join("corrections.toml"))?;
    browser.click("#undo")?;
    browser.until("!byId('trouble').hidden && byId('c2')")?;
    assert!(browser.text("byId('trouble-text').textContent")?.contains("another program"));

    // So is the end of the server.
    server.stop()?;
    browser.click("#trouble-close")?;
    browser.click("#c1 button")?;
    browser.click("#rename-save")?;
    browser.until("byId('trouble-text').textContent.includes('Start `assort view` again')")
}

fn clusters_are_named_and_merged(browser: &mut Browser) -> Result<()> {
    browser.click("#c1 button")?;
    browser.value("byId('rename-name').value = '<i>Sea</i>'")?;
    browser.click("#rename-save")?;
    browser.until("document.querySelector('#c1 h3').textContent.includes('<i>Sea</i>')")?;
    browser.until("!isBusy && data.titles.includes('cluster 1: <i>Sea</i>')")?;
    browser.click("#c1 button:nth-child(2)")?;
    browser.value("byId('merge-with').value = '2'")?;
    browser.click("#merge-save")?;
    browser.until("!byId('c2') && byId('saved').textContent === 'All corrections are saved'")
}

fn pictures_are_moved_and_marked(browser: &mut Browser) -> Result<()> {
    let selected = "byId('selected-count').textContent";
    let settled = "!isBusy && document.querySelectorAll('#c0 a.p').length > 10";
    let first = "Number(document.querySelector('#c0 a.p').id.slice(1))";
    browser.value("byId('c0').scrollIntoView({ behavior: 'instant' })")?;
    browser.until(settled)?;
    // With the keyboard: a space, and with Shift all up to the next one.
    let place = browser.value(first)?;
    browser.value("document.querySelector('#c0 a.p').focus()")?;
    browser.key(" ")?;
    assert_eq!(browser.text(selected)?, "1 selected");
    browser.click("#move")?;
    browser.value("byId('move-to').value = '3'")?;
    browser.click("#move-save")?;
    browser.until(&format!("!isBusy && clusterOf[{place}] === data.clusters.indexOf(3)"))?;
    // With the pointer.
    browser.value("byId('c0').scrollIntoView({ behavior: 'instant' })")?;
    browser.until(settled)?;
    let place = browser.value(first)?;
    browser.click("#select")?;
    browser.click("#c0 a.p")?;
    browser.click("#c0 a.p:nth-of-type(2)")?;
    assert_eq!(browser.text(selected)?, "2 selected");
    browser.click("#mark-outlier")?;
    browser
        .until(&format!("!isBusy && data.titles[clusterOf[{place}]] === 'marked as outlier'"))?;
    browser.click("#select")?;
    // Undone, and made again for the reload.
    browser.value("document.body.focus()")?;
    browser.click("#undo")?;
    browser.until(&format!("!isBusy && data.titles[clusterOf[{place}]] === 'cluster 0'"))?;
    browser.value(&format!("edit({{ mark: {{ places: [{place}], mark: 'outlier' }} }})"))?;
    browser.until(&format!("!isBusy && data.titles[clusterOf[{place}]] === 'marked as outlier'"))
}

/// Names and classes are text, whatever is in them.
fn names_are_inert(browser: &mut Browser, count: usize) -> Result<()> {
    let found = browser.value("document.querySelectorAll('[onerror]').length")?;
    assert_eq!(found, 0);
    assert_eq!(browser.value("document.querySelectorAll('script').length")?, 2);
    assert_eq!(browser.text("document.querySelector('h1').textContent")?, "Holiday <b>&</b>");
    let shown = browser.value("Array.from(document.querySelectorAll('a.p img'), e => e.alt)")?;
    let shown: Vec<&str> =
        shown.as_array().context("names")?.iter().filter_map(Value::as_str).collect();
    assert_eq!(shown.len(), count);
    for name in HOSTILE {
        let clean = name.replace(['\u{1b}', '\u{7}', '\u{202e}'], "\u{fffd}");
        assert!(shown.contains(&&*clean), "{clean:?} is not among {shown:?}");
    }
    Ok(())
}

/// The map shows a picture under the pointer, opens it, filters by cluster and by a drawn line.
fn the_map_answers(browser: &mut Browser) -> Result<()> {
    let at = browser.hover_first_point()?;
    assert!(browser.text("byId('tip').textContent")?.contains("cluster "));
    browser.drag(&[at])?;
    assert_eq!(browser.value("view.open")?, true);
    browser.click_until("#view-close", "!view.open")?;

    browser.click("#zoom-reset")?;
    browser.click("#legend button")?;
    assert_eq!(browser.text("byId('chosen-count').textContent")?, "23 of 90 pictures chosen");
    assert_eq!(
        browser.text("document.querySelector('#legend button').textContent")?,
        "<i>dune</i>"
    );
    browser.click("#clear")?;
    assert_eq!(browser.value("byId('chosen').hidden")?, true);
    browser.click("#lasso")?;
    let frame = "(() => { const r = byId('map-canvas').getBoundingClientRect(); \
                 return [r.left, r.top, r.right, r.bottom]; })()";
    browser.value("byId('map-canvas').scrollIntoView({ block: 'center', behavior: 'instant' })")?;
    let frame = browser.steady(frame)?;
    let [left, top, right, bottom] = [0, 1, 2, 3].map(|i| frame[i].as_f64().expect("a number"));
    let corners = [[left, top], [right, top], [right, bottom], [left, bottom]];
    let inner = |[x, y]: [f64; 2]| [x.clamp(left + 2., right - 2.), y.clamp(top + 2., bottom - 2.)];
    browser.drag(&corners.map(inner))?;
    assert_eq!(browser.text("byId('chosen-count').textContent")?, "90 of 90 pictures chosen");
    browser.click("#clear")?;
    browser.click("#lasso")
}

/// A thumbnail opens a picture with its neighbours; arrow keys go on to the next.
fn a_picture_opens(browser: &mut Browser) -> Result<()> {
    browser.click("#c1 a.p")?;
    assert_eq!(browser.value("view.open")?, true);
    let name = "byId('view-name').textContent";
    let first = browser.text(name)?;
    assert!(browser.text("byId('view-facts').textContent")?.contains("Second-best cluster"));
    assert_eq!(browser.value("byId('view-near').children.length")?, 15);
    browser.key("ArrowRight")?;
    assert_ne!(browser.text(name)?, first);
    browser.key("ArrowLeft")?;
    assert_eq!(browser.text(name)?, first);
    let shot = browser.screenshot(1280, "light")?;
    keep("picture", &shot)?;
    browser.click_until("#view-close", "!view.open")?;
    Ok(())
}
