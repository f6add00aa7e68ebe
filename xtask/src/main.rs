//! Runs the stages in order; starts programs, links none of them.
fn main() {}
