"""Studies: the description of an experiment, and the planning of its trainings."""
