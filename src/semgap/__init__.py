"""semgap: what it is worth for an LLM runtime to know what it is sending to a GPU across a network."""

__version__ = "0.2.0"
