"""The KV cache: its memory, and what of it lies where."""
