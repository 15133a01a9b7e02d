"""The store: keeps results, masks, checkpoints and claims on disk."""
