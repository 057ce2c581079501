"""What this machine has: packages, devices, probes of kernels, and how to get what is missing."""
