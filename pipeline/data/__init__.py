"""The stream: order of samples, shard reading, decoding, loader processes."""
