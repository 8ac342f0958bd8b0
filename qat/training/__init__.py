"""The training loop, and its loss, optimizer, settings and log."""
