"""Hooks: functions that a run calls with each level, and with each epoch if asked, and which may stop a chain.

A hook is a function of a `Report`. It observes: with and without it, trainings have the same names and the same bits.
For each chain of tickets it is told every level in order, those included that the store has already, so that it is told
the same however often a run was interrupted; with `epochs`, also every epoch of a level, before the level itself. What
several chains share, such as the dense network's training, is told for each of them.

A hook that raises `StopTraining` ends the chain that it was told about. A training that is running for this chain alone
is ended too, and not stored: the store has only whole trainings. A later run without the hook goes on from there. Any
other exception of a hook ends the run.

>>> from tombola.workbench.example import finished
>>> from tombola.workbench.runs import run
>>> def stop_early(report):
...     print(report.chain, report.level, report.density, report.losses[-1] > 0, sorted(report.metrics))
...     if report.level == 0:
...         raise StopTraining("one level is enough")
>>> found = run(**finished(), hooks=[stop_early], progress=False)
magnitude, seed 0 0 1.0 True ['test accuracy', 'test loss']
l1, seed 0 0 1.0 True ['test accuracy', 'test loss']
"""

from tombola.hooks.hook import Hook, Report, StopTraining
from tombola.hooks.writers import mlflow, tensorboard

__all__ = ["Hook", "Report", "StopTraining", "mlflow", "tensorboard"]
