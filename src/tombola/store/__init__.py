"""The store: results, masks, checkpoints and claims, on disk."""
