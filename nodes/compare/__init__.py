"""Nodes that compare and measure backends."""
