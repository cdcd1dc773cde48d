"""The tables: each module makes the one of its name."""
