"""What several kernels share: packages with many versions, layouts, PyTorch's own attention."""
