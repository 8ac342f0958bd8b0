"""Each entry of each file of ours, left out or of another value, through what reads it: right, or one line."""

from __future__ import annotations
