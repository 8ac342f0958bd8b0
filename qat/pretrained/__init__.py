"""Weights files as people have them: read without running any code, and searched for the model's state dict."""
