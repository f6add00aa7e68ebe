//! The files between the stages, and views.
