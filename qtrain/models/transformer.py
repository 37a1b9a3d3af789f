"""A decoder-only transformer language model, and the block that it shares with the vision transformer."""

from __future__ import annotations

import functools
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.errors import UsageError
from qtrain.models.residual import Residual

POSITIONS, NORMS, MLPS = ("learned", "rotary"), ("layer", "rms"), ("gelu", "swiglu")


def rotate(x: jax.Array, base: float = 10_000.0) -> jax.Array:
    """Rotary position embedding of queries or keys (Su et al. 2021, arXiv 2104.09864, equation 34).

    Of depth d, features k and k + d/2 at position m are a point of the plane, which is turned by the angle
    ``m · base^(−2k/d)``: products of queries and keys then depend on the distance of their positions alone. The paper
    pairs neighbouring features, which is the same but for their order.

    Args:
      x: ``(batch, length, heads, depth)`` of even depth, any float; turned in float32.
      base: of the wavelengths, which go from 2π to ``2π · base``.

    >>> [round(float(feature), 3) for feature in rotate(jnp.ones((1, 2, 1, 2)))[0, 1, 0]]
    [-0.301, 1.382]
    """
    half = x.shape[-1] // 2
    frequency = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (jnp.arange(x.shape[-3], dtype=jnp.float32)[:, None] * frequency)[:, None, :]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


# Flax's attention passes only what the signature names, which `wraps` makes the wrapped function's: the einsums too.
@functools.wraps(nn.dot_product_attention, assigned=(), updated=())
def rotary_attention(query: jax.Array, key: jax.Array, value: jax.Array, **options: Any) -> jax.Array:
    """`nn.dot_product_attention` of queries and keys that `rotate` has turned."""
    return nn.dot_product_attention(rotate(query), rotate(key), value, **options)


def normalisation(kind: Literal["layer", "rms"]) -> type[nn.LayerNorm] | type[nn.RMSNorm]:
    """The norm module of a transformer's field `norm`."""
    return nn.RMSNorm if kind == "rms" else nn.LayerNorm


class TransformerBlock(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); the MLP is ``out(gelu(in(x)))``.

    With ``mlp="swiglu"`` it is ``out(silu(gate(x)) · in(x))`` (Shazeer 2020, arXiv 2002.05202, equation 6). The layers
    are ``attention/query``, ``key``, ``value``, ``out``, then ``mlp_gate``, ``mlp_in``, ``mlp_out``; the sums are
    ``attention_residual`` and ``mlp_residual``. `drop_path` is the rate at which a whole branch of an example is left
    out (stochastic depth, Huang et al. 2016, arXiv 1603.09382). GELU is the tanh approximation.
    """

    num_heads: int
    mlp_width: int
    dropout: float
    dtype: Any
    train: bool
    causal: bool = True
    rotary: bool = False
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    use_bias: bool = True
    drop_path: float = 0.0
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, length, width)`` to the same shape."""
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        dense = functools.partial(nn.Dense, use_bias=self.use_bias, dtype=self.dtype, kernel_init=self.kernel_init)
        norm = functools.partial(normalisation(self.norm), dtype=self.dtype)
        y = norm(name="attention_norm")(x)
        y = nn.MultiHeadDotProductAttention(
            self.num_heads,
            dropout_rate=self.dropout,
            deterministic=not self.train,
            dtype=self.dtype,
            use_bias=self.use_bias,
            kernel_init=self.kernel_init,
            attention_fn=rotary_attention if self.rotary else nn.dot_product_attention,
            name="attention",
        )(y, mask=nn.make_causal_mask(x[..., 0]) if self.causal else None)
        x = Residual(name="attention_residual")(x, self._dropped_path(drop(y)))
        y = norm(name="mlp_norm")(x)
        if self.mlp == "swiglu":
            gate = nn.silu(dense(self.mlp_width, name="mlp_gate")(y))
            y = gate * dense(self.mlp_width, name="mlp_in")(y)
        else:
            y = nn.gelu(dense(self.mlp_width, name="mlp_in")(y))
        y = dense(x.shape[-1], name="mlp_out")(y)
        return Residual(name="mlp_residual")(x, self._dropped_path(drop(y)))

    def _dropped_path(self, y: jax.Array) -> jax.Array:
        if not self.drop_path:
            return y
        return nn.Dropout(self.drop_path, broadcast_dims=(1, 2), deterministic=not self.train)(y)


class TransformerLM(nn.Module):
    """Tokens ``(batch, length)`` to float32 logits of the next token ``(batch, length, vocab_size)``.

    Token and learned position embeddings, `num_layers` pre-norm blocks, a final layer norm and the head: GPT-2's form.
    ``positions="rotary", norm="rms", mlp="swiglu", use_bias=False`` is that of LLaMA (arXiv 2302.13971, section 2.2).

    Fields:
      vocab_size: tokens are 0 … vocab_size − 1.
      max_length: positions there are; longer inputs are an error.
      num_layers, width, num_heads: of the blocks ``block_0``, ...; `width` is a multiple of `num_heads`.
      mlp_ratio: hidden width of the blocks' MLP, in multiples of `width`; see `mlp`.
      dropout: rate on embeddings, attention weights and both branches of a block, from the rng ``dropout``.
      tied: the head multiplies by the token embedding; otherwise it is a dense layer ``logits`` without bias.
      scan_layers: one compiled block serves all layers: parameters are stacked under ``blocks``, compilation is short.
      remat: the backward pass recomputes each block's inside instead of keeping it.
      dtype: of the computation; parameters are float32.
      positions: ``"learned"``, embedded and added to the tokens; ``"rotary"``, queries and keys are turned (`rotate`),
        which takes heads of even width.
      norm: ``"layer"``, or ``"rms"`` (Zhang and Sennrich 2019, arXiv 1910.07467): no mean is subtracted, and there is
        no bias.
      mlp: ``"gelu"``; or ``"swiglu"``, with a gate, its hidden width 2/3 of the other's, rounded up to a multiple of 8:
        as many parameters (arXiv 2002.05202, section 3.1).
      use_bias: of the blocks' dense layers.

    Raises:
      UsageError: for an input that is too long, heads of odd width that should be turned, or another value of
        `positions`, `norm` or `mlp`.
    """

    vocab_size: int
    max_length: int
    num_layers: int = 4
    width: int = 256
    num_heads: int = 4
    mlp_ratio: int = 4
    dropout: float = 0.0
    tied: bool = False
    scan_layers: bool = False
    remat: bool = False
    dtype: Any = jnp.float32
    positions: Literal["learned", "rotary"] = "learned"
    norm: Literal["layer", "rms"] = "layer"
    mlp: Literal["gelu", "swiglu"] = "gelu"
    use_bias: bool = True

    @property
    def mlp_width(self) -> int:
        """Hidden width of the blocks' MLP."""
        width = self.mlp_ratio * self.width
        return -(-2 * width // 24) * 8 if self.mlp == "swiglu" else width

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of the token after each position, which sees itself and what is before it."""
        length = tokens.shape[-1]
        if length > self.max_length:
            raise UsageError(f"the input has {length} tokens; allowed: at most max_length={self.max_length}; raise it")
        for field, allowed in (("positions", POSITIONS), ("norm", NORMS), ("mlp", MLPS)):
            if getattr(self, field) not in allowed:
                raise UsageError(f"{field}={getattr(self, field)!r}: give one of {', '.join(allowed)}")
        rotary = self.positions == "rotary"
        if rotary and self.width // self.num_heads % 2:
            raise UsageError(
                f"positions='rotary' turns pairs of features, and width={self.width} over num_heads={self.num_heads} "
                "is odd; change one of them"
            )
        embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")
        x = embed(tokens)
        if not rotary:
            positions = nn.Embed(self.max_length, self.width, dtype=self.dtype, name="position_embedding")
            x = x + positions(jnp.arange(length))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)

        # prevent_cse guards against a rewrite that a scanned body cannot suffer, at a cost.
        kind = nn.remat(TransformerBlock, prevent_cse=not self.scan_layers) if self.remat else TransformerBlock
        block = functools.partial(
            kind,
            self.num_heads,
            self.mlp_width,
            self.dropout,
            self.dtype,
            train,
            rotary=rotary,
            norm=self.norm,
            mlp=self.mlp,
            use_bias=self.use_bias,
        )
        if self.scan_layers:
            layers = nn.scan(
                lambda module, carry: (module(carry), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.num_layers,
            )
            x, _ = layers(block(name="blocks"), x)
        else:
            for layer in range(self.num_layers):
                x = block(name=f"block_{layer}")(x)

        x = normalisation(self.norm)(dtype=self.dtype, name="final_norm")(x)
        if self.tied:
            return embed.attend(x).astype(jnp.float32)
        return nn.Dense(self.vocab_size, use_bias=False, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
