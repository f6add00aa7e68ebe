//! Stage: pseudo-labels and ground truth to ACC, NMI, ARI.
