//! Compiles this crate again when a file is added to a folder that it embeds.

fn main() {
    println!("cargo::rerun-if-changed=../../configs");
    println!("cargo::rerun-if-changed=../../data/digits");
}
