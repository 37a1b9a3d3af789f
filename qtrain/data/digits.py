"""The real handwritten digits that scikit-learn ships: 8x8 images, 10 classes, nothing to download."""

from __future__ import annotations

import numpy as np

from qtrain.data.dataset import ImageArrays

SHAPE = (8, 8, 1)
NUM_CLASSES = 10
MAX_VALUE = 16.0  # pixels count the ink in 4x4 blocks of a 32x32 bitmap
MEAN, STD = (0.3054,), (0.3761,)  # of the 1437 training images over 16


def load() -> tuple[ImageArrays, ImageArrays]:
    """Training and test images: 1437 and 360, stratified by class, the same split for all seeds.

    The split is `train_test_split(..., test_size=360, stratify=labels, random_state=0)`. Pixels stay whole numbers
    0 … 16 (uint8); a batch is standardised, `(x/16 − 0.3054)/0.3761`, as the other image sets are.

    Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = digits.images.astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int32)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    return ImageArrays(train_images, train_labels), ImageArrays(test_images, test_labels)
