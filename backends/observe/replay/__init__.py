"""The decisions of a run as plain data in a picture's metadata."""
