"""Long short-term memory: a language model, and a classifier of sequences."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def _layers(
    x: jax.Array, num_layers: int, width: int, dropout: float, fused: bool, dtype: Any, train: bool
) -> jax.Array:
    """``(batch, length, features)`` to ``(batch, length, width)``: the hidden states of the last layer."""
    cell = nn.OptimizedLSTMCell if fused else nn.LSTMCell
    for layer in range(num_layers):
        # Without a parent here the cell is a part of its RNN, ``lstm_0/cell``, where its products are traced too.
        states: Any = nn.RNN(cell(width, dtype=dtype, parent=None), name=f"lstm_{layer}")(x)
        x = nn.Dropout(dropout, deterministic=not train)(states)
    return x


class LSTMLM(nn.Module):
    """Tokens ``(batch, length)`` to float32 logits of the next token ``(batch, length, vocab_size)``.

    A token embedding, `num_layers` long short-term memories (Hochreiter and Schmidhuber 1997) and the head; each
    sequence begins with a state of zeros. The Penn Treebank network of one layer and width 800 is this with
    ``num_layers=1, width=800``.

    Fields:
      vocab_size: tokens are 0 … vocab_size − 1.
      num_layers, width: of the layers ``lstm_0/cell``, ...; `width` is also that of the embedding.
      dropout: rate on the embedding and on what each layer puts out, not from step to step (Zaremba et al. 2014, arXiv
        1409.2329), from the rng ``dropout``.
      tied: the head multiplies by the token embedding; otherwise it is a dense layer ``logits``.
      fused: the four gates are one product with the input and one with the state (`nn.OptimizedLSTMCell`), instead of
        four and four, dense layers each: ``lstm_0/cell/ii``, ``if``, ``ig``, ``io``, ``hi``, ... (`nn.LSTMCell`). The
        parameters are the same and so is the result, but for rounding.
      dtype: of the products and gates; parameters and the state (hidden and cell) are float32.

    Recurrent kernels begin orthogonal, biases (one a gate) with 0, that of the forget gate too, as Flax has it.
    """

    vocab_size: int
    num_layers: int = 1
    width: int = 256
    dropout: float = 0.0
    tied: bool = False
    fused: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of the token after each position, which sees itself and what is before it."""
        embed = nn.Embed(self.vocab_size, self.width, dtype=self.dtype, name="token_embedding")
        x = nn.Dropout(self.dropout, deterministic=not train)(embed(tokens))
        x = _layers(x, self.num_layers, self.width, self.dropout, self.fused, self.dtype, train)
        if self.tied:
            return embed.attend(x).astype(jnp.float32)
        return nn.Dense(self.vocab_size, dtype=self.dtype, name="logits")(x).astype(jnp.float32)


class LSTMClassifier(nn.Module):
    """Sequences ``(batch, length, ...)`` to float32 logits ``(batch, num_classes)`` from the last hidden state.

    An image NHWC is read row by row: ``height`` steps of ``width · channels`` numbers. Fields as for `LSTMLM`, without
    an embedding.
    """

    num_classes: int
    num_layers: int = 1
    width: int = 256
    dropout: float = 0.0
    fused: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of a batch of sequences, the second axis being time."""
        x = x.reshape((*x.shape[:2], -1))
        x = _layers(x, self.num_layers, self.width, self.dropout, self.fused, self.dtype, train)
        return nn.Dense(self.num_classes, dtype=self.dtype, name="logits")(x[:, -1]).astype(jnp.float32)
