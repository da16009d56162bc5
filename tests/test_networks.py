"""Shapes, parameters and equations of the specified networks."""

import numpy as np
import pytest
import torch
from probes import spec_of_shape
from torch import nn

from gravitar_dqn.config import DQNSettings
from gravitar_dqn.encoders import RamEncoder, scale_pixels
from gravitar_dqn.networks import DuelingConvQNetwork, DuelingQNetwork, IntrinsicNetwork, QNetwork, make_q_network


def layers_of(network: nn.Module) -> list[tuple[int, ...]]:
    """Weight shapes of all layers, in order."""
    return [tuple(m.weight.shape) for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]


CONVOLUTIONS = [(32, 4, 8, 8), (64, 32, 4, 4), (64, 64, 3, 3)]


def test_dueling_network_is_as_specified() -> None:
    network = DuelingConvQNetwork(4, 18)
    assert layers_of(network) == [*CONVOLUTIONS, (512, 3136), (512, 512), (18, 512), (512, 3136), (1, 512)]
    assert [m.stride for m in network.modules() if isinstance(m, nn.Conv2d)] == [(4, 4), (2, 2), (1, 1)]


def test_dueling_is_value_plus_centred_advantage() -> None:
    network = DuelingConvQNetwork(4, 18)
    obs = torch.randint(0, 256, (3, 4, 84, 84), dtype=torch.uint8)
    features = network.trunk(obs.float() / 255)
    value, advantage = network.value(features), network.advantage(features)
    q_values = network(obs)
    torch.testing.assert_close(q_values, value + advantage - advantage.mean(1, keepdim=True))
    torch.testing.assert_close(q_values.mean(1, keepdim=True), value)


def test_q_network_is_as_specified() -> None:
    network = QNetwork(4, 2)
    assert layers_of(network) == [(128, 4), (256, 128), (128, 256), (2, 128)]
    assert sum(isinstance(m, nn.ReLU) for m in network.modules()) == 3


def test_intrinsic_networks_are_as_specified() -> None:
    target, predictor = (IntrinsicNetwork((4, 84, 84), predictor=p) for p in (False, True))
    assert layers_of(target) == [*CONVOLUTIONS, (512, 3136)]
    assert layers_of(predictor) == [*CONVOLUTIONS, (512, 3136), (512, 512), (512, 512)]
    assert isinstance(target.layers[-1], nn.ReLU) and isinstance(predictor.layers[-1], nn.Linear)
    assert layers_of(IntrinsicNetwork((128,), predictor=False)) == [(512, 128)]
    assert not any(p.requires_grad for p in target.parameters())
    assert all(p.requires_grad for p in predictor.parameters())


def test_intrinsic_networks_start_orthogonal_with_gain_sqrt_2() -> None:
    for module in IntrinsicNetwork((4, 84, 84), predictor=True).modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            rows = module.weight.detach().flatten(1)
            rows = rows if rows.shape[0] <= rows.shape[1] else rows.T
            torch.testing.assert_close(rows @ rows.T, 2 * torch.eye(len(rows)), atol=1e-4, rtol=0)
            assert not module.bias.any()


def test_bytes_are_scaled_and_floats_are_not() -> None:
    assert scale_pixels(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    assert scale_pixels(torch.tensor([51.0])).item() == 51.0


def test_the_network_fits_the_observation() -> None:
    notebook = DQNSettings(network="notebook")
    assert isinstance(make_q_network(spec_of_shape((4, 84, 84), 18), notebook), DuelingConvQNetwork)
    assert isinstance(make_q_network(spec_of_shape((2, 128), 18), notebook), QNetwork)
    for shape, dtype in (((4, 84, 84), torch.uint8), ((2, 128), torch.uint8), ((4,), torch.float32)):
        for network in ("layer_norm", "plain", "notebook"):
            q_network = make_q_network(spec_of_shape(shape, 3), DQNSettings(network=network))
            assert q_network(torch.zeros(5, *shape, dtype=dtype)).shape == (5, 3)
            assert isinstance(q_network, DuelingQNetwork) == (network != "notebook")
            assert any(isinstance(m, nn.LayerNorm) for m in q_network.modules()) == (network == "layer_norm")


def test_the_recipes_networks_are_as_described() -> None:
    config = DQNSettings()
    assert layers_of(make_q_network(spec_of_shape((4, 84, 84), 18), config)) == [
        *CONVOLUTIONS,
        (512, 3136),
        (1, 512),
        (18, 512),
    ]
    assert layers_of(make_q_network(spec_of_shape((2, 128), 18), config)) == [
        (512, 1280),
        (512, 512),
        (1, 512),
        (18, 512),
    ]
    q_values = make_q_network(spec_of_shape((2, 128), 18), config)(
        torch.randint(0, 256, (64, 2, 128), dtype=torch.uint8)
    )
    assert q_values.std(dim=1).max() < 0.1 < q_values.mean(dim=1).std(), "at first values differ, actions hardly"


@pytest.mark.parametrize(("bits", "change", "features"), [(True, True, 1280), (True, False, 1152), (False, True, 256)])
def test_ram_is_shown_as_bytes_changes_and_bits(bits: bool, change: bool, features: int) -> None:
    obs = torch.randint(0, 256, (3, 2, 128), dtype=torch.uint8)
    encoder = RamEncoder((2, 128), bits=bits, change=change)
    shown = encoder(obs).numpy()
    assert shown.shape == (3, features) and encoder.features == features
    before, now = obs.numpy().astype(np.float32).swapaxes(0, 1)
    expected = [now / 255]
    if change:
        expected.append((now - before) / 64)
    if bits:
        expected.append(np.unpackbits(obs[:, 1].numpy(), axis=1, bitorder="little"))
    np.testing.assert_allclose(shown, np.concatenate(expected, axis=1), atol=1e-6)
