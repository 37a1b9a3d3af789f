"""The task of a data set."""

from __future__ import annotations

from typing import Any

from qtrain.data import Dataset
from qtrain.tasks.base import Task
from qtrain.tasks.classification import IMAGES, NODES, TOKENS
from qtrain.tasks.detection import Detection

_BY_KIND: dict[str, Task] = {"image": IMAGES, "tokens": TOKENS, "graph": NODES}


def task_for(dataset: Dataset, module: Any) -> Task:
    """What is to be learned of `dataset` by `module`, which for boxes has ``anchors(height, width)``."""
    if dataset.kind == "boxes":
        height, width, _ = dataset.input_shape
        return Detection(module.anchors(height, width), dataset.num_classes, (height, width))
    return _BY_KIND[dataset.kind]
