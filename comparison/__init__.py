"""Compares attention backends: metrics, the picture, the report, and the runs on the embedded model.

`metrics`, `picture` and `report` take images from anywhere; only `run` and `calls` know the embedded model.
"""
