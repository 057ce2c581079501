"""What observes a session or chooses for it: autotune, records, advisories."""
