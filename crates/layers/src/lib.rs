//! What a network is made of, forward and backward.
