//! Messages from GPU to GPU: NCCL.
//!
//! Compiled and linked, but not yet run on a GPU.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::driver::{CudaSlice, CudaStream, CudaView};
use cudarc::nccl::result::{self, NcclError};
use cudarc::nccl::{Comm, Id, NcclType};

use crate::{CommunicationError, Communicator, Result};

/// One rank's GPU, connected by NCCL to those of the other ranks.
///
/// It only sends and receives. NCCL's own sums are not used: their order depends on the number of ranks and
/// on how the GPUs are connected.
pub struct Nccl {
    comm: Mutex<Movable>,
}

/// NCCL's connection, which any thread may use, one at a time.
struct Movable(Comm);

#[expect(unsafe_code, reason = "cudarc keeps a pointer to NCCL's connection, which no thread owns")]
// SAFETY: NCCL allows calls from any thread, one at a time: `Nccl` lends this only under its lock.
unsafe impl Send for Movable {}

impl Nccl {
    /// Connects the GPUs of all ranks; all ranks call it. The id of the connection is sent over
    /// `communicator`.
    ///
    /// - `stream`: of this rank's GPU. Messages wait for the work that is queued there, and work that is
    ///   queued later waits for them. candle's stream is that of the calling thread, so the same thread must
    ///   launch the work and exchange.
    ///
    /// # Errors
    ///
    /// A rank has ended, or NCCL fails: two ranks have the same GPU, or the GPUs cannot be connected.
    pub fn connect(communicator: &Communicator, stream: &Arc<CudaStream>) -> Result<Self> {
        let first = communicator.is_first().then(Id::new).transpose();
        // Sent even if it failed, so that the other ranks do not wait for ever.
        let mut bytes = match &first {
            Ok(Some(id)) => id.internal().map(|byte| byte as u8).to_vec(),
            _ => Vec::new(),
        };
        communicator.broadcast(&mut bytes)?;
        first.map_err(|error| failed("making an id", &error))?;
        let Ok(id) = <[u8; 128]>::try_from(bytes) else {
            return Err(CommunicationError::new("rank 0 could not start NCCL; see its own error"));
        };
        let bound = stream.context().bind_to_thread();
        bound.map_err(|error| CommunicationError::new(format!("choosing the GPU: {error}")))?;
        let (rank, size) = (communicator.rank(), communicator.size());
        let id = Id::uninit(id.map(|byte| byte as std::ffi::c_char));
        match Comm::from_rank(Arc::clone(stream), rank, size, id) {
            Ok(comm) => Ok(Self { comm: Mutex::new(Movable(comm)) }),
            Err(error) => Err(failed(
                &format!("connecting GPU {} of rank {rank}", stream.context().ordinal()),
                &error,
            )),
        }
    }

    /// Sends numbers to a partner and receives as many as `received` holds. It is queued on the stream, and
    /// does not wait for it.
    ///
    /// - `sent`, `received`: on the GPU and the stream of [`connect`](Self::connect).
    ///
    /// # Errors
    ///
    /// NCCL fails. It does not find out whether the partner sends another number of numbers.
    pub fn exchange<T: NcclType>(
        &self,
        partner: usize,
        sent: &CudaView<T>,
        received: &mut CudaSlice<T>,
    ) -> Result<()> {
        let comm = self.comm.lock().unwrap_or_else(PoisonError::into_inner);
        let partner = partner as i32;
        let mut exchanged = || -> std::result::Result<(), NcclError> {
            // One group, so that neither side waits for the other to receive first.
            result::group_start()?;
            let sent = comm.0.send(sent, partner);
            let received = comm.0.recv(received, partner);
            // Ended even if they failed, or later calls would join the group.
            result::group_end()?;
            sent?;
            received.map(drop)
        };
        exchanged().map_err(|error| failed(&format!("exchanging with rank {partner}"), &error))
    }
}

impl Drop for Nccl {
    fn drop(&mut self) {
        // cudarc ends the connection without waiting for what partners still read. If the GPU has failed,
        // there is nothing to wait for.
        let comm = self.comm.get_mut().unwrap_or_else(PoisonError::into_inner);
        let _ = comm.0.stream().context().synchronize();
    }
}

impl fmt::Debug for Nccl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("NCCL")
    }
}

fn failed(doing: &str, error: &NcclError) -> CommunicationError {
    CommunicationError::new(format!(
        "NCCL, {doing}: {:?}; with NCCL_DEBUG=WARN in the environment it prints the cause",
        error.0
    ))
}
