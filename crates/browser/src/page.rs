//! What tests and pictures of the page of a report have in common.

use anyhow::{Context, Result, bail};

use crate::Browser;

/// Where a picture of the map is in the window.
const FIRST_POINT: &str = "(() => {
    const c = byId('map-canvas');
    c.scrollIntoView({ block: 'center', behavior: 'instant' });
    const r = c.getBoundingClientRect(), side = Math.min(r.width, r.height) - 24;
    const row = Array.from(analysed).findIndex(place => thumbnailOf(place));
    const [x, y] = [mapX, mapY].map(at => at[row] / 65535 - .5);
    return [r.left + r.width / 2 + x * side, r.top + r.height / 2 + y * side];
})()";

/// Moves the pointer to a picture of the map, until its tip shows. Returns where that is.
///
/// # Errors
///
/// The page has no map, or no tip shows.
pub fn hover_first_point(browser: &mut Browser) -> Result<[f64; 2]> {
    for _ in 0..10 {
        let at = browser.steady(FIRST_POINT)?;
        let at = [at[0].as_f64().context("x")?, at[1].as_f64().context("y")?];
        browser.mouse("mouseMoved", at)?;
        if browser.value("byId('tip').hidden")? == false {
            return Ok(at);
        }
    }
    bail!("the map shows no tip")
}
