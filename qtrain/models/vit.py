"""The vision transformer."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.models.transformer import TransformerBlock

POOLS = ("token", "mean")


class ViT(nn.Module):
    """The vision transformer (Dosovitskiy et al. 2021, arXiv 2010.11929); DeiT-T by default, without distillation.

    Patches of the image through a convolution ``patch_embedding``, a class token, learned positions, `num_layers`
    pre-norm blocks ``block_0``, ..., whose attention sees every patch, a final layer norm and a dense head. Returns
    float32 logits ``(batch, num_classes)``. DeiT-S (Touvron et al. 2021, arXiv 2012.12877, table 1) has width 384 and 6
    heads. At 224×224×3 and 1000 classes DeiT-T has 5,717,416 parameters and 1,074,851,328 multiply-accumulates, to
    which QKᵀ and PV add 178,831,872; DeiT-S 22,050,664 parameters, 4,241,218,560 and 357,663,744.

    Fields:
      num_classes: outputs of the head, the layer ``logits``.
      patch: side of the square patches, of which the image's sides are multiples: 16 for 224×224, 4 for 32×32, 2 for
        8×8.
      num_layers, width, num_heads: of the blocks; `width` is a multiple of `num_heads`.
      mlp_ratio: hidden width of the blocks' MLP, in multiples of `width`.
      pool: what the head sees: ``"token"``, the class token, or ``"mean"``, the average of all patches; there is then
        no class token.
      dropout: rate on embeddings, attention weights and both branches of a block, from the rng ``dropout``.
      drop_path: rate at which an example skips a branch of the last block, growing linearly from 0 at the first block;
        from the rng ``dropout``. DeiT trains with 0.1, and without `dropout`.
      dtype: of the computation; parameters are float32.

    The sums after attention and MLP are ``block_0/attention_residual`` and ``block_0/mlp_residual``. Kernels begin by
    Glorot's uniform distribution, as in the ViT authors' code, which suits any width (DeiT: truncated normal of
    deviation 0.02); positions and class token with deviation 0.02. GELU is the tanh approximation, as in the ViT
    authors' code (DeiT: exact). Parameters ``class_token`` (1, 1, width) and ``position_embedding``
    (1, tokens, width) are the model's own.

    Raises:
      UsageError: for an image that is not made of whole patches, heads that do not divide the width, another pool.
    """

    num_classes: int
    patch: int = 16
    num_layers: int = 12
    width: int = 192
    num_heads: int = 3
    mlp_ratio: int = 4
    pool: Literal["token", "mean"] = "token"
    dropout: float = 0.0
    drop_path: float = 0.0
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of a batch of images NHWC, all of the size of those that the model was initialised with."""
        height, width = x.shape[1:3]
        if height % self.patch or width % self.patch:
            raise UsageError(f"patch={self.patch} does not divide images of {height}x{width} pixels")
        if self.width % self.num_heads:
            raise UsageError(f"width={self.width} is not a multiple of num_heads={self.num_heads}")
        if self.pool not in POOLS:
            raise UsageError(f"pool={self.pool!r}: give one of {', '.join(POOLS)}")
        glorot = nn.initializers.xavier_uniform()
        normal = nn.initializers.normal(0.02)
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=self.patch,
            padding="VALID",
            kernel_init=glorot,
            dtype=self.dtype,
            name="patch_embedding",
        )(x)
        x = x.reshape((x.shape[0], -1, self.width))
        if self.pool == "token":
            token = self.param("class_token", normal, (1, 1, self.width), jnp.float32)
            x = jnp.concatenate([jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width)), x], axis=1)
        positions = self.param("position_embedding", normal, (1, *x.shape[1:]), jnp.float32)
        x = x + positions.astype(x.dtype)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        for layer in range(self.num_layers):
            x = TransformerBlock(
                self.num_heads,
                self.mlp_ratio * self.width,
                self.dropout,
                self.dtype,
                train,
                causal=False,
                drop_path=self.drop_path * layer / max(self.num_layers - 1, 1),
                kernel_init=glorot,
                name=f"block_{layer}",
            )(x)
        x = nn.LayerNorm(dtype=self.dtype, name="final_norm")(x)
        x = x[:, 0] if self.pool == "token" else jnp.mean(x, axis=1)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
