//! Ranks that are processes, on one machine or many: MPI.

use std::fmt;

use mpi::Threading;
use mpi::environment::Universe;
use mpi::point_to_point::send_receive_into;
use mpi::topology::{Communicator as _, SimpleCommunicator};

use crate::{CommunicationError, Result};

/// Bytes of one message at most: MPI counts in 32 bits.
const MESSAGE: usize = 1 << 30;

/// MPI from its start to its end. MPI itself ends all ranks if a message cannot be delivered.
pub(crate) struct World {
    _universe: Universe,
}

impl World {
    pub(crate) fn new() -> Result<Self> {
        // Any thread may send, one at a time: kernels run on those of a pool.
        let Some((universe, threading)) = mpi::initialize_with_threading(Threading::Serialized)
        else {
            return Err(CommunicationError::new("MPI was already started in this process"));
        };
        if threading < Threading::Serialized {
            return Err(CommunicationError::new(format!(
                "this MPI supports the thread level {threading:?}, but Serialized is needed; install one \
                 that is built with threads"
            )));
        }
        Ok(Self { _universe: universe })
    }

    pub(crate) fn rank(&self) -> usize {
        SimpleCommunicator::world().rank() as usize
    }

    pub(crate) fn size(&self) -> usize {
        SimpleCommunicator::world().size() as usize
    }

    pub(crate) fn exchange(&self, partner: usize, sent: &[u8], received: &mut [u8]) {
        let world = SimpleCommunicator::world();
        let partner = world.process_at_rank(partner as i32);
        let messages = sent.len().max(received.len()).div_ceil(MESSAGE).max(1);
        for message in 0..messages {
            let part =
                |len: usize| (message * MESSAGE).min(len)..((message + 1) * MESSAGE).min(len);
            let (sent, into) = (&sent[part(sent.len())], part(received.len()));
            send_receive_into(sent, &partner, &mut received[into], &partner);
        }
    }

    /// Ends all ranks.
    pub(crate) fn abort(&self, code: u8) -> ! {
        SimpleCommunicator::world().abort(i32::from(code))
    }
}

impl fmt::Debug for World {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("MPI")
    }
}
