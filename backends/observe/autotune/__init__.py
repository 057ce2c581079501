"""Autotune: times backends in real runs and keeps the fastest for each kind of call."""
