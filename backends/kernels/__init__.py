"""One file for each backend, and `registry.py`, the list of them."""

from .registry import BACKENDS as BACKENDS
