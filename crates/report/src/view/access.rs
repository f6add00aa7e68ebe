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

/// The token and the address that a request must have.
#[derive(Debug)]
pub struct AccessControl {
    token: String,
    host: String,
    cookie: String,
}

/// Whether a request is answered.
#[derive(Debug, PartialEq, Eq)]
pub enum Access {
    /// It has the cookie.
    Granted,
    /// It has the token in its address: it gets the cookie, and the address without the token.
    ByToken,
    /// It is denied, for this reason.
    Denied(&'static str),
}

impl AccessControl {
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

    /// Checks the host, the origin and the token of a request.
    pub fn check(&self, uri: &Uri, headers: &HeaderMap) -> Access {
        let text = |name: HeaderName| headers.get(name).map(|value| value.to_str().unwrap_or("?"));
        if text(header::HOST) != Some(&self.host) {
            return Access::Denied("this server answers only to the address that it printed");
        }
        let own = format!("http://{}", self.host);
        if text(header::ORIGIN).is_some_and(|origin| origin != own) {
            return Access::Denied("a page of another origin asked");
        }
        let in_address = uri.query().and_then(|query| query.strip_prefix("token="));
        if uri.path() == "/" && in_address.is_some_and(|token| self.is_token(token)) {
            return Access::ByToken;
        }
        let site = text(HeaderName::from_static("sec-fetch-site"));
        if site.is_some_and(|site| site != "same-origin" && site != "none") {
            return Access::Denied("a page of another site asked");
        }
        let cookies = headers.get_all(header::COOKIE).iter().filter_map(|c| c.to_str().ok());
        let pairs =
            cookies.flat_map(|line| line.split(';')).filter_map(|p| p.trim().split_once('='));
        let mut tokens = pairs.filter(|(name, _)| *name == self.cookie).map(|(_, token)| token);
        match tokens.any(|token| self.is_token(token)) {
            true => Access::Granted,
            false => Access::Denied(
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
        let controls = [AccessControl::new(80)?, AccessControl::new(80)?];
        assert_eq!(controls[0].token.len(), 64);
        assert_ne!(controls[0].token, controls[1].token);
        assert!(controls[0].address().starts_with("http://127.0.0.1:80/?token="));
        Ok(())
    }

    #[test]
    fn host_origin_site_and_token_decide() -> Result<()> {
        let access = AccessControl::new(4242)?;
        let cookie = format!("other=1; assort-view-4242={}", access.token);
        let sound = [("host", "127.0.0.1:4242"), ("cookie", &*cookie)];
        let check = |path: &str, changes: &[(&'static str, &str)]| -> Result<Access> {
            let mut headers = HeaderMap::new();
            for (name, value) in sound.iter().chain(changes) {
                headers.insert(*name, HeaderValue::from_str(value)?);
            }
            Ok(access.check(&path.parse()?, &headers))
        };
        assert_eq!(check("/map", &[])?, Access::Granted);
        assert_eq!(check("/map", &[("origin", "http://127.0.0.1:4242")])?, Access::Granted);
        let address = format!("/?token={}", access.token);
        assert_eq!(check(&address, &[("cookie", "")])?, Access::ByToken);
        for (path, changes) in [
            ("/", ("cookie", "")),
            ("/", ("cookie", "assort-view-4242=")),
            ("/", ("cookie", &*format!("assort-view-4243={}", access.token))),
            ("/?token=", ("cookie", "")),
            (&*format!("/map?token={}", access.token), ("cookie", "")),
            (&*address, ("host", "evil.example:4242")),
            (&*address, ("host", "localhost:4242")),
            (&*address, ("origin", "http://evil.example")),
            ("/", ("origin", "null")),
            ("/", ("origin", "http://127.0.0.1:4243")),
            ("/", ("sec-fetch-site", "cross-site")),
            ("/", ("sec-fetch-site", "same-site")),
        ] {
            let found = check(path, &[changes])?;
            assert!(matches!(found, Access::Denied(_)), "{path} {changes:?}: {found:?}");
        }
        Ok(())
    }
}
