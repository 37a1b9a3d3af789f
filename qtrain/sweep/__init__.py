"""Sweeps: what a config's ``sweep()`` yields, and the points of it as runs: one by one, in processes, in one program.

>>> from qtrain import sweep
>>> list(sweep.product({"schedule.name": ("CR", "CT")}, {"seed": range(2)}))[:2]
[{'schedule.name': 'CR', 'seed': 0}, {'schedule.name': 'CR', 'seed': 1}]
"""

from qtrain.sweep.points import chain, product, zip

__all__ = ["chain", "product", "zip"]
