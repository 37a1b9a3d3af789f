"""What the training images lack for a part of the run: blur, the classical deficit of critical learning periods."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qtrain.data import Dataset
from qtrain.durations import duration
from qtrain.errors import UsageError, did_you_mean

Array = jax.Array
DEFICITS = ("none", "blur")


def blur(images: Array, factor: int) -> Array:
    """Images without detail: made ``1/factor`` as high and as wide, and as large as they were again, bilinearly.

    Both ways by the triangle kernel with pixel centres at ½: of a row of n pixels, with m = max(1, rint(n/factor)),
    small = D x and blurred = U D x,

      D_ij ∝ max(0, 1 − |(i + ½) n/m − (j + ½)| m/n)   (as wide as m/n is small, so that nothing is aliased)
      U_ij ∝ max(0, 1 − |(i + ½) m/n − (j + ½)|)

    each row divided by its sum. Linear, and it leaves a constant as it is: so normalized images are blurred as the raw
    ones would be.

    Args:
      images: floating, [..., height, width, channels].
      factor: at least 1; 1 leaves the images as they are.

    Achille, Rovere and Soatto 2018 (arXiv 1711.08856, section 2): CIFAR at factor 4, 32 to 8 and back.

    >>> import jax.numpy as jnp
    >>> blur(jnp.array([1.0, 0.0, 0.0, 0.0]).reshape(1, 4, 1), factor=4).ravel()  # a row of one pixel has no detail
    Array([0.20833334, 0.20833334, 0.20833334, 0.20833334], dtype=float32)
    """
    *batch, height, width, channels = images.shape
    small = (max(1, round(height / factor)), max(1, round(width / factor)))
    reduced = jax.image.resize(images, (*batch, *small, channels), "linear")
    return jax.image.resize(reduced, images.shape, "linear")


@dataclasses.dataclass(frozen=True)
class Deficit:
    """A deficit of the training images in a window of steps; made by `deficit_from_config`.

    ``(step, batch) -> batch``; traced. Whether it is on is data to the step: read from `switch` where that is given.

    Attributes:
      factor: of `blur`.
      start, length: the window, steps.
      total_steps: of the run.
      switch: 1 where it is on, float32 [total_steps], traced or not; None: made of the window.
    """

    factor: int
    start: int
    length: int
    total_steps: int
    switch: Any = None

    def __call__(self, step: Array, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The batch as the network gets to see it at `step`."""
        switch = self.table() if self.switch is None else self.switch
        images = batch["image"]
        # Not lax.cond: two small contractions cost less than a branch that nothing can be fused with, and runs that are
        # mapped over one batch then blur it once.
        return {**batch, "image": jnp.where(jnp.asarray(switch)[step] > 0, blur(images, self.factor), images)}

    def table(self) -> np.ndarray:
        """What `switch` may be."""
        steps = np.arange(self.total_steps)
        return ((steps >= self.start) & (steps < self.start + self.length)).astype(np.float32)


def deficit_from_config(
    config: Mapping[str, Any], dataset: Dataset, total_steps: int, steps_per_epoch: int
) -> Deficit | None:
    """The deficit that a config's section ``deficit`` asks for, or None.

    Args:
      config: ``name`` "none" or "blur"; ``factor`` of `blur`; the window, ``start_steps | start_epochs |
        start_percent`` (0) and ``length_…``. A length of 0 is a run without the deficit that shares the program of
        those with it.
      dataset: what is trained on.
      total_steps, steps_per_epoch: of the run.

    Raises:
      UsageError: for an unknown name, a window without a deficit, a factor that leaves or loses every detail, data that
        are no images.
    """
    name, factor = config["name"], config["factor"]
    if name not in DEFICITS:
        raise UsageError(f"deficit.name={name!r}: give one of {DEFICITS}.{did_you_mean(str(name), DEFICITS)}")
    units = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps, "default": 0}
    start, length = (duration(config, part, "deficit", **units) for part in ("start", "length"))
    if name == "none":
        if start or length:
            raise UsageError(
                "deficit.start or deficit.length is set, and deficit.name is 'none': give 'blur', or set them to 0"
            )
        return None
    shape = dataset.input_shape
    if dataset.kind not in ("image", "boxes") or min(shape[:2]) < 2:
        what = "sequences of pixels" if dataset.kind == "image" else f"of kind {dataset.kind!r}"
        raise UsageError(f"deficit.name={name!r} is for images, and data.name={dataset.name!r} are {what}; give 'none'")
    if isinstance(factor, bool) or not isinstance(factor, int) or not 2 <= factor <= min(shape[:2]):
        raise UsageError(
            f"deficit.factor={factor!r}: give a whole number from 2 to {min(shape[:2])}, the images' shorter side"
        )
    return Deficit(factor, start, length, total_steps)
