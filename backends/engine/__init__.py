"""From a request to a kernel that runs: priorities, router, masks, sessions with their plans."""
