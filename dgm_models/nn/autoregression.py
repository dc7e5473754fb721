"""The shell of autoregressive models: p(x|c) is a product of conditionals, each of a place given those before it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dgm_models.codecs import Codec
from dgm_models.conditions import Condition
from dgm_models.nn.conditioner import check
from dgm_models.nn.tempering import Tempering
from dgm_models.ops.likelihoods import Likelihood
from dgm_models.protocols import DataSpec, Model


class Autoregressive(Model):
    """p(x|c) = product over places p of p(x_p | x_q, q before p, c).

    A subclass gives the conditionals twice: all at once where x is known (`conditionals`), and one after another while
    x is being drawn (`start`, `step`, `admit`), with what it can keep between the steps. A law holds the two equal.

    Args:
        data: what is modelled.
        codec: of the data; `log_prob` and `sample` work in its model space.
        likelihood: of one place's V values, given K network outputs: params [N, K, 1], values [N, V].
        places: [P, V] int64: the flat positions of the values of each place, in the order in which they are drawn;
            one value a place in the stored order by default.
        condition: what a sample is asked for, or None.
    """

    places: Tensor

    def __init__(
        self,
        data: DataSpec,
        codec: Codec,
        likelihood: Likelihood,
        places: Tensor | None = None,
        condition: Condition | None = None,
    ) -> None:
        super().__init__(data, codec)
        self.likelihood = likelihood
        self.condition = condition
        self.sampling = Tempering()
        self.register_buffer("places", torch.arange(data.dims)[:, None] if places is None else places)

    # ---- what a subclass gives

    def conditionals(self, x: Tensor, cond: Tensor | None) -> Tensor:
        """[B, P, K]: the network's outputs for every place, in the order of `places`, given x [B, *event]."""
        raise NotImplementedError

    def start(self, n: int, cond: Tensor | None) -> Any:
        """What `step` and `admit` keep for n examples of which no value is known yet."""
        raise NotImplementedError

    def step(self, state: Any, place: int) -> Tensor:
        """[n, K]: the network's outputs for a place, all those before it having been admitted. One evaluation."""
        raise NotImplementedError

    def admit(self, state: Any, place: int, values: Tensor) -> None:
        """Takes in the values [n, V] of a place."""
        raise NotImplementedError

    # ---- what follows

    def log_probs(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B, P] nats: log p of every place given those before it."""
        check(self.condition, cond)
        params = self.conditionals(x, cond)
        values = x.flatten(1)[:, self.places]  # [B, P, V]
        each = self.likelihood.log_prob(params.flatten(0, 1)[..., None], values.flatten(0, 1))
        return each.reshape(values.shape[:2])

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats, exact in model space."""
        return self.log_probs(x, cond).sum(1)

    @torch.no_grad()
    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """Ancestral: place after place; `evaluations` is the number of places."""
        x = torch.zeros(n, *self.data.shape, device=rng.device, dtype=self._dtype())
        return self.complete(x, torch.zeros_like(x, dtype=torch.bool), rng, cond)

    @torch.no_grad()
    def complete(self, x: Tensor, known: Tensor, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        """Draws what is not known of x from its exact conditional distribution.

        Args:
            x: [n, *event] in model space; only its known values are read.
            known: [n, *event] bool. The known values of an example come before all others in the model's order.
            rng: of the draws.
            cond: the conditions.
        Returns: [n, *event].
        Raises: ValueError when a value is known that comes after one that is not.
        """
        check(self.condition, cond)
        given, there = x.flatten(1).clone(), known.flatten(1)[:, self.places].flatten(1)  # [n, P * V]
        if bool((there[:, 1:] & ~there[:, :-1]).any()):
            raise ValueError(
                f"known: {type(self).__name__} draws the values in one order, and one is known that comes after one "
                "that is not; give known values that come first, or use a model of random orders"
            )
        known_places = there[:, :: self.places.shape[1]]
        if bool((there.reshape(len(x), *self.places.shape) != known_places[..., None]).any()):
            raise ValueError("known: a pixel's channels are drawn together; give all of them or none")
        state, self.evaluations = self.start(len(x), cond), 0
        for place in range(len(self.places)):
            at = self.places[place]
            if not bool(known_places[:, place].all()):
                params = self.step(state, place)
                drawn = self.likelihood.sample(params[..., None], rng, self.sampling.temperature)  # [n, V]
                given[:, at] = torch.where(known_places[:, place, None], given[:, at], drawn.to(given.dtype))
                self.evaluations += 1
            self.admit(state, place, given[:, at])
        return given.reshape(x.shape)

    def _dtype(self) -> torch.dtype:
        return torch.int64 if self.data.levels is not None else next(self.parameters()).dtype
