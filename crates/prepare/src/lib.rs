//! Image sources to an images file.
