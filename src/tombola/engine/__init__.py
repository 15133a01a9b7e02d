"""Engines: who runs the trainings of a study. `run` is the loop, `Workers` what an engine is, `local` and `ray` two."""
