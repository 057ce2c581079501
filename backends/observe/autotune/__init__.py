"""Measured choice: which backend is fastest for a kind of call, found out in real runs and kept."""
