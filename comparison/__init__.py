"""Compares attention backends: metrics, the picture, the report, the runs on the embedded model, and the benchmark.

`metrics`, `picture` and `report` take images from anywhere; only `run` and `calls` know the embedded model. `bench`
times kernels on plain tensors; the modules beside it make its inputs, tables and files.
"""
