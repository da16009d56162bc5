"""Networks: uint8 observations go in as they are; dividing by 255 is the network's own business.

`conv_trunk` and `mlp` are shared by the Q networks, by curiosity and by RANDAL.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONV_FEATURES = 3136  # 64 channels of 7x7 after the three convolutions on 84x84


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


class FlattenLast(nn.Module):
    """(B, channels, height, width) -> (B, height * width * channels): no copy of a channels_last tensor."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
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


class QNetwork(nn.Module):
    """MLP for vector observations: (B, inputs) -> (B, num_actions)."""

    def __init__(self, inputs: int, num_actions: int) -> None:
        super().__init__()
        self.layers = mlp(inputs, 128, 256, 128, num_actions)

    def forward(self, obs: Tensor) -> Tensor:
        """Q values (B, num_actions) of obs (B, inputs)."""
        return fp32_last(self.layers, scale_pixels(obs))


class DuelingConvQNetwork(nn.Module):
    """Dueling network (Wang 2016) for stacks of frames: Q = V + A - mean(A)."""

    def __init__(self, channels: int, num_actions: int) -> None:
        super().__init__()
        self.trunk = conv_trunk(channels)
        self.advantage = mlp(CONV_FEATURES, 512, 512, num_actions)
        self.value = mlp(CONV_FEATURES, 512, 1)
        channels_last(self)

    def forward(self, obs: Tensor) -> Tensor:
        """Q values (B, num_actions) of obs (B, channels, 84, 84) uint8."""
        features = self.trunk(obs)
        advantages = fp32_last(self.advantage, features)
        return fp32_last(self.value, features) + advantages - advantages.mean(dim=1, keepdim=True)


class IntrinsicNetwork(nn.Module):
    """An RND network: features (B, 512). The frozen target ends in linear and ReLU; the predictor has two more layers.

    It does not scale its input: what it sees is the business of `rnd.py`.
    """

    def __init__(self, obs_shape: tuple[int, ...], *, predictor: bool) -> None:
        super().__init__()
        image = len(obs_shape) == 3
        head: list[nn.Module] = [nn.Linear(CONV_FEATURES if image else obs_shape[0], 512), nn.ReLU()]
        if predictor:
            head += [nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 512)]
        self.layers = nn.Sequential(conv_trunk(obs_shape[0]) if image else nn.Identity(), *head)
        orthogonal_init(self)
        if image:
            channels_last(self)
        self.requires_grad_(predictor)

    def forward(self, obs: Tensor) -> Tensor:
        """Features (B, 512) of float observations (B, *obs_shape)."""
        features: Tensor = self.layers(obs)
        return features


def stack_size(frame_shape: tuple[int, ...]) -> int:
    """Frames in an observation: four for images (84, 84), one for vectors (n,)."""
    return 4 if len(frame_shape) == 2 else 1


def make_q_network(obs_shape: tuple[int, ...], num_actions: int) -> nn.Module:
    """The Q network for stacks (channels, 84, 84) or for vectors (inputs,)."""
    if len(obs_shape) == 3:
        return DuelingConvQNetwork(obs_shape[0], num_actions)
    return QNetwork(obs_shape[0], num_actions)
