"""Finished runs, and the graph and page that they come from."""
