"""One file for each published method; each is a backend (`kernels/registry.py`)."""
