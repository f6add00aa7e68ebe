//! Headless Chromium, by the DevTools protocol over two pipes.
//!
//! The tests of `report` open its page in it; the program `page-pictures` takes the pictures of the documentation.

pub mod page;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use serde_json::{Value, json};

/// A browser with one page.
#[derive(Debug)]
pub struct Browser {
    process: Child,
    input: ChildStdin,
    messages: Receiver<Value>,
    calls: u64,
    session: Option<String>,
    events: Vec<Value>,
    /// Where the page may ask, if it is served: the start of its addresses.
    pub server: Option<String>,
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// The browser on the path.
pub fn chromium() -> Option<PathBuf> {
    let folders = std::env::var_os("PATH")?;
    let names = ["chromium", "chromium-browser", "google-chrome"];
    let paths =
        std::env::split_paths(&folders).flat_map(|folder| names.map(|name| folder.join(name)));
    paths.into_iter().find(|path| path.is_file())
}

impl Browser {
    /// Starts a browser with an empty profile in the folder `profile`.
    ///
    /// # Errors
    ///
    /// It does not start, or does not answer within a minute.
    pub fn start(program: &Path, profile: &Path) -> Result<Self> {
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
    ///
    /// # Errors
    ///
    /// The browser ended, or does not answer.
    pub fn open(&mut self, address: &str) -> Result<()> {
        self.events.clear();
        self.call("Page.navigate", json!({ "url": address }))?;
        let is_loaded = |event: &Value| event["method"] == "Page.loadEventFired";
        while !self.events.iter().any(is_loaded) {
            let event = self.next()?;
            self.events.push(event);
        }
        Ok(())
    }

    /// The value of an expression, or of its promise, on the page.
    ///
    /// # Errors
    ///
    /// The expression throws.
    pub fn value(&mut self, expression: &str) -> Result<Value> {
        let parameters =
            json!({ "expression": expression, "returnByValue": true, "awaitPromise": true });
        let answer = self.call("Runtime.evaluate", parameters)?;
        if let Some(error) = answer.get("exceptionDetails") {
            bail!("{expression}: {error}");
        }
        Ok(answer["result"]["value"].clone())
    }

    /// Waits until an expression is true on the page.
    ///
    /// # Errors
    ///
    /// It is not true within 30 seconds, or throws.
    pub fn until(&mut self, expression: &str) -> Result<()> {
        let waits = format!(
            "new Promise((done, fail) => {{ const start = Date.now(); (function look() {{ if ({expression}) done(); \
             else if (Date.now() - start > 30000) fail(new Error('it never came true')); \
             else setTimeout(look, 20); }})(); }})"
        );
        self.value(&waits).map(drop)
    }

    /// The value of an expression that is a text.
    ///
    /// # Errors
    ///
    /// It is none, or throws.
    pub fn text(&mut self, expression: &str) -> Result<String> {
        Ok(self
            .value(expression)?
            .as_str()
            .with_context(|| format!("{expression} is no text"))?
            .to_owned())
    }

    /// Sends an event of the pointer at a point of the window: `mouseMoved`, `mousePressed` or `mouseReleased`.
    ///
    /// # Errors
    ///
    /// The browser ended, or does not answer.
    pub fn mouse(&mut self, kind: &str, [x, y]: [f64; 2]) -> Result<()> {
        let button = if kind == "mouseMoved" { "none" } else { "left" };
        let parameters = json!({ "type": kind, "x": x, "y": y, "button": button, "clickCount": 1 });
        self.call("Input.dispatchMouseEvent", parameters).map(drop)
    }

    /// Presses the pointer at the first point, moves it along the others, and releases it. One point is a click.
    ///
    /// # Errors
    ///
    /// The browser ended, or does not answer.
    pub fn drag(&mut self, along: &[[f64; 2]]) -> Result<()> {
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
    ///
    /// # Errors
    ///
    /// The expression throws.
    pub fn steady(&mut self, expression: &str) -> Result<Value> {
        self.value(&format!(
            "(async () => {{ let last, now, rounds = 0; \
             const loads = image => {{ const r = image.getBoundingClientRect(); return !image.complete && \
             image.src.startsWith('http') && r.width && r.bottom > 0 && r.top < innerHeight; }}; do {{ last = now; now = {expression}; \
             await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done))); \
             }} while (rounds++ < 40 && (String(now) !== String(last) || Array.from(document.images).some(loads))); \
             return now; }})()"
        ))
    }

    /// Clicks the middle of an element.
    ///
    /// # Errors
    ///
    /// There is no such element.
    pub fn click(&mut self, selector: &str) -> Result<()> {
        let at = self.steady(&format!(
            "(() => {{ const e = document.querySelector('{selector}'); \
             e.scrollIntoView({{ block: 'center', behavior: 'instant' }}); \
             const r = e.getBoundingClientRect(); return [r.left + r.width / 2, r.top + r.height / 2]; }})()"
        ))?;
        self.drag(&[[at[0].as_f64().context("x")?, at[1].as_f64().context("y")?]])
    }

    /// Clicks until an expression is true: what loads late may have moved the target just before a click.
    ///
    /// # Errors
    ///
    /// Ten clicks did not make it true.
    pub fn click_until(&mut self, selector: &str, expression: &str) -> Result<()> {
        for _ in 0..10 {
            self.click(selector)?;
            if self.value(expression)? == true {
                return Ok(());
            }
        }
        bail!("{expression} did not become true by clicks on {selector}")
    }

    /// Presses a key.
    ///
    /// # Errors
    ///
    /// The browser ended, or does not answer.
    pub fn key(&mut self, key: &str) -> Result<()> {
        for kind in ["keyDown", "keyUp"] {
            self.call("Input.dispatchKeyEvent", json!({ "type": kind, "key": key }))?;
        }
        Ok(())
    }

    /// Sets the width and height of the window, and the colour scheme: `light` or `dark`.
    ///
    /// # Errors
    ///
    /// The browser ended, or does not answer.
    pub fn resize(&mut self, [width, height]: [usize; 2], scheme: &str) -> Result<()> {
        let size = json!({ "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500 });
        self.call("Emulation.setDeviceMetricsOverride", size)?;
        let features = json!({ "features": [{ "name": "prefers-color-scheme", "value": scheme }] });
        self.call("Emulation.setEmulatedMedia", features).map(drop)
    }

    /// Takes a picture of the window, as PNG.
    ///
    /// # Errors
    ///
    /// The browser ended, or does not answer.
    pub fn screenshot(&mut self) -> Result<Vec<u8>> {
        self.capture(json!({ "format": "png" }))
    }

    /// Takes a picture of the part of the window that an element covers, as PNG.
    ///
    /// # Errors
    ///
    /// There is no such element.
    pub fn screenshot_of(&mut self, selector: &str) -> Result<Vec<u8>> {
        let frame = self.steady(&format!(
            "(() => {{ const r = document.querySelector('{selector}').getBoundingClientRect(); \
             return [r.left + scrollX, r.top + scrollY, r.width, Math.min(r.bottom, innerHeight) - r.top]; }})()"
        ))?;
        let clip = json!({ "x": frame[0], "y": frame[1], "width": frame[2], "height": frame[3], "scale": 1 });
        self.capture(json!({ "format": "png", "clip": clip }))
    }

    fn capture(&mut self, parameters: Value) -> Result<Vec<u8>> {
        let painted =
            "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))";
        self.value(painted)?;
        let shot = self.call("Page.captureScreenshot", parameters)?;
        Ok(BASE64_STANDARD.decode(shot["data"].as_str().context("a picture")?)?)
    }

    /// What went wrong on the page since it was opened, and each request that left it for another place than its
    /// file or its [`server`](Self::server).
    pub fn faults(&self) -> Vec<String> {
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
