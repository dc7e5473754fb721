"""Networks between images and grids of fewer pixels."""

from __future__ import annotations

from torch import Tensor, nn


def halved(shape: tuple[int, ...], halvings: int) -> tuple[int, int]:
    """The height and width of an image [C, H, W] after so many halvings. Raises ValueError when they do not divide."""
    _, height, width = shape
    most = 0
    while height % 2 ** (most + 1) == 0 and width % 2 ** (most + 1) == 0:
        most += 1
    if halvings > most:
        raise ValueError(f"{halvings} halvings do not divide {height} x {width}; use at most {most}")
    return height // 2**halvings, width // 2**halvings


class Residual(nn.Module):
    """x + conv1x1(relu(conv3x3(relu(x))))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, 1, 1), nn.ReLU(), nn.Conv2d(width, width, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


def grid_down(channels: int, width: int, halvings: int, blocks: int, out: int) -> nn.Module:
    """[B, channels, H, W] -> [B, out, H / 2^halvings, W / 2^halvings]."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1)]
    for _ in range(halvings):
        layers += [nn.ReLU(), nn.Conv2d(width, width, 4, 2, 1)]
    return nn.Sequential(*layers, *(Residual(width) for _ in range(blocks)), nn.ReLU(), nn.Conv2d(width, out, 1))


def grid_up(channels: int, width: int, doublings: int, blocks: int, out: int) -> nn.Module:
    """[B, channels, h, w] -> [B, out, h * 2^doublings, w * 2^doublings]."""
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1), *(Residual(width) for _ in range(blocks))]
    for _ in range(doublings):
        layers += [nn.ReLU(), nn.ConvTranspose2d(width, width, 4, 2, 1)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(width, out, 3, 1, 1))
