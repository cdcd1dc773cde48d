"""Networks: a row of config, and the processes or namespaces that emulate it."""
