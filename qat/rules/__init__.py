"""Where quantizers go, and why."""
