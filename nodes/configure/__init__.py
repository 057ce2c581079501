"""Nodes that put a configuration on a model."""
