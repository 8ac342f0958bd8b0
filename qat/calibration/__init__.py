"""Activation ranges from images, and weights rounded by them."""
