"""The explorer: prices of recorded trials over a grid of links, as one page."""
