//! What lies between a loss and better weights.
