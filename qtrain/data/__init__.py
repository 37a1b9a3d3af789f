"""Data as a function of the step: sources, the training stream, padded evaluation, and what a resumed run checks.

>>> from qtrain import data
>>> dataset = data.load({"name": "synthetic", "image_shape": (8, 8, 1), "batch_size": 32})
>>> with data.train_iterator(dataset, batch_size=32, seed=0) as batches:
...     {key: (value.shape, str(value.dtype)) for key, value in next(batches).items()}
{'image': ((32, 8, 8, 1), 'float32'), 'label': ((32,), 'int32')}
"""

from qtrain.data.config import DEFAULTS, DataConfig, parse_config
from qtrain.data.dataset import Dataset, ImageArrays, ImageSource, TokenSource, WindowedSource
from qtrain.data.evaluation import eval_batches, num_eval_batches
from qtrain.data.fingerprint import check_fingerprint, fingerprint
from qtrain.data.pipeline import TrainIterator, train_batches, train_iterator
from qtrain.data.registry import DATASETS, load

__all__ = [
    "DATASETS",
    "DEFAULTS",
    "DataConfig",
    "Dataset",
    "ImageArrays",
    "ImageSource",
    "TokenSource",
    "TrainIterator",
    "WindowedSource",
    "check_fingerprint",
    "eval_batches",
    "fingerprint",
    "load",
    "num_eval_batches",
    "parse_config",
    "train_batches",
    "train_iterator",
]
