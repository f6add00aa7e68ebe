//! Drives the real programs end to end.
