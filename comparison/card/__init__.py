"""The command `card`: what a card does, measured part by part within a given time, in one JSON and one page."""
