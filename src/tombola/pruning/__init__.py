"""Pruning: masks, and one round that removes the connections of the lowest importance."""
