"""Frames between two processes: what they say, how they are sent, and who counts them."""
