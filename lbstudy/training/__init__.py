"""One training run and its data, on one process or several. Knows no Ray."""
