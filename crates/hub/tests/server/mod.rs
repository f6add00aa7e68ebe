//! A server on this machine for tests.

#![allow(dead_code, reason = "each test program uses a part of it")]

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// A request as a server sees it: path, and headers by name in lower case.
pub type Request = (String, HashMap<String, String>);

/// A server that answers each request by what `answer` writes, and keeps all requests.
pub struct Server {
    pub address: String,
    requests: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    pub fn new(answer: impl Fn(&Request, usize, &mut TcpStream) + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = format!("http://{}", listener.local_addr().expect("bound"));
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (kept, answer) = (requests.clone(), Arc::new(answer));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (kept, answer) = (kept.clone(), answer.clone());
                std::thread::spawn(move || {
                    let mut stream = stream;
                    let Some(request) = read_request(&stream) else { return };
                    let mut kept = kept.lock().expect("sound");
                    kept.push(request.clone());
                    let number = kept.len() - 1;
                    drop(kept);
                    answer(&request, number, &mut stream);
                });
            }
        });
        Self { address, requests }
    }

    pub fn requests(&self) -> Vec<Request> {
        self.requests.lock().expect("sound").clone()
    }
}

fn read_request(stream: &TcpStream) -> Option<Request> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let path = first.split(' ').nth(1)?.to_owned();
    let mut headers = HashMap::new();
    for line in lines {
        let line = line.ok()?;
        let Some((name, value)) = line.split_once(": ") else { break };
        headers.insert(name.to_lowercase(), value.to_owned());
    }
    Some((path, headers))
}

/// Writes an answer whose length is what `length` says.
pub fn say(out: &mut TcpStream, status: &str, headers: &[&str], length: usize, body: &[u8]) {
    let more: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    let head =
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n{more}\r\n");
    // A client that has heard enough hangs up.
    let _ = out.write_all(head.as_bytes()).and_then(|()| out.write_all(body));
}

/// Answers without a length: the end of the connection is that of the body.
pub fn unannounced(out: &mut TcpStream, body: &[u8]) {
    let head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n";
    let _ = out.write_all(head).and_then(|()| out.write_all(body));
}

pub fn whole(out: &mut TcpStream, body: &[u8]) {
    say(out, "200 OK", &[], body.len(), body);
}

/// Answers as a good server does, with the part that is asked for.
pub fn part(request: &Request, out: &mut TcpStream, body: &[u8]) {
    let from = request
        .1
        .get("range")
        .and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse::<usize>().ok());
    match from {
        Some(from) if from < body.len() => {
            let range = format!("Content-Range: bytes {from}-{}/{}", body.len() - 1, body.len());
            say(out, "206 Partial Content", &[&range], body.len() - from, &body[from..]);
        }
        Some(_) => say(out, "416 Range Not Satisfiable", &[], 0, b""),
        None => whole(out, body),
    }
}

pub fn sha(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The name that git gives to these bytes.
pub fn git(bytes: &[u8]) -> String {
    use sha1::Digest as _;
    let blob = [format!("blob {}\0", bytes.len()).as_bytes(), bytes].concat();
    sha1::Sha1::digest(blob).iter().map(|byte| format!("{byte:02x}")).collect()
}
