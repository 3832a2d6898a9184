"""Fields of a batch, one kind a file: what is read for it, what it holds, and how it is decoded."""
