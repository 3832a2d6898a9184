"""Preparing shards: any images in, verified WebDataset shards out."""
