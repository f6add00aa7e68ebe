//! Ranks that are threads of one process, for tests.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use crate::{CommunicationError, Result};

/// One rank's channels to and from every rank, its own included.
#[derive(Debug)]
pub(crate) struct ThreadRank {
    rank: usize,
    /// The time that every exchange takes.
    latency: Duration,
    to: Vec<Sender<Vec<u8>>>,
    from: Vec<Mutex<Receiver<Vec<u8>>>>,
}

impl ThreadRank {
    /// The ends of all ranks.
    pub(crate) fn all(size: usize, latency: Duration) -> Vec<Self> {
        let end = |rank| Self { rank, latency, to: Vec::new(), from: Vec::new() };
        let mut ranks: Vec<Self> = (0..size).map(end).collect();
        for from in 0..size {
            for to in 0..size {
                let (sender, receiver) = channel();
                ranks[from].to.push(sender);
                ranks[to].from.push(Mutex::new(receiver));
            }
        }
        ranks
    }

    pub(crate) fn exchange(&self, partner: usize, sent: &[u8], received: &mut [u8]) -> Result<()> {
        let ended = || {
            CommunicationError::new(format!(
                "rank {partner} has ended while rank {} waited for it; see its own error",
                self.rank
            ))
        };
        self.to[partner].send(sent.to_vec()).map_err(|_| ended())?;
        let from = self.from[partner].lock().unwrap_or_else(PoisonError::into_inner);
        let message = from.recv().map_err(|_| ended())?;
        if message.len() != received.len() {
            return Err(CommunicationError::new(format!(
                "rank {partner} sent {} bytes but rank {} expects {}; start all ranks with the same \
                 program, arguments and files",
                message.len(),
                self.rank,
                received.len()
            )));
        }
        received.copy_from_slice(&message);
        thread::sleep(self.latency);
        Ok(())
    }
}
