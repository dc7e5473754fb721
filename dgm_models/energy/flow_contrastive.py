"""Flow contrastive estimation: the noise of noise contrastive estimation is a flow that learns to be hard to tell."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import field, fields, make_dataclass
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from dgm_models import registry
from dgm_models.construct import Choice, NonNegative, Positive, PositiveFloat
from dgm_models.nn.conditioner import check
from dgm_models.nn.flow import Flow
from dgm_models.nn.networks import Mlp, Network
from dgm_models.nn.self_normalised import SelfNormalised, contrast
from dgm_models.objective import Loss, Objective, Turn
from dgm_models.ops.mcmc import Langevin
from dgm_models.protocols import Batch, DataSpec, Model

FLOWS = ("flows/real_nvp", "flows/nice", "flows/glow", "flows/neural_spline")  # their inverses can be differentiated


class AnyFlow(Choice):
    """A method of the flows family by its name in the registry, with that method's parameters."""

    @classmethod
    def choices(cls) -> Mapping[str, type]:
        return {name: section(name) for name in FLOWS}

    def build(self, data: DataSpec) -> tuple[Flow, Objective]:
        """The flow and its own objective.

        Raises: ValueError where it has no density of its own or asks for a condition.
        """
        params = {each.name: getattr(self, each.name) for each in fields(self)}  # type: ignore[arg-type]
        flow, objective = registry.builder(self.name)(data, **params)
        if not isinstance(flow, Flow):
            raise ValueError("flow.dequantization: 'variational' gives a bound, and a density is needed; use uniform")
        if flow.condition:
            raise ValueError(f"flow.cond: {flow.condition.name!r}; the energy has no condition; leave it out")
        return flow, objective


@functools.cache
def section(name: str) -> type[AnyFlow]:
    """A dataclass whose fields are the parameters of a registered flow."""
    function = registry.builder(name)
    hints = get_type_hints(function, include_extras=True)
    told = [
        (parameter.name, hints[parameter.name], field(default=parameter.default))
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name != "data"
    ]
    return make_dataclass(name.split("/")[1], told, bases=(AnyFlow,), frozen=True, namespace={"name": name})


class EnergyAndFlow(Model):
    """Two models of one density: an energy with a learned log Z, and a flow.

    `energy` and `log_prob` are the energy's, samples the flow's.

    Args:
        energy: p.
        flow: q, in whose model space both live.
    """

    estimated = True

    def __init__(self, energy: SelfNormalised, flow: Flow) -> None:
        super().__init__(flow.data, flow.codec)
        self.normalised, self.flow = energy, flow

    def players(self) -> dict[str, nn.Module]:
        return {"energy": self.normalised, "flow": self.flow}

    @property
    def sampling(self) -> Any:
        """The settings of the flow's sampler."""
        return self.flow.sampling

    @sampling.setter
    def sampling(self, settings: Any) -> None:
        self.flow.sampling = settings

    def energy(self, x: Tensor) -> Tensor:
        return self.normalised.energy(x)

    def log_prob(self, x: Tensor, cond: Tensor | None = None) -> Tensor:
        """[B] nats in model space, as far as log Z has been learned."""
        return self.normalised.log_prob(x, cond)

    def sample(self, n: int, rng: torch.Generator, cond: Tensor | None = None) -> Tensor:
        check(self.condition, cond)
        x = self.flow.sample(n, rng)
        self.evaluations = self.flow.evaluations
        return x

    def rsample(self, batch: Batch) -> Tensor:
        """[B, *event] from the flow by the examples' keys, with gradients for its parameters."""
        shape = self.flow.latent_shape
        z = batch.uniform("latent", shape).logit() if self.flow.base == "logistic" else batch.normal("latent", shape)
        return self.flow.transform.inverse(z.to(batch.x.dtype), None)


class FlowContrastive(Objective):
    """V = E_data log P(data|x) + E_q log P(noise|x), log-odds log p - log q: the energy raises V, the flow lowers it.

    At the best energy V is 2 JSD(data, q) - log 4; at the solution p and q are the data's density. The energy learns
    nothing where neither data nor the flow's draws lie, and may have mass there: a flow that is wide at first and
    narrows with the energy leaves fewer such places than one that `pretrain` steps of maximum likelihood have fitted.

    Source: Gao et al. 2020, Flow Contrastive Estimation of Energy-Based Models, arXiv:1912.00589. Differs: the energy
    takes a fixed number of updates for one of the flow, where the paper goes by the classifier's accuracy.

    Args:
        likelihood: the flow's own objective, by which its data-dependent weights are initialised.
        energy_steps: updates of the energy for one of the flow, each on a batch of its own when above 1.
        pretrain: steps.
    """

    left: Tensor

    def __init__(self, likelihood: Objective, energy_steps: int = 1, pretrain: int = 0) -> None:
        super().__init__()
        self.likelihood, self.energy_steps = likelihood, energy_steps
        self.register_buffer("left", torch.tensor(pretrain))

    def turns(self) -> Sequence[Turn]:
        several = self.energy_steps > 1
        return Turn("energy", self.energy_turn, self.energy_steps, fresh=several), Turn("flow", self.flow_turn)

    def initialize(self, model: EnergyAndFlow, batch: Batch) -> None:
        self.likelihood.initialize(model.flow, batch)

    def advance(self, model: EnergyAndFlow, step: int) -> None:
        self.left.sub_(1).clamp_min_(0)

    def value(self, model: EnergyAndFlow, batch: Batch) -> tuple[Loss, Tensor]:
        """-V, and the flow's negative log-likelihood of the data; sums in nats."""
        x = torch.cat([batch.x, model.rsample(batch)])
        log_q = model.flow.log_prob(x)
        log_odds, rows = model.log_prob(x) - log_q, len(batch)
        return contrast(log_odds[:rows], log_odds[rows:]), -log_q[:rows].sum()

    def energy_turn(self, model: EnergyAndFlow, batch: Batch) -> Loss:
        return self.value(model, batch)[0]

    def flow_turn(self, model: EnergyAndFlow, batch: Batch) -> Loss:
        loss, nll = self.value(model, batch)
        return Loss(torch.where(self.left > 0, nll, -loss.total), {"nll": nll.detach()})


def flow_contrastive(
    data: DataSpec,
    network: Network = Mlp(activation="silu"),
    flow: AnyFlow = section("flows/real_nvp")(),
    energy_steps: Positive = 1,
    pretrain: NonNegative = 0,
    log_z_rate: PositiveFloat = 10.0,
    spread: PositiveFloat = 1.0,
) -> tuple[EnergyAndFlow, FlowContrastive]:
    """An energy and a flow that teach each other; levels are dequantised into the flow's space.

    Source: Gao et al. 2020, Flow Contrastive Estimation of Energy-Based Models, arXiv:1912.00589.

    Args:
        data: what is modelled.
        network: gives the energy.
        flow: the other player, a method of the flows family with its parameters: {name: flows/real_nvp, layers: 8}.
        energy_steps: updates of the energy for one of the flow.
        pretrain: steps in which the flow is trained by maximum likelihood, the energy as always.
        log_z_rate: what the learning rate is multiplied by for log Z.
        spread: the standard deviation of the Gaussian in front of which the energy's network stands, in model space.
    """
    energy = SelfNormalised(data, network, Langevin(), spread, log_z_rate)
    other, likelihood = flow.build(data)
    energy.codec = other.codec
    return EnergyAndFlow(energy, other), FlowContrastive(likelihood, energy_steps, pretrain)
