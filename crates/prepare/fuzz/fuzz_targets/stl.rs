//! Any bytes to the reader; see the module `fuzz` of crate `prepare`.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    // An error is a fine answer to most bytes.
    let _ = prepare::fuzz::stl(bytes);
});
