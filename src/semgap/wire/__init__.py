"""Frames between two processes: operations, bytes, connections, and the ledgers that count them."""
