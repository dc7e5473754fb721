"""How samples of a model with a density are drawn."""

from __future__ import annotations

from dataclasses import dataclass

from dgm_models.construct import PositiveFloat


@dataclass(frozen=True)
class Tempering:
    """Settings of a sampler (`Model.sampling`).

    Args:
        temperature: 1 draws from the model's distribution. Below 1 the draws lie closer to what is probable: logits are
            divided by it, and standard deviations and scales multiplied.
    """

    temperature: PositiveFloat = 1.0
