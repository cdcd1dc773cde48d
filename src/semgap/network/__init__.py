"""Networks: what a row of config asks for, and what emulates it."""
