//! Stage: BYOL, no negative pairs.
