"""One file for each way to compute a block map."""
