//! Stage: k-means, then the clustering network; reliable pseudo-labels.
