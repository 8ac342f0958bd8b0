"""Calibration: activation ranges from images, and rounding of weights with the help of images."""
