"""Compares the kernels that run here on plain tensors and prints the table (run through with_package.py)."""

from attention_backends.backends.doctor.bench import compare_kernels

if __name__ == "__main__":
    print(compare_kernels())
