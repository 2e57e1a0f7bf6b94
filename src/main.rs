//! The whimbrel binary: parse, set up logging, dispatch, print the error chain once.
fn main() {}
