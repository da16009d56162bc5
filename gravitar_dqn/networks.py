"""Networks: an encoder's features and the heads on them, for pictures (4, 84, 84), RAM (2, 128) or vectors (n,).

Sizes: N rows of a batch, A actions, D features.
"""

from __future__ import annotations

import math

from torch import Tensor, nn

from gravitar_dqn.config import DQNSettings
from gravitar_dqn.encoders import (
    CONV_FEATURES,
    MLP,
    WIDTH,
    NatureCNN,
    RamEncoder,
    RamMLP,
    channels_last,
    conv_trunk,
    dense_trunk,
    fp32_last,
    mlp,
    orthogonal_init,
    scale_pixels,
)
from gravitar_dqn.envs.spec import EnvSpec


class QNetwork(nn.Module):
    """MLP for vector observations: (B, inputs) -> (B, num_actions)."""

    def __init__(self, inputs: int, num_actions: int) -> None:
        super().__init__()
        self.layers = mlp(inputs, 128, 256, 128, num_actions)

    def forward(self, obs: Tensor) -> Tensor:
        """Q values (B, num_actions) of obs (B, inputs)."""
        return fp32_last(self.layers, scale_pixels(obs).flatten(1))


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


class DuelingQNetwork(nn.Module):
    """Q = V + A - mean(A) (Wang 2016), one linear layer each, of a trunk with 512 features."""

    def __init__(self, trunk: nn.Sequential, num_actions: int) -> None:
        super().__init__()
        self.trunk = trunk
        self.value = nn.Sequential(nn.Linear(WIDTH, 1))
        self.advantage = nn.Sequential(nn.Linear(WIDTH, num_actions))
        orthogonal_init(self.value, gain=1.0)
        orthogonal_init(self.advantage, gain=0.01)  # at first no action looks better than another

    def forward(self, obs: Tensor) -> Tensor:
        """Q values (B, num_actions), fp32, of obs (B, *obs_shape)."""
        features = self.trunk(obs)
        advantages = fp32_last(self.advantage, features)
        return fp32_last(self.value, features) + advantages - advantages.mean(dim=1, keepdim=True)


def make_q_network(spec: EnvSpec, settings: DQNSettings) -> nn.Module:
    """The Q network that the settings ask for."""
    shape, picture = spec.obs_shape, spec.kind == "picture"
    if settings.network == "notebook":
        if picture:
            return DuelingConvQNetwork(shape[0], spec.num_actions)
        return QNetwork(math.prod(shape), spec.num_actions)
    encoder = RamEncoder(shape, bits=settings.ram_bits, change=settings.ram_change) if spec.kind == "ram" else None
    trunk = dense_trunk(shape, encoder, layer_norm=settings.network == "layer_norm")
    return DuelingQNetwork(trunk, spec.num_actions)


# ---------------------------------------------------------------- actor-critic and its tasks


class ActorCritic(nn.Module):
    """Policy and two values of one trunk: the score's, and the bonus's, each with a head of its own.

    Args:
        policy_model: the trunk's class.
        input_size: shape of an observation, (4, 84, 84) or (n,).
        action_size: number of actions.
        policy_args: further arguments of the trunk.
    """

    def __init__(
        self, policy_model: type[nn.Module], input_size: tuple[int, ...], action_size: int, **policy_args: object
    ) -> None:
        super().__init__()
        self.trunk = policy_model(input_size, **policy_args)
        self.dense_size = int(self.trunk.dense_size)  # type: ignore[arg-type]
        self.policy = nn.Sequential(nn.Linear(self.dense_size, action_size))
        self.value_ext = nn.Sequential(nn.Linear(self.dense_size, 1))
        self.value_int = nn.Sequential(nn.Linear(self.dense_size, 1))
        orthogonal_init(self.policy, gain=0.01)  # the first policy is nearly uniform
        orthogonal_init(self.value_ext, gain=1.0)
        orthogonal_init(self.value_int, gain=1.0)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, A), values of the score (N,) and of the bonus (N,), fp32, of obs (N, *input_size)."""
        return self.heads(self.trunk(obs))

    def heads(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of a trunk's features (N, D)."""
        value_ext, value_int = (fp32_last(head, features).squeeze(1) for head in (self.value_ext, self.value_int))
        return fp32_last(self.policy, features), value_ext, value_int


class PixelControl(nn.Module):
    """Q values of changing each cell of 4x4 pixels (Jaderberg 2016), dueling: features (N, D) -> (N, A, 21, 21)."""

    def __init__(self, dense_size: int, action_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(dense_size, 32 * 8 * 8)
        self.deconv = nn.ConvTranspose2d(32, 32, 3)
        self.advantage = nn.ConvTranspose2d(32, action_size, 3, stride=2)
        self.value = nn.ConvTranspose2d(32, 1, 3, stride=2)
        orthogonal_init(self)

    def forward(self, features: Tensor) -> Tensor:
        """Q = V + A - mean(A) in every cell."""
        x = self.dense(features).relu().view(-1, 32, 8, 8)
        x = self.deconv(x).relu()  # (N, 32, 10, 10)
        advantages, value = self.advantage(x).float(), self.value(x).float()
        q_values: Tensor = value + advantages - advantages.mean(dim=1, keepdim=True)
        return q_values


class RewardPrediction(nn.Module):
    """Will the next reward be zero, positive or negative? Features (N, D) -> logits (N, 3)."""

    def __init__(self, dense_size: int) -> None:
        super().__init__()
        self.layers = mlp(dense_size, 128, 3)
        orthogonal_init(self)

    def forward(self, features: Tensor) -> Tensor:
        return fp32_last(self.layers, features)


# ---------------------------------------------------------------- curiosity


class PredictorCNN(nn.Module):
    """An RND network for single frames (N, 1, 84, 84), normalized floats -> (N, dense_size).

    The predictor is `trainable` and has two more layers than the target, which stays as it was made.
    """

    def __init__(self, input_size: tuple[int, ...], dense_size: int = 512, *, trainable: bool = True) -> None:
        super().__init__()
        self.dense_size = dense_size
        self.layers = nn.Sequential(
            conv_trunk(input_size[0], nn.LeakyReLU),
            nn.Linear(CONV_FEATURES, dense_size),
            _further_layers(dense_size, trainable),
        )
        orthogonal_init(self)
        channels_last(self)
        self.requires_grad_(trainable)

    def forward(self, frames: Tensor) -> Tensor:
        features: Tensor = self.layers(frames)
        return features


class PredictorMLP(nn.Module):
    """An RND network for vectors (N, inputs), normalized floats -> (N, dense_size); see `PredictorCNN`."""

    def __init__(self, input_size: tuple[int, ...], dense_size: int = 64, *, trainable: bool = True) -> None:
        super().__init__()
        self.dense_size = dense_size
        self.layers = nn.Sequential(
            nn.Linear(input_size[0], dense_size),
            nn.LeakyReLU(),
            nn.Linear(dense_size, dense_size),
            nn.LeakyReLU(),
            nn.Linear(dense_size, dense_size),
            _further_layers(dense_size, trainable),
        )
        orthogonal_init(self)
        self.requires_grad_(trainable)

    def forward(self, obs: Tensor) -> Tensor:
        features: Tensor = self.layers(obs)
        return features


def _further_layers(dense_size: int, trainable: bool) -> nn.Module:
    """The two layers that only the predictor has."""
    if not trainable:
        return nn.Identity()
    return nn.Sequential(nn.ReLU(), mlp(dense_size, dense_size, dense_size))


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


TRUNKS: dict[str, type[nn.Module]] = {"picture": NatureCNN, "ram": RamMLP, "vector": MLP}


def make_actor_critic(spec: EnvSpec) -> ActorCritic:
    """The network of PPO's presets."""
    return ActorCritic(TRUNKS[spec.kind], spec.obs_shape, spec.num_actions)


def predictor_class(spec: EnvSpec) -> type[nn.Module]:
    """The class of curiosity's two networks."""
    return PredictorCNN if spec.kind == "picture" else PredictorMLP
