//! Whether a block normalises with the statistics of its batch or with the running ones.

use candle_core::{Result, bail};

use crate::Network;

/// Which mean and variance the batch norms of a block use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Those of the batch at hand; the running ones are updated, in the order of the calls.
    Batch,
    /// The running ones, which stay as they are.
    Running,
}

/// A [`Mode`] for every block of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Modes {
    blocks: Vec<String>,
    modes: Vec<Mode>,
}

impl Modes {
    /// The same mode for every block.
    pub fn all(network: &Network, mode: Mode) -> Modes {
        Modes { blocks: network.blocks().to_vec(), modes: vec![mode; network.blocks().len()] }
    }

    /// Changes the mode of one block.
    ///
    /// # Errors
    ///
    /// The network has no block of that name.
    pub fn set(&mut self, block: &str, mode: Mode) -> Result<()> {
        let Some(at) = self.blocks.iter().position(|name| name == block) else {
            bail!("no block is named `{block}`; the blocks are {}", self.blocks.join(", "))
        };
        self.modes[at] = mode;
        Ok(())
    }

    pub(crate) fn of(&self, block: usize) -> Mode {
        self.modes[block]
    }

    pub(crate) fn check(&self, blocks: &[String]) -> Result<()> {
        if self.blocks != blocks {
            bail!("the modes belong to another network: their blocks are {:?}", self.blocks)
        }
        Ok(())
    }
}
