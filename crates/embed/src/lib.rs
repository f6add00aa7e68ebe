//! Stage: embeddings of all images by a trained network.
