"""Fake quantization: the numerics, and a model with quantizers inside."""
