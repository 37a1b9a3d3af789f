"""The tensor that a residual network carries from block to block, as a module that rules can name."""

from __future__ import annotations

import flax.linen as nn
import jax


class Residual(nn.Module):
    """The sum of a block's branches: ``y = x₁ + x₂ + …``; of one branch, that branch.

    It has no parameters and computes nothing else. It is a module so that the residual stream has a path of its own
    (``stage1_block2/residual``), by which its precision can be told from that of the layers that read it. Blocks
    without a shortcut pass their only branch, so that every tensor of the stream has a name.
    """

    @nn.compact
    def __call__(self, *branches: jax.Array) -> jax.Array:
        """The sum of `branches`, from left to right; of one shape, which is that of the result."""
        total = branches[0]
        for branch in branches[1:]:
            total = total + branch
        return total
