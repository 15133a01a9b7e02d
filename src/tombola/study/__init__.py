"""Studies: what to run, and which trainings that takes."""
