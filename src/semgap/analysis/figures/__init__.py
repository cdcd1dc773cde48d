"""The figures: each module plots the one of its name."""
