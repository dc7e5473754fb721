"""The U-Net of diffusion models: residual blocks at falling sizes and back, each with a path past all below it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dgm_models.construct import Fraction, Positive
from dgm_models.nn.attention import Attention
from dgm_models.nn.backbones import Backbone, sides, zeroed


@dataclass(frozen=True)
class UNet(Backbone):
    """Stages of residual blocks, half the height and width from one to the next, and back up.

    An odd side is rounded up: 7 becomes 4, and 4 becomes 7 on the way back.

    Source: Ho et al. 2020, appendix B, arXiv:2006.11239; `scale_shift` and `head_dim`: Dhariwal and Nichol 2021,
    section 3, arXiv:2105.05233. Differs: weights begin as torch's layers have them but for the last ones of each
    residual part and of the network, which begin at 0. With the same weights it is diffusers' UNet2DModel.

    Args:
        channels: of the first stage.
        multipliers: of `channels`, one for each stage.
        blocks: residual blocks of a stage on the way down; one more on the way up.
        attention: heights at which every block is followed by attention, such as [16]; the middle always has it.
        head_dim: coordinates of an attention head; stages with fewer channels have one head.
        groups: into which a normalisation divides channels, at most; each has at least 4. In a group of one channel the
            normalisation would take away what the embedding adds.
        scale_shift: the embedding scales and shifts what is normalised, rather than being added before it is.
        dropout: the share of a block's inner values that training leaves out.
    """

    name: ClassVar[str] = "unet"
    channels: Positive = 64
    multipliers: tuple[Positive, ...] = (1, 2, 2)
    blocks: Positive = 2
    attention: tuple[Positive, ...] = ()
    head_dim: Positive = 64
    groups: Positive = 32
    scale_shift: bool = False
    dropout: Fraction = 0.0

    def __post_init__(self) -> None:
        if not self.multipliers:
            raise ValueError("multipliers: empty; give one for each stage, such as [1, 2, 2]")

    @property
    def embed_dim(self) -> int:
        return 4 * self.channels

    @property
    def waves(self) -> int:
        return self.channels

    def heads(self, width: int) -> int:
        return max(1, width // self.head_dim)

    def norm(self, width: int) -> nn.Module:
        most = max(1, min(self.groups, width // 4))
        return nn.GroupNorm(max(groups for groups in range(1, most + 1) if width % groups == 0), width)

    def build(self, shape: tuple[int, ...], out_shape: tuple[int, ...], tokens: bool = False) -> nn.Module:
        return _UNet(self, sides(shape, self.name), out_shape[0], self.embed_dim if tokens else 0)


class _UNet(nn.Module):
    def __init__(self, settings: UNet, shape: tuple[int, int, int], out_channels: int, tokens_dim: int) -> None:
        super().__init__()
        heights = [shape[1]]
        for _ in settings.multipliers[1:]:
            heights.append(-(-heights[-1] // 2))
        for height in settings.attention:
            if height not in heights:
                known = ", ".join(map(str, heights))
                raise ValueError(f"network.attention: {height} is the height of no stage; the stages' are {known}")
        widths = [settings.channels * multiplier for multiplier in settings.multipliers]

        def layer(width: int, out_width: int, height: int | None) -> _Layer:
            attends = height is None or height in settings.attention
            return _Layer(settings, width, out_width, attends, tokens_dim)

        width = settings.channels
        self.first = nn.Conv2d(shape[0], width, 3, padding=1)
        self.down, self.up, kept = nn.ModuleList(), nn.ModuleList(), [width]
        for stage, out_width in enumerate(widths):
            if stage:
                self.down.append(_Down(width))
                kept.append(width)
            for _ in range(settings.blocks):
                self.down.append(layer(width, out_width, heights[stage]))
                width = out_width
                kept.append(width)
        self.middle = nn.ModuleList([layer(width, width, None), _Layer(settings, width, width, False, 0)])
        for stage, out_width in reversed(list(enumerate(widths))):
            for _ in range(settings.blocks + 1):
                self.up.append(layer(width + kept.pop(), out_width, heights[stage]))
                width = out_width
            if stage:
                self.up.append(_Up(width))
        self.norm = settings.norm(width)
        self.last = zeroed(nn.Conv2d(width, out_channels, 3, padding=1))

    def forward(self, x: Tensor, embedding: Tensor, tokens: Tensor | None) -> Tensor:
        told = F.silu(embedding)
        h = self.first(x).contiguous(memory_format=torch.channels_last)  # which the convolutions compute in
        kept = [h]
        for part in self.down:
            h = part(h) if isinstance(part, _Down) else part(h, told, tokens)
            kept.append(h)
        for part in self.middle:
            h = part(h, told, tokens)
        for part in self.up:
            h = part(h, kept[-1]) if isinstance(part, _Up) else part(torch.cat([h, kept.pop()], 1), told, tokens)
        found: Tensor = self.last(F.silu(self.norm(h)))
        return found


class _Layer(nn.Module):
    """A residual block, with attention behind it or not."""

    def __init__(self, settings: UNet, width: int, out_width: int, attends: bool, tokens_dim: int) -> None:
        super().__init__()
        self.scale_shift = settings.scale_shift
        self.norm_in = settings.norm(width)
        self.conv_in = nn.Conv2d(width, out_width, 3, padding=1)
        self.told = nn.Linear(settings.embed_dim, out_width * (1 + settings.scale_shift))
        self.norm_out = settings.norm(out_width)
        self.drop = nn.Dropout(settings.dropout)
        self.conv_out = zeroed(nn.Conv2d(out_width, out_width, 3, padding=1))
        self.past = nn.Conv2d(width, out_width, 1) if width != out_width else nn.Identity()
        self.attention_norm = settings.norm(out_width) if attends else None
        self.attention = Attention(out_width, settings.heads(out_width), tokens_dim) if attends else None
        if self.attention is not None:
            zeroed(self.attention.outward)

    def forward(self, x: Tensor, told: Tensor, tokens: Tensor | None) -> Tensor:
        """[B, out_width, H, W] from x [B, width, H, W], told [B, embed_dim] and tokens [B, T, embed_dim] or None."""
        h: Tensor = self.conv_in(F.silu(self.norm_in(x)))
        said = self.told(told)[:, :, None, None]
        if self.scale_shift:
            scale, shift = said.chunk(2, 1)
            h = self.norm_out(h) * (1 + scale) + shift
        else:
            h = self.norm_out(h + said)
        h = self.past(x) + self.conv_out(self.drop(F.silu(h)))
        if self.attention is None or self.attention_norm is None:
            return h
        places = self.attention_norm(h).flatten(2).transpose(1, 2)  # [B, H W, C]
        attended: Tensor = self.attention(places, tokens).transpose(1, 2).unflatten(2, h.shape[2:])
        return h + attended


class _Down(nn.Module):
    """Half the height and width, rounded up."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return out


class _Up(nn.Module):
    """The height and width of another one, each place the nearest, and a convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, like: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, like.shape[2:]))
        return out
