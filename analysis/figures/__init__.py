"""Every figure: what is computed in one function is drawn in another."""
