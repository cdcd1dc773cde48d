"""The model and the executors that run it."""
