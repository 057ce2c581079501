"""Nodes that show and keep what ran."""
