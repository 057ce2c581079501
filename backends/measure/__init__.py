"""What is measured and in which environment: inputs, presets, device clocks, kept results of probes."""
