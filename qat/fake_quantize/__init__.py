"""Fake quantization: the numerics, and how quantizers are inserted into a model."""
