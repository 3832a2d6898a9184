"""Losses of distillation: what a student loses by answering, seeing or relating otherwise than its teacher.

Every loss gives the part of each sample, float[B], whose mean is the loss; it takes at least fp32, under autocast and
from bf16 weights too, and gives the teacher no gradient. Those in ``relation.py`` and ``contrast.py``, and DIST,
compare the samples of the global batch with each other.
"""
