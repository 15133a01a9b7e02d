"""Engines: run the trainings of a study.

`run` is the main loop, `Workers` the interface of an engine, and `local` and `ray` are the two engines.
"""
