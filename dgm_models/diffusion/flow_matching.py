"""Flow matching: the velocity of a path from noise to data, straight for every pair."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from dgm_models.conditions import Condition, Label
from dgm_models.construct import Fraction
from dgm_models.nn.backbones import Backbone, NoisyMlp
from dgm_models.nn.diffusion import Denoising, Diffusion
from dgm_models.ops.paths import Straight
from dgm_models.ops.samplers import Heun, Sampler
from dgm_models.ops.transport import assignment, squared_distances
from dgm_models.protocols import Batch, DataSpec
from dgm_models.training.runtime import current

Pairing = Literal["independent", "transport"]


class Transported(Denoising):
    """Data and noise of a global batch in the pairs of least total squared distance, within a label where there is one.

    Pairs cross as little as a batch allows, so the flow is straighter and takes fewer steps. Among data of several
    labels the nearest noise would tell the label, and a sample's noise does not: pairs are made within a label.

    The pairs are made before a batch is cut into micro-batches and of the rows of all workers, so training does not
    depend on either. In a validation every worker pairs its own rows.

    Source: Tong et al. 2024, arXiv:2302.00482; Pooladian et al. 2023, arXiv:2304.14772.
    """

    def prepare(self, model: Diffusion, batch: Batch) -> Batch:
        runtime = current()
        given = model.given(batch)
        rows = [batch.x.flatten(1), super().pair(model, batch)[1].flatten(1)]
        rows += [given] if given is not None else []
        start = 0
        if model.training:  # a validation may leave a worker without rows, which then gathers nothing
            rows = [runtime.gather(part) for part in rows]
            start = runtime.share(len(rows[0]))[0]
        x, eps, *label = rows
        cost = squared_distances(x, eps)
        for asked in label:
            cost = cost + (asked[:, None] != asked) * (len(cost) * cost.max() + 1)  # above the cost of all pairs
        order = assignment(cost)[start : start + len(batch)]
        return batch.with_extra(noise=eps[order].reshape(batch.x.shape))

    def pair(self, model: Diffusion, batch: Batch) -> tuple[Tensor, Tensor]:
        return batch.x, batch.extra["noise"]


def flow_matching(
    data: DataSpec,
    network: Backbone = NoisyMlp(),
    pairing: Pairing = "independent",
    sampler: Sampler = Heun(),
    cond: Condition | None = None,
    drop: Fraction = 0.1,
) -> tuple[Diffusion, Denoising]:
    """Flow matching on the straight path x_t = (1 - t) x_0 + t eps: E |F - (eps - x_0)|^2.

    Source: Lipman et al. 2023, arXiv:2210.02747; Liu et al. 2023, arXiv:2209.03003. Differs: t runs from data to noise.

    Args:
        data: what is modelled.
        network: the backbone.
        pairing: "independent", or "transport": by optimal transport within a batch.
        sampler: how samples are drawn.
        cond: what samples are asked for.
        drop: the share of examples whose condition is left out in training (Ho and Salimans 2022, arXiv:2207.12598).
    Raises: ValueError for transport with a condition that is no label.
    """
    if pairing == "transport" and cond and not isinstance(cond, Label):
        raise ValueError(
            f"pairing: transport makes pairs among data of one condition, and with {cond.name} each example has its "
            "own; use independent"
        )
    model = Diffusion(data, Straight(), network, "direction", sampler, cond, optional=bool(cond and drop))
    return model, Denoising(drop) if pairing == "independent" else Transported(drop)
