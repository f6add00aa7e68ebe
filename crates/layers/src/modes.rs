//! The statistics that the batch norms of each block use.

use candle_core::{Result, bail};

use crate::Network;

/// The mean and variance that the batch norms of a block use.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mode {
    /// Those of the current batch. Each call updates the running ones.
    Batch,
    /// The running ones, which do not change.
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

    /// Sets the mode of one block. An unknown name is an error.
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
            bail!("the modes belong to another network, with the blocks {:?}", self.blocks)
        }
        Ok(())
    }
}
