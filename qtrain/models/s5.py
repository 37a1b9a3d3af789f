"""S5: stacks of state-space layers for sequences, and for bytes of text."""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.errors import UsageError, did_you_mean
from qtrain.models.s5_ssm import SSM

ACTIVATIONS = ("gelu", "half_glu")


class S5Layer(nn.Module):
    """x + drop(activation(ssm(norm(x)))), the norm a layer norm.

    The activation is GELU, or with ``"half_glu"`` g ⊙ σ(W·g + b) for g = GELU(y), W the dense layer ``gate``.
    """

    ssm: SSM
    activation: str
    dropout: float
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, length, width)`` to the same shape."""
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        y = nn.gelu(self.ssm(nn.LayerNorm(dtype=self.dtype, name="norm")(x)))
        if self.activation == "half_glu":
            y = y * nn.sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype, name="gate")(drop(y)))
        return x + drop(y)


class _Stack(nn.Module):
    """The fields, and the layers, that both models share.

    Fields:
      num_layers: ``layer_0``, ..., each with a state-space model ``ssm``.
      width: features between the layers.
      state_size, blocks, discretisation, parametrisation, conjugate_symmetry, recurrence, least_step, most_step: of
        the state-space models; see `SSM`.
      activation: ``"half_glu"`` or ``"gelu"``; see `S5Layer`.
      dropout: rate, from the rng ``dropout``.
      remat: the backward pass recomputes each layer's inside instead of keeping it.
      dtype: of the products; parameters, recurrences and logits are float32.
    """

    num_layers: int = 4
    width: int = 128
    state_size: int = 64
    blocks: int = 1
    discretisation: Literal["zoh", "bilinear"] = "zoh"
    parametrisation: Literal["magnitude_phase", "naive"] = "magnitude_phase"
    conjugate_symmetry: bool = True
    recurrence: Literal["parallel", "sequential"] = "parallel"
    least_step: float = 0.001
    most_step: float = 0.1
    activation: Literal["half_glu", "gelu"] = "half_glu"
    dropout: float = 0.0
    remat: bool = False
    dtype: Any = jnp.float32

    def _layers(self, x: jax.Array, *, bidirectional: bool, train: bool) -> jax.Array:
        """The layers and the last norm; called from a compact method."""
        if self.activation not in ACTIVATIONS:
            raise UsageError(
                f"activation={self.activation!r} is not one of {', '.join(map(repr, ACTIVATIONS))}."
                f"{did_you_mean(self.activation, ACTIVATIONS)}"
            )
        layer = nn.remat(S5Layer) if self.remat else S5Layer
        for index in range(self.num_layers):
            ssm = SSM(
                features=self.width,
                state_size=self.state_size,
                blocks=self.blocks,
                discretisation=self.discretisation,
                parametrisation=self.parametrisation,
                conjugate_symmetry=self.conjugate_symmetry,
                bidirectional=bidirectional,
                recurrence=self.recurrence,
                least_step=self.least_step,
                most_step=self.most_step,
                dtype=self.dtype,
                parent=None,  # the layer's, not ours
            )
            x = layer(ssm, self.activation, self.dropout, self.dtype, train, name=f"layer_{index}")(x)
        return nn.LayerNorm(dtype=self.dtype, name="final_norm")(x)

    def _head(self, x: jax.Array, outputs: int, use_bias: bool) -> jax.Array:
        return nn.Dense(outputs, use_bias=use_bias, dtype=self.dtype, name="logits")(x).astype(jnp.float32)


class S5Classifier(_Stack, kw_only=True):
    """Sequences ``(batch, length, channels)`` to float32 logits ``(batch, num_classes)``.

    A dense ``encoder``, `num_layers` state-space layers, a layer norm, the average over time, a dense head. Images
    ``(batch, height, width, channels)`` are read as sequences of pixels, row by row. Smith et al. 2023, arXiv
    2208.04933; the authors normalise batches where this takes layer norms, which no batch size or split changes.

    Fields: those of `_Stack`, by name, and
      num_classes: outputs of the head, the layer ``logits``.
      bidirectional: every layer also runs from the end to the beginning.

    >>> model = S5Classifier(num_classes=10, num_layers=2, width=16, state_size=16)
    >>> variables = model.init(jax.random.key(0), jnp.ones((1, 64, 1)))
    >>> jax.tree.map(jnp.shape, variables["params"]["layer_0"]["ssm"]["A"])
    {'log_decay': (8,), 'log_frequency': (8,)}
    """

    num_classes: int
    bidirectional: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of a batch of sequences, or of images."""
        if x.ndim == 4:
            x = x.reshape(x.shape[0], -1, x.shape[-1])
        if x.ndim != 3:
            raise UsageError(f"the input has shape {x.shape}; allowed: (batch, length, channels), or images NHWC")
        x = nn.Dense(self.width, dtype=self.dtype, name="encoder")(x)
        x = self._layers(x, bidirectional=self.bidirectional, train=train)
        return self._head(x.mean(axis=1, dtype=jnp.float32), self.num_classes, use_bias=True)


class S5LM(_Stack, kw_only=True):
    """Tokens ``(batch, length)`` to float32 logits of the next token ``(batch, length, vocab_size)``.

    Token embeddings of `vocab_size` tokens, `num_layers` state-space layers, which are causal, a layer norm and a head
    without bias. The length is free: nothing is learned for a position.

    Fields: those of `_Stack`, by name, and
      vocab_size: tokens are 0 … vocab_size − 1.

    >>> model = S5LM(vocab_size=256, num_layers=1, width=16, state_size=16)
    >>> tokens = jnp.zeros((1, 12), jnp.int32)
    >>> model.apply(model.init(jax.random.key(0), tokens), tokens).shape
    (1, 12, 256)
    """

    vocab_size: int

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of the token after each position, which sees itself and what is before it."""
        x = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")(tokens)
        x = self._layers(x, bidirectional=False, train=train)
        return self._head(x, self.vocab_size, use_bias=False)
