"""What models of images are made of: autoencoders, codes, and how likely pixels are."""
