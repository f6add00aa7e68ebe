//! Algorithms on embeddings: k-means, neighbours, Hungarian.
