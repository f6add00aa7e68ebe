//! Ranks that are processes, on one machine or many: MPI.

use std::fmt;
use std::thread;
use std::time::Duration;

use mpi::Threading;
use mpi::collective::SystemOperation;
use mpi::environment::Universe;
use mpi::point_to_point::send_receive_into;
use mpi::request::{Request, Scope};
use mpi::topology::{Communicator as _, SimpleCommunicator};
use mpi::traits::{CommunicatorCollectives as _, Destination as _, Source as _};

use crate::{CommunicationError, Result};

/// Bytes of one message at most: MPI counts in 32 bits.
const MESSAGE: usize = 1 << 30;

/// The time between two looks at a message in the background. MPI's own wait is a loop that keeps a core busy, but a
/// message may move on only while a thread calls MPI, so it is short.
const POLL: Duration = Duration::from_micros(50);

/// MPI from its start to its end. MPI itself ends all ranks if a message cannot be delivered.
pub(crate) struct World {
    /// For messages in the background; freed before MPI ends. `None` unless all ranks may send from several
    /// threads at a time.
    duplicate: Option<Duplicate>,
    _universe: Universe,
}

/// The world once more: no message of the one is received in the other.
struct Duplicate(SimpleCommunicator);

#[expect(
    unsafe_code,
    reason = "rsmpi keeps a pointer to Open MPI's communicator, which no thread owns"
)]
// SAFETY: MPI allows calls with a communicator from any thread under MPI_THREAD_MULTIPLE, without which there is no
// duplicate.
unsafe impl Send for Duplicate {}

#[expect(unsafe_code, reason = "as for `Send`")]
// SAFETY: as for `Send`: also at the same time.
unsafe impl Sync for Duplicate {}

impl World {
    pub(crate) fn new() -> Result<Self> {
        // Any thread may send: kernels run on those of a pool. One at a time is enough without the background.
        let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Multiple)
        else {
            return Err(CommunicationError::new("MPI was already started in this process"));
        };
        if threading < Threading::Serialized {
            return Err(CommunicationError::new(format!(
                "this MPI supports the thread level {threading:?}, but Serialized is needed; install one \
                 that is built with threads"
            )));
        }
        let world = SimpleCommunicator::world();
        let (own, mut all) = (u8::from(threading >= Threading::Multiple), 0u8);
        world.all_reduce_into(&own, &mut all, SystemOperation::min());
        let duplicate = (all == 1).then(|| Duplicate(world.duplicate()));
        Ok(Self { duplicate, _universe: universe })
    }

    pub(crate) fn rank(&self) -> usize {
        SimpleCommunicator::world().rank() as usize
    }

    pub(crate) fn size(&self) -> usize {
        SimpleCommunicator::world().size() as usize
    }

    pub(crate) fn has_background(&self) -> bool {
        self.duplicate.is_some()
    }

    pub(crate) fn exchange(&self, partner: usize, sent: &[u8], received: &mut [u8]) {
        let world = SimpleCommunicator::world();
        let partner = world.process_at_rank(partner as i32);
        in_messages(sent, received, |sent, received| {
            send_receive_into(sent, &partner, received, &partner);
        });
    }

    /// As [`exchange`](Self::exchange), but the thread sleeps while it waits.
    pub(crate) fn exchange_in_background(&self, partner: usize, sent: &[u8], received: &mut [u8]) {
        let Duplicate(world) = self.duplicate.as_ref().expect("there is a background");
        let partner = world.process_at_rank(partner as i32);
        in_messages(sent, received, |sent, received| {
            mpi::request::scope(|scope| {
                let received = partner.immediate_receive_into(scope, received);
                let sent = partner.immediate_send(scope, sent);
                complete(received);
                complete(sent);
            });
        });
    }

    /// Ends all ranks.
    pub(crate) fn abort(&self, code: u8) -> ! {
        SimpleCommunicator::world().abort(i32::from(code))
    }
}

/// Divides an exchange into messages of a size that MPI can count.
fn in_messages(sent: &[u8], received: &mut [u8], mut exchange: impl FnMut(&[u8], &mut [u8])) {
    let messages = sent.len().max(received.len()).div_ceil(MESSAGE).max(1);
    for message in 0..messages {
        let part = |len: usize| (message * MESSAGE).min(len)..((message + 1) * MESSAGE).min(len);
        let into = part(received.len());
        exchange(&sent[part(sent.len())], &mut received[into]);
    }
}

fn complete<'a, D: ?Sized, S: Scope<'a>>(mut request: Request<'a, D, S>) {
    while let Err(pending) = request.test() {
        request = pending;
        thread::sleep(POLL);
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MPI")
    }
}
