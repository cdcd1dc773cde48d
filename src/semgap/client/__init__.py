"""The thin client: the decode loop, its runtimes, and the measurements of a trial."""
