"""How long a test waits for what surely comes."""

from __future__ import annotations

LONG_S = 240
"""Seconds for what takes a few where nothing else runs, new Pythons that import torch among it."""
