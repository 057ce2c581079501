"""What a session is told by others: measured choices, records, advisories."""
