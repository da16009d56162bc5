"""Encoders: from observations as they are stored to features. Dividing by 255 is the network's own business.

A trunk is made with the shape of an observation and has `dense_size`, the number of its features.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV_FEATURES = 3136  # 64 channels of 7x7 after the three convolutions on 84x84
WIDTH = 512  # of hidden layers


def scale_pixels(obs: Tensor) -> Tensor:
    """uint8 -> float32 in [0, 1]; other types pass as float32."""
    return obs.float() / 255 if obs.dtype == torch.uint8 else obs.float()


BLOCK = 4  # the first convolution's stride
_WIDE = {1: torch.int32, 2: torch.int64, 4: torch.complex128}  # a type as wide as BLOCK pixels, by a pixel's bytes


def space_to_depth(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Blocks of 4x4 pixels as channels: (B, C, H, W) -> (B, 16 C, H / 4, W / 4) of type `dtype`, channels_last.

    Four neighbouring pixels travel as one wide number: that moves a quarter as many, which is several times faster.
    No gradient goes back through it.
    """
    batch, channels, height, width = x.shape
    runs = x.contiguous().view(_WIDE[x.element_size()])
    runs = runs.view(batch, channels, height // BLOCK, BLOCK, width // BLOCK).permute(0, 2, 4, 1, 3).contiguous()
    return runs.view(x.dtype).to(dtype).view(batch, height // BLOCK, width // BLOCK, -1).permute(0, 3, 1, 2)


class PixelConv2d(nn.Conv2d):
    """The first convolution, 8x8 with stride 4, on pictures whose sides 4 divides.

    It is computed as the same sum over 2x2 blocks of 4x4 pixels: a convolution of stride 1 over 16 times the channels,
    which suits the hardware better than 4 channels do. uint8 is taken as pixels / 255: the division is done on the few
    weights instead of the many pixels, and 0..255 are exact in bfloat16.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 2 * BLOCK, stride=BLOCK)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) uint8 or float -> (B, out_channels, H / 4 - 1, W / 4 - 1)."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
        weight = self.weight / 255 if x.dtype == torch.uint8 else self.weight
        blocks = weight.view(self.out_channels, self.in_channels, 2, BLOCK, 2, BLOCK).permute(0, 1, 3, 5, 2, 4)
        blocks = blocks.reshape(self.out_channels, -1, 2, 2).contiguous(memory_format=torch.channels_last)
        return F.conv2d(space_to_depth(x, dtype), blocks, self.bias)


class ScalePixels(nn.Module):
    """`scale_pixels` as a layer."""

    def forward(self, obs: Tensor) -> Tensor:
        """uint8 -> float32 in [0, 1]; other types pass as float32."""
        return scale_pixels(obs)


class FlattenLast(nn.Module):
    """(B, channels, height, width) -> (B, height * width * channels): no copy of a channels_last tensor."""

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).flatten(1)


def conv_trunk(channels: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """The convolutions of Mnih 2015: (B, channels, 84, 84), uint8 or scaled to taste -> (B, 3136)."""
    return nn.Sequential(
        PixelConv2d(channels, 32),
        activation(),
        nn.Conv2d(32, 64, 4, stride=2),
        activation(),
        nn.Conv2d(64, 64, 3, stride=1),
        activation(),
        FlattenLast(),
    )


class RamEncoder(nn.Module):
    """The console's RAM as numbers: (B, 2, 128) uint8, the step before and now -> (B, features).

    The bytes / 255, how they changed since the step before / 64, and their 1 024 bits: which of a byte's bits are
    flags and which are digits is the game's secret.

    Args:
        bits: whether to show the bits too.
        change: whether to show the change.
    """

    table: Tensor

    def __init__(self, obs_shape: tuple[int, ...], *, bits: bool = True, change: bool = True) -> None:
        super().__init__()
        self.bits, self.change = bits, change
        self.features = obs_shape[1] * (1 + change + 8 * bits)
        table = (torch.arange(256)[:, None] >> torch.arange(8)) & 1  # (256, 8)
        self.register_buffer("table", table.float(), persistent=False)

    def forward(self, obs: Tensor) -> Tensor:
        """As numbers between -4 and 4."""
        before, now = obs.float().unbind(1)
        parts = [now / 255]
        if self.change:
            parts.append((now - before) / 64)
        if self.bits:
            parts.append(F.embedding(obs[:, 1].int(), self.table).flatten(1))
        return torch.cat(parts, dim=1)


def mlp(*sizes: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Linear layers between `sizes`, the activation between them and none at the end."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def channels_last(network: nn.Module) -> None:
    """Lay convolution weights out for channels_last inputs, in place."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not isinstance(module, PixelConv2d):  # that one reorders them itself
            module.weight.data = module.weight.data.contiguous(memory_format=torch.channels_last)


def orthogonal_init(network: nn.Module, gain: float = math.sqrt(2)) -> None:
    """Orthogonal weights with this gain and zero biases, in place (Burda 2018)."""
    for module in network.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.orthogonal_(module.weight, gain)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def fp32_last(layers: nn.Sequential, x: Tensor) -> Tensor:
    """`layers` of x, the last one in fp32 also under autocast.

    Actions differ by far less than bfloat16 resolves next to a value of 5: their order would be lost.
    """
    hidden, last = layers[:-1], layers[-1]
    x = hidden(x)
    with torch.autocast(x.device.type, enabled=False):
        outputs: Tensor = last(x.float())
    return outputs


def dense_block(inputs: int, outputs: int, *, layer_norm: bool) -> list[nn.Module]:
    """Linear, LayerNorm (Gallici 2024: it keeps Q-learning from diverging) and ReLU."""
    return [nn.Linear(inputs, outputs), nn.LayerNorm(outputs) if layer_norm else nn.Identity(), nn.ReLU()]


def dense_trunk(obs_shape: tuple[int, ...], encoder: nn.Module | None, *, layer_norm: bool = True) -> nn.Sequential:
    """512 features of pictures, RAM (through its encoder) or vectors, orthogonally initialized: -> (B, 512)."""
    if len(obs_shape) == 3:
        layers = [conv_trunk(obs_shape[0]), *dense_block(CONV_FEATURES, WIDTH, layer_norm=layer_norm)]
    else:
        encoder = encoder or ScalePixels()
        inputs = int(getattr(encoder, "features", obs_shape[0]))
        layers = [encoder, *dense_block(inputs, WIDTH, layer_norm=layer_norm)]
        layers += dense_block(WIDTH, WIDTH, layer_norm=layer_norm)
    trunk = nn.Sequential(*layers)
    orthogonal_init(trunk)
    channels_last(trunk)
    return trunk


class NatureCNN(nn.Module):
    """The trunk for stacks of frames (Mnih 2015): (N, channels, 84, 84) uint8 -> (N, dense_size)."""

    def __init__(self, input_size: tuple[int, ...], dense_size: int = 512) -> None:
        super().__init__()
        self.dense_size = dense_size
        self.layers = nn.Sequential(conv_trunk(input_size[0]), nn.Linear(CONV_FEATURES, dense_size), nn.ReLU())
        orthogonal_init(self)
        channels_last(self)

    def forward(self, obs: Tensor) -> Tensor:
        features: Tensor = self.layers(obs)
        return features


class MLP(nn.Module):
    """The trunk for vectors: (N, inputs) -> (N, dense_size)."""

    def __init__(self, input_size: tuple[int, ...], dense_size: int = 64) -> None:
        super().__init__()
        self.dense_size = dense_size
        self.layers = mlp(input_size[0], dense_size, dense_size, dense_size, activation=nn.Tanh)
        orthogonal_init(self)

    def forward(self, obs: Tensor) -> Tensor:
        features: Tensor = self.layers(scale_pixels(obs)).tanh()
        return features


class RamMLP(nn.Module):
    """The trunk for the console's RAM, DQN's own: (N, 2, 128) uint8 -> (N, dense_size)."""

    def __init__(self, input_size: tuple[int, ...]) -> None:
        super().__init__()
        self.dense_size = WIDTH
        self.layers = dense_trunk(input_size, RamEncoder(input_size))

    def forward(self, obs: Tensor) -> Tensor:
        features: Tensor = self.layers(obs)
        return features
