"""RANDAL's networks: trunks, actor-critic with two value heads, auxiliary heads, and curiosity's two networks.

A trunk is a class that is made with the observations' shape and has `dense_size`, the number of its features. Sizes:
N rows of a batch, A actions, D features.
"""

from __future__ import annotations

from torch import Tensor, nn

from gravitar_dqn.networks import (
    CONV_FEATURES,
    WIDTH,
    RamEncoder,
    channels_last,
    conv_trunk,
    dense_trunk,
    fp32_last,
    mlp,
    orthogonal_init,
    scale_pixels,
)


class NatureCNN(nn.Module):
    """The trunk for stacks of frames (Mnih 2015): (N, channels, 84, 84) uint8 -> (N, dense_size)."""

    def __init__(self, input_size: tuple[int, ...], dense_size: int = 512) -> None:
        super().__init__()
        self.dense_size = dense_size
        self.layers = nn.Sequential(conv_trunk(input_size[0]), nn.Linear(CONV_FEATURES, dense_size), nn.ReLU())
        orthogonal_init(self)
        channels_last(self)

    def forward(self, obs: Tensor) -> Tensor:
        """See the class."""
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
        """See the class."""
        features: Tensor = self.layers(scale_pixels(obs)).tanh()
        return features


class RamMLP(nn.Module):
    """The trunk for the console's RAM, DQN's own: (N, 2, 128) uint8 -> (N, dense_size)."""

    def __init__(self, input_size: tuple[int, ...]) -> None:
        super().__init__()
        self.dense_size = WIDTH
        self.layers = dense_trunk(input_size, RamEncoder(input_size))

    def forward(self, obs: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = self.layers(obs)
        return features


class PPOIntrinsic(nn.Module):
    """Policy and two values of one trunk: the score's, and the bonus's, each with a head of its own.

    Args:
        policy_model: the trunk's class.
        input_size: shape of an observation, (4, 84, 84) or (n,).
        action_size: number of actions.
        policy_args: further arguments of the trunk.
    """

    def __init__(
        self,
        policy_model: type[nn.Module],
        input_size: tuple[int, ...],
        action_size: int,
        **policy_args: object,
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
        """See the class."""
        return fp32_last(self.layers, features)


class PredictorCNN(nn.Module):
    """An RND network for single frames (N, 1, 84, 84), normalized floats -> (N, dense_size).

    The predictor is `trainable` and has two more layers than the target, which stays as it was made.
    """

    def __init__(self, input_size: tuple[int, ...], dense_size: int = 512, *, trainable: bool = True) -> None:
        super().__init__()
        self.dense_size = dense_size
        self.layers = nn.Sequential(
            conv_trunk(input_size[0], nn.LeakyReLU), nn.Linear(CONV_FEATURES, dense_size), _more(dense_size, trainable)
        )
        orthogonal_init(self)
        channels_last(self)
        self.requires_grad_(trainable)

    def forward(self, frames: Tensor) -> Tensor:
        """See the class."""
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
            _more(dense_size, trainable),
        )
        orthogonal_init(self)
        self.requires_grad_(trainable)

    def forward(self, obs: Tensor) -> Tensor:
        """See the class."""
        features: Tensor = self.layers(obs)
        return features


def _more(dense_size: int, trainable: bool) -> nn.Module:
    """The two layers that only the predictor has."""
    if not trainable:
        return nn.Identity()
    return nn.Sequential(nn.ReLU(), mlp(dense_size, dense_size, dense_size))


def make_actor_critic(input_size: tuple[int, ...], action_size: int) -> PPOIntrinsic:
    """The network of the presets, for stacks (4, 84, 84), RAM (2, 128) or vectors (n,)."""
    return PPOIntrinsic(network_classes(input_size)[0], input_size, action_size)


def network_classes(input_size: tuple[int, ...]) -> tuple[type[nn.Module], type[nn.Module]]:
    """The presets' classes of trunk and of curiosity's networks, for (4, 84, 84), RAM (2, 128) or vectors (n,)."""
    trunk = (MLP, RamMLP, NatureCNN)[len(input_size) - 1]
    return trunk, PredictorCNN if len(input_size) == 3 else PredictorMLP
