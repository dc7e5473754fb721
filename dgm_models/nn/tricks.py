"""Parts that steady a game: spectral norm, statistics of a minibatch, virtual batch normalisation."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm


def couples(module: nn.Module) -> bool:
    """Whether an output of the module in training depends on the other examples of its batch.

    True for modules that hold batch normalisation, `MinibatchStd` or `MinibatchDiscrimination`. The sum of such a
    loss over micro-batches is not its sum over the batch (`Objective.additive` is False), and on several ranks the
    statistics are those of a rank's share.
    """
    return any(isinstance(part, (_BatchNorm, MinibatchStd, MinibatchDiscrimination)) for part in module.modules())


def spectral(module: nn.Module) -> nn.Module:
    """Divides the weight of every Linear and convolution of `module` by its largest singular value, in place.

    A kernel counts as the matrix [out channels, the rest], which is not the norm of the convolution as an operator.
    Every forward pass in training takes one power iteration; u and v are buffers and stay as they are in eval mode.
    Returns: the module.
    Raises: ValueError when it holds no such layer.
    Source: Miyato et al. 2018, algorithm 1, arXiv:1802.05957. Differs: 15 power iterations at the start.
    """
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    layers = [part for part in module.modules() if isinstance(part, kinds)]
    if not layers:
        raise ValueError(
            "spectral norm: the network has no Linear or convolution whose weight could be divided (stylegan2 scales "
            "its weights itself); switch it off or take another network.name"
        )
    for layer in layers:
        if not parametrize.is_parametrized(layer, "weight"):
            spectral_norm(layer)
    return module


class MinibatchDiscrimination(nn.Module):
    """Appends o_b(x_i) = sum_j exp(-|M_ib - M_jb|_1) to the features f(x_i), M_i = f(x_i) T.

    The sum runs over the batch, the example itself included.
    Source: Salimans et al. 2016, section 3.2, arXiv:1606.03498. Differs: T ~ N(0, 0.05^2), no weight normalisation.

    Args:
        in_dim: of the features.
        kernels: how many o_b there are.
        dim: of the rows of M between which the distance is taken.
    """

    def __init__(self, in_dim: int, kernels: int, dim: int) -> None:
        super().__init__()
        self.kernels = kernels
        self.out_dim = in_dim + kernels
        self.weight = nn.Parameter(torch.randn(in_dim, kernels * dim) * 0.05)

    def forward(self, features: Tensor) -> Tensor:
        """[B, in_dim] -> [B, in_dim + kernels]."""
        rows = (features @ self.weight).reshape(len(features), self.kernels, -1).transpose(0, 1)  # [kernels, B, dim]
        # torch.cdist cannot be differentiated twice, which a gradient penalty needs
        distance = (rows[:, :, None] - rows[:, None]).abs().sum(3)  # [kernels, B, B]
        return torch.cat([features, (-distance).exp().sum(2).T], 1)


class MinibatchStd(nn.Module):
    """Appends one channel: the standard deviation within the example's group, averaged over all features.

    Example i is in group i modulo B // group, so that groups have `group` members, or a few more
    where B is no multiple.
    Source: Karras et al. 2018, section 3, arXiv:1710.10196, with the groups of Karras et al. 2020, arXiv:1912.04958.

    Args:
        group: members of a group; a smaller batch is one group.
    """

    def __init__(self, group: int = 4) -> None:
        super().__init__()
        self.group = group

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, ...] -> [B, C + 1, ...]."""
        flat = x.flatten(1)
        groups = max(1, len(x) // self.group)
        member = torch.arange(len(x), device=x.device) % groups
        mean_of = torch.zeros(groups, len(x), dtype=x.dtype, device=x.device)  # a mean of rows as a product
        mean_of[member, torch.arange(len(x), device=x.device)] = 1.0
        mean_of /= mean_of.sum(1, keepdim=True)
        variance = mean_of @ (flat - (mean_of @ flat)[member]).square()
        std = (variance + 1e-8).sqrt().mean(1)[member]
        return torch.cat([x, std.reshape(-1, *[1] * (x.ndim - 1)).expand(-1, 1, *x.shape[2:])], 1)


class VirtualBatchNorm(nn.Module):
    """Normalises an example by the moments of a reference batch and of the example itself.

    An example has the weight 1 / (rows + 1) in its moments. The reference comes as the first `rows` of the input, is
    normalised by its own moments, and goes on to the next layer: see `VirtualBatch`.

    Args:
        norm: a batch normalisation, whose scale, shift and eps are taken over.
        rows: of the reference batch.
    """

    def __init__(self, norm: _BatchNorm, rows: int) -> None:
        super().__init__()
        self.rows, self.eps = rows, norm.eps
        self.weight, self.bias = norm.weight, norm.bias

    def forward(self, h: Tensor) -> Tensor:
        """[rows + B, C, ...] -> the same shape."""
        places = h.flatten(2) if h.ndim > 2 else h[:, :, None]  # [rows + B, C, L]
        reference = places[: self.rows]
        mean = reference.mean((0, 2), keepdim=True)
        variance = (reference - mean).square().mean((0, 2), keepdim=True)
        own = places[self.rows :]
        own_mean = own.mean(2, keepdim=True)
        own_variance = (own - own_mean).square().mean(2, keepdim=True)
        share = 1 / (self.rows + 1)
        joint = mean + share * (own_mean - mean)
        # the variance of a mixture: no difference of squares, which would cancel
        among, within = variance + (mean - joint).square(), own_variance + (own_mean - joint).square()
        spread = (1 - share) * among + share * within
        out = torch.cat(
            [(reference - mean) * (variance + self.eps).rsqrt(), (own - joint) * (spread + self.eps).rsqrt()]
        ).reshape(h.shape)
        if self.weight is None:
            return out
        shape = (1, -1, *[1] * (h.ndim - 2))
        return out * self.weight.reshape(shape) + self.bias.reshape(shape)


class VirtualBatch(nn.Module):
    """A network whose batch normalisations use a fixed reference batch: its outputs depend on one example each.

    The reference passes through the network with every batch. It is a buffer: standard normal until `fill` is called.
    Source: Salimans et al. 2016, section 3.5, arXiv:1606.03498.

    Args:
        network: [B, *shape] -> [B, ...] with batch normalisation, which is replaced in place.
        shape: of one input.
        rows: of the reference batch.
    Raises: ValueError when nothing is to be replaced, or another part couples the examples of a batch.
    """

    reference: Tensor

    def __init__(self, network: nn.Module, shape: tuple[int, ...], rows: int) -> None:
        super().__init__()
        replaced = 0
        for parent in list(network.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, _BatchNorm):
                    setattr(parent, name, VirtualBatchNorm(child, rows))
                    replaced += 1
        if not replaced:
            raise ValueError(
                "virtual batch normalisation: the network has no batch normalisation to replace; take a network.name "
                "and norm that have it, such as dcgan, or switch it off"
            )
        if couples(network):
            raise ValueError(
                "virtual batch normalisation: the network also has minibatch statistics, in which the reference "
                "would take part; switch one of them off"
            )
        self.network, self.rows = network, rows
        self.register_buffer("reference", torch.randn(rows, *shape))

    @torch.no_grad()
    def fill(self, batch: Tensor) -> None:
        """Takes the first rows of `batch` [N, *shape] as the reference, again from the start where N is too small.

        For `Objective.initialize`, which sees the same batch on every rank.
        """
        self.reference.copy_(batch[torch.arange(self.rows, device=batch.device) % len(batch)])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.network(torch.cat([self.reference.to(x.dtype), x]))
        return out[self.rows :]
