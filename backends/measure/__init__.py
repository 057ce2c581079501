"""Measuring: exact rows and errors, device clocks, benchmark inputs and presets, environments, stored probe results."""
