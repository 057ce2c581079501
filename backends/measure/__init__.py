"""Measuring: exact rows and errors, device clocks, environments, stored probe results."""
