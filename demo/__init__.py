"""The embedded model: small enough for the repository, trained on coloured shapes (see README.md)."""
