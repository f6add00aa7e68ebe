//! The page in a real browser: headless Chromium.
//!
//! Skipped with a message where no `chromium` is on the path. `ASSORT_SCREENSHOTS=DIR` keeps the pictures
//! that are taken, to look at.

use std::path::Path;

use anyhow::{Context, Result};
use browser::{Browser, chromium, page};
use data::images::{self, StoredPicture};
use data::{Embeddings, Images, Labels, Names, Picture, PseudoLabels};
use serde_json::{Value, json};
use stage::{Interrupt, Split};

use crate::analysis::tests::grouped;
use crate::run_files::RunFiles;
use crate::view::tests::TestServer;
use crate::{PAGE, ReportArguments, run, view};

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
        backbone: rows.into(),
        projection: vec![1.; PICTURES].into(),
        backbone_views: vec![].into(),
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
        head_agreement: None,
        projection_width: 1,
        prototypes: vec![0.; 4],
    }
    .write(&arguments.run.pseudo_labels)?;
    Ok(arguments)
}

/// Height of the window.
const HEIGHT: usize = 1400;

#[test]
fn the_page_works_in_a_browser() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let Some(mut browser) = started(&folder.path().join("profile"))? else { return Ok(()) };
    let arguments = inputs(folder.path())?;
    run(&arguments, &Interrupt::default())?;
    let file = std::fs::canonicalize(arguments.out.join(PAGE))?;
    browser.open(&format!("file://{}", file.display()))?;

    names_are_inert(&mut browser, 80)?;
    the_map_answers(&mut browser)?;
    a_picture_opens(&mut browser)?;
    shots_fit(&mut browser, "")?;
    assert_eq!(browser.faults(), Vec::<String>::new());
    Ok(())
}

/// A browser that is installed here, with an empty profile and a window of 1,280 pixels.
fn started(profile: &Path) -> Result<Option<Browser>> {
    let Some(program) = chromium() else {
        println!("skipped: there is no chromium on the path");
        return Ok(None);
    };
    match Browser::start(&program, profile) {
        Ok(mut browser) => {
            browser.resize([1280, HEIGHT], "light")?;
            Ok(Some(browser))
        }
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
        browser.resize([width, HEIGHT], scheme)?;
        let shot = browser.screenshot()?;
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
    browser.resize([1280, HEIGHT], "light")?;

    clusters_are_named_and_merged(&mut browser)?;
    pictures_are_moved_and_marked(&mut browser)?;
    for (width, scheme) in [(1280, "light"), (390, "dark")] {
        browser.resize([width, HEIGHT], scheme)?;
        browser.value("byId('c1').scrollIntoView({ behavior: 'instant' })")?;
        browser.until("document.querySelectorAll('#c1 a.p').length > 20")?;
        let shot = browser.screenshot()?;
        keep(&format!("served-corrected-{width}"), &shot)?;
    }
    browser.resize([1280, HEIGHT], "light")?;

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
    let at = page::hover_first_point(browser)?;
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
    let shot = browser.screenshot()?;
    keep("picture", &shot)?;
    browser.click_until("#view-close", "!view.open")?;
    Ok(())
}
