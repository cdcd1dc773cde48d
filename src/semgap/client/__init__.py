"""The thin side: the decode loop, its runtimes, and what is measured of them."""
