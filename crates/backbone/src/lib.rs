//! ResNets and their files.
