"""Self-attention, causal and not, and the transformer that is made of the causal one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.nn.sequence import Causal

SPREAD = 0.02  # of the initial weights


@dataclass
class Cache:
    """Keys and values of n sequences, the places from `length` on still empty.

    Attributes:
        pairs: keys and values [2, n, heads, T, width / heads] of each layer.
        context: [n, width], what is added to every input; None without a context.
        length: places that were read.
    """

    pairs: list[Tensor]
    context: Tensor | None
    length: int = 0


class CausalAttention(nn.Module):
    """softmax(q k^T / sqrt(width / heads)) v over a place and those before it.

    Args:
        width: of inputs and outputs.
        heads: attend each for themselves, to width / heads coordinates.
        dropout: the share of attention weights that training leaves out.

    Source: Vaswani et al. 2017, section 3.2, arXiv:1706.03762.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: {heads} do not divide width {width}")
        self.heads, self.dropout = heads, dropout
        self.inward = nn.Linear(width, 3 * width)
        self.outward = nn.Linear(width, width)

    def _heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of x [B, T, width], each [B, heads, T, width / heads]."""
        queries, keys, values = self.inward(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return queries, keys, values

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, width] from [B, T, width]."""
        queries, keys, values = self._heads(x)
        dropped = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(queries, keys, values, dropout_p=dropped, is_causal=True)
        out: Tensor = self.outward(y.transpose(1, 2).flatten(2))
        return out

    def step(self, x: Tensor, pairs: Tensor, place: int) -> Tensor:
        """[n, width] from [n, width], whose keys and values are written to their place of `pairs`."""
        query, key, value = self._heads(x[:, None])
        pairs[0, :, :, place], pairs[1, :, :, place] = key[:, :, 0], value[:, :, 0]
        keys, values = pairs[:, :, :, : place + 1]
        out: Tensor = self.outward(F.scaled_dot_product_attention(query, keys, values).flatten(1))
        return out


class Attention(nn.Module):
    """softmax(q k^T / sqrt(width / heads)) v over all places, and over tokens beside them.

    Args:
        width: of inputs and outputs.
        heads: attend each for themselves, to width / heads coordinates.
        tokens_dim: of the tokens, whose keys and values stand beside those of the places; 0 without tokens.
    Raises: ValueError when heads do not divide width.

    Source: Vaswani et al. 2017, section 3.2, arXiv:1706.03762; for the tokens Nichol et al. 2021, arXiv:2112.10741.
    """

    def __init__(self, width: int, heads: int, tokens_dim: int = 0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: {heads} do not divide width {width}")
        self.heads = heads
        self.inward = nn.Linear(width, 3 * width)
        self.told = nn.Linear(tokens_dim, 2 * width) if tokens_dim else None
        self.outward = nn.Linear(width, width)

    def forward(self, x: Tensor, tokens: Tensor | None = None) -> Tensor:
        """[B, P, width] from x [B, P, width] and tokens [B, T, tokens_dim], if it was built for them."""
        queries, keys, values = self.inward(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if self.told is not None:
            more = self.told(tokens).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
            keys, values = torch.cat([keys, more[0]], 2), torch.cat([values, more[1]], 2)
        y = F.scaled_dot_product_attention(queries, keys, values)  # [B, heads, P, width / heads]
        out: Tensor = self.outward(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), the mlp with one hidden layer of 4 width and GELU."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = CausalAttention(width, heads, dropout)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self._rest(x + self.drop(self.attention(self.attention_norm(x))))

    def step(self, x: Tensor, pairs: Tensor, place: int) -> Tensor:
        return self._rest(x + self.attention.step(self.attention_norm(x), pairs, place))

    def _rest(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.drop(self.mlp(self.mlp_norm(x)))
        return out


class CausalTransformer(Causal):
    """A stack of blocks over inputs to which each place adds a learned vector, and the context another one.

    Args:
        width: of inputs, of blocks, and of outputs, which are normalised.
        depth: blocks.
        heads: of each attention.
        length: places, at most.
        context_dim: of the context; 0 for none.
        dropout: the share of attention weights, of every block's additions and of inputs that training leaves out.
    Raises: ValueError when heads do not divide width.

    Source: Radford et al. 2019, GPT-2, section 2.3: normalisation in front of each part and at the end; weights from
    N(0, 0.02^2), those of the 2 depth layers that add to x from N(0, 0.02^2 / (2 depth)).
    """

    def __init__(
        self, width: int, depth: int, heads: int, length: int, context_dim: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.width, self.heads, self.length = width, heads, length
        self.places = nn.Embedding(length, width)
        self.context = nn.Linear(context_dim, width, bias=False) if context_dim else None
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.apply(narrow)
        for name, parameter in self.named_parameters():
            if name.endswith(("attention.outward.weight", "mlp.2.weight")):
                nn.init.normal_(parameter, std=SPREAD / math.sqrt(2 * depth))

    def forward(self, inputs: Tensor, context: Tensor | None = None) -> Tensor:
        if inputs.shape[1] > self.length:
            raise ValueError(f"inputs: {inputs.shape[1]} places; this transformer was built for {self.length}")
        x = inputs + self.places.weight[: inputs.shape[1]]
        added = self._added(context)
        x = self.drop(x if added is None else x + added[:, None])
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.norm(x)
        return out

    def start(self, n: int, context: Tensor | None = None) -> Cache:
        size = (2, n, self.heads, self.length, self.width // self.heads)
        return Cache([self.places.weight.new_empty(size) for _ in self.blocks], self._added(context))

    def step(self, inputs: Tensor, cache: Cache) -> Tensor:
        """One place: its cost grows with the number of places before it. Without dropout."""
        if cache.length == self.length:
            raise ValueError(f"inputs: more than the {self.length} places that this transformer was built for")
        x = inputs + self.places.weight[cache.length]
        x = x if cache.context is None else x + cache.context
        for block, pairs in zip(self.blocks, cache.pairs, strict=True):
            assert isinstance(block, Block)
            x = block.step(x, pairs, cache.length)
        cache.length += 1
        out: Tensor = self.norm(x)
        return out

    def _added(self, context: Tensor | None) -> Tensor | None:
        return None if context is None or self.context is None else self.context(context)


@torch.no_grad()
def narrow(module: nn.Module) -> None:
    """A linear layer's or a table's weights from N(0, 0.02^2), biases 0; other modules are left as they are."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=SPREAD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
