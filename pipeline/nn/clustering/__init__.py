"""Clusters of features that are spread over the ranks: k-means, whitening, and balanced assignments."""
