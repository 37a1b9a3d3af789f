"""What is asked of a model: its inputs, its loss, and how good its outputs are. The one seam between kinds of data."""

from qtrain.tasks.average_precision import mean_average_precision
from qtrain.tasks.base import Task
from qtrain.tasks.build import task_for
from qtrain.tasks.classification import IMAGES, NODES, TOKENS, Classification, NodeClassification
from qtrain.tasks.detection import Detection

__all__ = [
    "IMAGES",
    "NODES",
    "TOKENS",
    "Classification",
    "Detection",
    "NodeClassification",
    "Task",
    "mean_average_precision",
    "task_for",
]
