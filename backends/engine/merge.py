"""`merge` for hosts and programs: joins partial results over disjoint sets of keys (`kernels/support/merge.py`)."""

from ..kernels.support.merge import merge

__all__ = ["merge"]
