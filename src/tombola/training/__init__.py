"""Training: a pure function of initial state, mask, data, recipe and seed."""
