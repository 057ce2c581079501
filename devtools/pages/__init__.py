"""The pages of docs/ that are made from the code; `inside/write_docs.py` writes them, tests compare them."""
