"""A decoder-only transformer language model."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from qtrain.errors import UsageError


class TransformerBlock(nn.Module):
    """Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)); the attention is causal, the MLP's activation GELU."""

    num_heads: int
    mlp_width: int
    dropout: float
    dtype: Any
    train: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(batch, length, width)`` to the same shape."""
        drop = nn.Dropout(self.dropout, deterministic=not self.train)
        y = nn.LayerNorm(dtype=self.dtype, name="attention_norm")(x)
        y = nn.MultiHeadDotProductAttention(
            self.num_heads,
            dropout_rate=self.dropout,
            deterministic=not self.train,
            dtype=self.dtype,
            name="attention",
        )(y, mask=nn.make_causal_mask(x[..., 0]))
        x = x + drop(y)
        y = nn.LayerNorm(dtype=self.dtype, name="mlp_norm")(x)
        y = nn.gelu(nn.Dense(self.mlp_width, dtype=self.dtype, name="mlp_in")(y))
        y = nn.Dense(x.shape[-1], dtype=self.dtype, name="mlp_out")(y)
        return x + drop(y)


class TransformerLM(nn.Module):
    """Tokens ``(batch, length)`` to float32 logits of the next token ``(batch, length, vocab_size)``.

    Token and learned position embeddings, `num_layers` pre-norm blocks, a final layer norm and the head.

    Fields:
      vocab_size: tokens are 0 … vocab_size − 1.
      max_length: positions that are learned; longer inputs are an error.
      num_layers, width, num_heads: of the blocks ``block_0``, ...; `width` is a multiple of `num_heads`.
      mlp_ratio: hidden width of the blocks' MLP, in multiples of `width`.
      dropout: rate on embeddings, attention weights and both branches of a block, from the rng ``dropout``.
      tied: the head multiplies by the token embedding; otherwise it is a dense layer ``logits`` without bias.
      scan_layers: one compiled block serves all layers: parameters are stacked under ``blocks``, compilation is short.
      remat: the backward pass recomputes each block's inside instead of keeping it.
      dtype: of the computation; parameters are float32.
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

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of the token after each position, which sees itself and what is before it."""
        length = tokens.shape[-1]
        if length > self.max_length:
            raise UsageError(f"the input has {length} tokens; allowed: at most max_length={self.max_length}; raise it")
        embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")
        positions = nn.Embed(self.max_length, self.width, dtype=self.dtype, name="position_embedding")
        x = embed(tokens) + positions(jnp.arange(length))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)

        # prevent_cse guards against a rewrite that a scanned body cannot suffer, at a cost.
        block = nn.remat(TransformerBlock, prevent_cse=not self.scan_layers) if self.remat else TransformerBlock
        fields = (self.num_heads, self.mlp_ratio * self.width, self.dropout, self.dtype, train)
        if self.scan_layers:
            layers = nn.scan(
                lambda module, carry: (module(carry), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=self.num_layers,
            )
            x, _ = layers(block(*fields, name="blocks"), x)
        else:
            for layer in range(self.num_layers):
                x = block(*fields, name=f"block_{layer}")(x)

        x = nn.LayerNorm(dtype=self.dtype, name="final_norm")(x)
        if self.tied:
            return embed.attend(x).astype(jnp.float32)
        return nn.Dense(self.vocab_size, use_bias=False, dtype=self.dtype, name="logits")(x).astype(jnp.float32)
