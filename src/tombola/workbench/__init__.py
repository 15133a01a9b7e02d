"""The workbench: run a study, and get its tables and charts, from a script, a notebook or the command line.

Every function takes a study: a `Study`, the name of a preset, or the path of a TOML file, with fields to override.
The package imports none of its modules, so that a verb of the command line loads only what it needs.
"""
