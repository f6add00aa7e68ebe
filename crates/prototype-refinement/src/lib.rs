//! Stage: prototype-based representation learning.
