//! The binary `ringferry`.

fn main() {}
