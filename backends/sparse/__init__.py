"""Sparse attention: which key blocks each query block sees, and how that is computed.

A method (`methods/`, one file for each published algorithm) answers the first question with a `BlockMap`. An executor
(`executors/`) computes a block map. `method.py` is the backend around both.
"""
