"""Values without torch: requests, platforms, mask plans, limits, options, packages, errors."""
