//! Who may ask: the browser that was given the address, and nobody else.
//!
//! A page of another site can send requests to a loopback address, and can point a name of its own at one
//! (DNS rebinding). So every request must name this server as its host, must not come from another origin,
//! and must show the token: first in the address, then in a cookie that no script can read and that no other
//! site can send.

use anyhow::{Context, Result};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Uri, header};
use stage::digest::hex;
use subtle::ConstantTimeEq;

/// What a request must show.
#[derive(Debug)]
pub struct Gate {
    token: String,
    host: String,
    cookie: String,
}

/// How a request passes.
#[derive(Debug, PartialEq, Eq)]
pub enum Passage {
    /// It has the cookie.
    Open,
    /// It has the token in its address: it gets the cookie, and the address without the token.
    ByAddress,
    /// It is refused, for this reason.
    Refused(&'static str),
}

impl Gate {
    /// Draws a token of 32 bytes from the operating system for the server at a port.
    ///
    /// # Errors
    ///
    /// The system gives no random bytes.
    pub fn new(port: u16) -> Result<Self> {
        let mut token = [0; 32];
        getrandom::fill(&mut token).context("drawing a token from the operating system")?;
        // Cookies know no ports: two servers of one machine must not share one.
        let cookie = format!("assort-view-{port}");
        Ok(Self { token: hex(&token), host: format!("127.0.0.1:{port}"), cookie })
    }

    /// The address to open.
    pub fn address(&self) -> String {
        format!("http://{}/?token={}", self.host, self.token)
    }

    /// The header that gives a browser the cookie.
    ///
    /// # Errors
    ///
    /// None in practice: the text is ASCII.
    pub fn cookie(&self) -> Result<HeaderValue> {
        let text = format!("{}={}; HttpOnly; SameSite=Strict; Path=/", self.cookie, self.token);
        Ok(HeaderValue::from_str(&text)?)
    }

    /// Decides about a request.
    pub fn passage(&self, uri: &Uri, headers: &HeaderMap) -> Passage {
        let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        if text(header::HOST) != Some(&self.host) {
            return Passage::Refused("this server answers to the address that it printed only");
        }
        let own = format!("http://{}", self.host);
        if text(header::ORIGIN).is_some_and(|origin| origin != own) {
            return Passage::Refused("a page of another origin asked");
        }
        let in_address = uri.query().and_then(|query| query.strip_prefix("token="));
        if uri.path() == "/" && in_address.is_some_and(|token| self.is_token(token)) {
            return Passage::ByAddress;
        }
        let site = text(HeaderName::from_static("sec-fetch-site"));
        if site.is_some_and(|site| site != "same-origin" && site != "none") {
            return Passage::Refused("a page of another site asked");
        }
        let cookies = headers.get_all(header::COOKIE).iter().filter_map(|c| c.to_str().ok());
        let pairs =
            cookies.flat_map(|line| line.split(';')).filter_map(|p| p.trim().split_once('='));
        let mut tokens = pairs.filter(|(name, _)| *name == self.cookie).map(|(_, token)| token);
        match tokens.any(|token| self.is_token(token)) {
            true => Passage::Open,
            false => Passage::Refused(
                "open the address that `assort view` printed, with its token; each start has another one",
            ),
        }
    }

    /// Compares in a time that does not depend on the bytes.
    fn is_token(&self, word: &str) -> bool {
        word.as_bytes().ct_eq(self.token.as_bytes()).into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_long_and_differ() -> Result<()> {
        let gates = [Gate::new(80)?, Gate::new(80)?];
        assert_eq!(gates[0].token.len(), 64);
        assert_ne!(gates[0].token, gates[1].token);
        assert!(gates[0].address().starts_with("http://127.0.0.1:80/?token="));
        Ok(())
    }

    #[test]
    fn host_origin_site_and_token_decide() -> Result<()> {
        let gate = Gate::new(4242)?;
        let cookie = format!("other=1; assort-view-4242={}", gate.token);
        let sound = [("host", "127.0.0.1:4242"), ("cookie", &*cookie)];
        let passage = |path: &str, changes: &[(&'static str, &str)]| -> Result<Passage> {
            let mut headers = HeaderMap::new();
            for (name, value) in sound.iter().chain(changes) {
                headers.insert(*name, HeaderValue::from_str(value)?);
            }
            Ok(gate.passage(&path.parse()?, &headers))
        };
        assert_eq!(passage("/map", &[])?, Passage::Open);
        assert_eq!(passage("/map", &[("origin", "http://127.0.0.1:4242")])?, Passage::Open);
        let address = format!("/?token={}", gate.token);
        assert_eq!(passage(&address, &[("cookie", "")])?, Passage::ByAddress);
        for (path, changes) in [
            ("/", ("cookie", "")),
            ("/", ("cookie", "assort-view-4242=")),
            ("/", ("cookie", &*format!("assort-view-4243={}", gate.token))),
            ("/?token=", ("cookie", "")),
            (&*format!("/map?token={}", gate.token), ("cookie", "")),
            (&*address, ("host", "evil.example:4242")),
            (&*address, ("host", "localhost:4242")),
            (&*address, ("origin", "http://evil.example")),
            ("/", ("origin", "null")),
            ("/", ("origin", "http://127.0.0.1:4243")),
            ("/", ("sec-fetch-site", "cross-site")),
            ("/", ("sec-fetch-site", "same-site")),
        ] {
            let found = passage(path, &[changes])?;
            assert!(matches!(found, Passage::Refused(_)), "{path} {changes:?}: {found:?}");
        }
        Ok(())
    }
}
