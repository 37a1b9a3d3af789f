"""``qtrain report``: what runs and sweeps say, from their metrics files alone, on one page. No JAX.

>>> from qtrain.report import find_runs, make_report, read_runs
"""

from __future__ import annotations

from qtrain.report.make import PAGE, Report, make_report
from qtrain.report.rows import read_rows, rows_of
from qtrain.report.runs import Run, find_runs, read_run, read_runs

__all__ = ["PAGE", "Report", "Run", "find_runs", "make_report", "read_rows", "read_run", "read_runs", "rows_of"]
