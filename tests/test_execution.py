"""The fast paths against the eager fp32 one. CUDA graphs are emulated here; test_gpu.py has the real ones."""

import contextlib
import copy
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import ppo_helpers
import probes
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from gravitar_dqn import losses
from gravitar_dqn.agents.dqn import DQNAgent
from gravitar_dqn.benchmark.peers import plain_trunk
from gravitar_dqn.config import DQNRunConfig, DQNSettings, EnvSettings, RNDSettings
from gravitar_dqn.encoders import PixelConv2d, conv_trunk, space_to_depth
from gravitar_dqn.envs import spec_of
from gravitar_dqn.loop import play
from gravitar_dqn.networks import DuelingConvQNetwork
from gravitar_dqn.runtime import execution
from gravitar_dqn.runtime.execution import Graphed, choose_execution, choose_precision

CONFIG = DQNRunConfig(
    env=EnvSettings(num_envs=4),
    agent=DQNSettings(
        buffer_size=400,
        learning_starts=30,
        batch_size=16,
        train_frequency=4,
        epsilon_decay=60,
        learning_rate=1e-3,
        n_step=3,
        gamma=0.99,
        priority_exponent=0.5,
        policy="online",
        network="notebook",
    ),
    rnd=RNDSettings(coef=0.1, init_updates=2, update_frequency=2),
    precision="fp32",
)


class Recording(TorchDispatchMode):
    """Every operation on tensors while it is active; one that a capture does not allow raises."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        masks = name.startswith("aten::index") and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for index in arg
        )
        if masks or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        result = func(*args, **kwargs)
        self.calls.append((func, args, kwargs, result))
        return result


class EmulatedGraph:
    """Does what a CUDA graph does: repeats the recorded operations on the same tensors, whatever Python thinks.

    Recording executes here, unlike a capture: so the first replay has nothing left to do.
    """

    def __init__(self) -> None:
        self.recording = Recording()
        self.replays = 0
        self.generators: list[torch.Generator] = []

    def register_generator_state(self, generator: torch.Generator) -> None:
        assert not self.recording.calls, "before the capture"
        self.generators.append(generator)

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:
            return
        for func, args, kwargs, result in self.recording.calls:
            again = func(*args, **kwargs)
            told_each = func._schema.returns
            if len(told_each) == 1:  # maybe a list of tensors
                told_each = told_each * len(flat(result))
            for old, new, told in zip(flat(result), flat(again), told_each, strict=False):
                if isinstance(old, torch.Tensor) and told.alias_info is None:
                    old.copy_(new.view(old.shape))  # squeeze_ may have changed it since


def flat(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


class NoStream:
    def wait_stream(self, other: Any) -> None:
        pass


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> list[EmulatedGraph]:
    """CUDA graphs on a CPU; gives those that were made."""
    made: list[EmulatedGraph] = []

    def make() -> EmulatedGraph:
        made.append(EmulatedGraph())
        return made[-1]

    monkeypatch.setattr(torch.cuda, "CUDAGraph", make)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, stream: graph.recording)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: NoStream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: NoStream())
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    return made


def trained(config: DQNRunConfig, steps: int) -> DQNAgent:
    torch.manual_seed(config.seed)
    envs = probes.vector_of(probes.Remember, config.env.num_envs)
    agent = DQNAgent(config, spec_of(envs), torch.device("cpu"))
    for _ in islice(play(envs, agent, 1), steps):
        pass
    return agent


def test_graphs_give_the_run_that_eager_gives(emulated: list[EmulatedGraph]) -> None:
    eager = trained(replace(CONFIG, execution="eager"), 60)
    graphs = trained(replace(CONFIG, execution="graphs"), 60)
    assert len(emulated) == 4, "act, curiosity, and both updates"
    assert all(graph.replays > 5 for graph in emulated)
    assert all(graph.generators == [graphs.generator] for graph in emulated), "the device would repeat its numbers"
    assert (graphs.global_step, graphs.num_updates) == (eager.global_step, eager.num_updates)
    for a, b in zip(eager.q_network.parameters(), graphs.q_network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    one, two = eager.replay.state_dict(), graphs.replay.state_dict()
    for name in ("frames", "actions", "int_rewards", "sampling_weights", "max_weight"):
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=0)
    assert eager.metrics() == graphs.metrics()
    assert eager.rnd is not None and graphs.rnd is not None
    torch.testing.assert_close(eager.rnd.obs_rms.mean, graphs.rnd.obs_rms.mean, rtol=0, atol=0)


@pytest.mark.parametrize(
    "tasks",
    [ppo_helpers.PPO_RND, pytest.param(ppo_helpers.PICTURE_TASKS, marks=pytest.mark.slow)],
    ids=["ppo-rnd", "randal"],
)
def test_graphs_give_the_run_that_eager_gives_to_randal(tasks: Any, emulated: list[EmulatedGraph]) -> None:
    config = ppo_helpers.settings(tasks, num_envs=4, learning_rate_end=1e-4, learning_rate_decay=150)
    config = replace(config, agent=replace(config.agent, num_steps=4, update_epochs=2, num_minibatches=2))
    envs, eager = ppo_helpers.build(replace(config, execution="eager"), probes.Remember)
    for optimizer in (eager.optimizer, eager.rnd_optimizer):  # a graph's learning rate is a float32 tensor
        assert optimizer is not None
        optimizer.param_groups[0].update(lr=torch.tensor(3e-3), capturable=True)
    for _ in islice(play(envs, eager, 1), 35):
        pass
    graphs = ppo_helpers.learn(replace(config, execution="graphs"), probes.Remember, 35)
    assert len(emulated) == 4 and all(graph.replays > 0 for graph in emulated), (
        "acting, advantages, learning, and the statistics"
    )
    assert all(graph.generators == [graphs.generator] for graph in emulated)
    assert graphs.num_updates == eager.num_updates > 20
    assert eager.metrics() == pytest.approx(graphs.metrics(), rel=0, abs=0)
    for a, b in zip(eager.learners.parameters(), graphs.learners.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert eager.rnd is not None and graphs.rnd is not None
    for name, value in eager.rnd.state_dict().items():
        torch.testing.assert_close(value, graphs.rnd.state_dict()[name], rtol=0, atol=0)
    drawn = set()
    for _ in range(12):
        graphs.select_actions()
        drawn.add(tuple(graphs._actions.tolist()))
    assert len(drawn) > 4, "a captured policy that repeats its random numbers"


def test_random_numbers_are_fresh_at_every_replay(emulated: list[EmulatedGraph]) -> None:
    agent = trained(replace(CONFIG, execution="graphs"), 60)
    agent._epsilons.fill_(1.0)
    drawn = set()
    for _ in range(12):
        agent.select_actions()
        drawn.add(tuple(agent._actions.tolist()))
    assert len(drawn) > 4, "a captured policy that repeats its random numbers"


def test_epsilon_is_not_part_of_the_capture(emulated: list[EmulatedGraph]) -> None:
    agent = trained(replace(CONFIG, execution="graphs"), 60)
    assert agent._epsilons.mean().item() == pytest.approx(agent.epsilon, rel=1e-6)
    agent._epsilons.fill_(0.0)
    with torch.no_grad():
        greedy = agent.q_network(agent._obs).argmax(dim=1)
    for _ in range(8):
        agent.select_actions()
        assert torch.equal(agent._actions, greedy)


def test_a_loaded_agent_captures_anew(emulated: list[EmulatedGraph]) -> None:
    agent = trained(replace(CONFIG, execution="graphs"), 60)
    twin = trained(replace(CONFIG, execution="eager"), 60)
    state = copy.deepcopy(twin.state_dict(replay=True))  # optimizers would share their tensors
    agent.load_state_dict(state)
    for optimizer in (agent.optimizer, agent.rnd_optimizer):
        assert optimizer is not None
        assert all(group["capturable"] for group in optimizer.param_groups), "the saved run was eager"
    before = len(emulated)
    for _ in range(6):
        agent.update_q_network()
    assert len(emulated) == before + 1
    for _ in range(6):
        twin.update_q_network()
    for a, b in zip(agent.q_network.parameters(), twin.q_network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_the_recipe_is_captured_whole_its_average_and_its_falling_learning_rate(emulated: list[EmulatedGraph]) -> None:
    agent = replace(
        CONFIG.agent, network="layer_norm", policy="target", target_network_frequency=0, tau=0.05,
        learning_rate_end=1e-5, learning_rate_decay=150,
    )  # fmt: skip
    config = replace(CONFIG, agent=agent, rnd=RNDSettings(coef=0.0))
    eager, graphs = (trained(replace(config, execution=kind), 60) for kind in ("eager", "graphs"))
    assert len(emulated) == 2, "acting and learning"
    assert graphs.metrics()["learning_rate"] == pytest.approx(1e-5) == eager.metrics()["learning_rate"]
    for name in ("q_network", "target_network"):
        for a, b in zip(getattr(eager, name).parameters(), getattr(graphs, name).parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    before = [p.clone() for p in graphs.q_network.parameters()]
    graphs.update_q_network()
    moved = max((a - b).abs().max().item() for a, b in zip(before, graphs.q_network.parameters(), strict=True))
    assert 0 < moved < 1e-4, "a step of Adam is about as long as the learning rate"
    resumed = trained(replace(config, execution="graphs"), 1)
    resumed.load_state_dict(copy.deepcopy(eager.state_dict(replay=True)))
    resumed.update()
    assert resumed.metrics()["learning_rate"] == pytest.approx(1e-5)


@pytest.mark.parametrize("variant", ["rnd", "notebook"])
def test_both_kinds_of_curiosity_can_be_captured(
    variant: Any, emulated: list[EmulatedGraph], caplog: pytest.LogCaptureFixture
) -> None:
    agent = trained(replace(CONFIG, execution="graphs", rnd=replace(CONFIG.rnd, variant=variant)), 60)
    assert "CUDA graph" not in caplog.text and len(emulated) == 4
    assert agent.num_updates > 20 and np.isfinite(agent.metrics()["rnd_loss"])


def test_what_cannot_be_captured_runs_eagerly_with_one_warning(
    emulated: list[EmulatedGraph], caplog: pytest.LogCaptureFixture
) -> None:
    values, seen = torch.zeros(3), []

    def looks_at_the_host() -> None:
        values.add_(1)
        seen.append(values.sum().item())

    graphed = Graphed(looks_at_the_host, torch.Generator(), torch.device("cpu"))
    for _ in range(8):
        graphed()
    (told,) = caplog.records
    assert told.levelname == "WARNING"
    assert told.getMessage().startswith("looks_at_the_host runs eagerly") and "not permitted" in told.getMessage()
    assert len(seen) == 8, "every call looked, the one that the capture refused apart"


def test_the_first_calls_of_a_graph_count(emulated: list[EmulatedGraph]) -> None:
    total = torch.zeros(())
    graphed = Graphed(lambda: total.add_(1), torch.Generator(), torch.device("cpu"))
    for calls in range(1, 9):
        graphed()
        assert total.item() == calls


def test_what_auto_means() -> None:
    cpu = torch.device("cpu")
    assert choose_execution("auto", cpu) == "eager" and choose_execution("graphs", cpu) == "graphs"
    assert choose_execution("auto", torch.device("cuda")) == "graphs"
    assert choose_precision("fp32", cpu) == "fp32" and choose_precision("bf16", cpu) == "bf16"
    execution.keep_freed_memory()  # anywhere, any number of times
    execution.keep_freed_memory()


def test_learning_while_the_emulator_plays() -> None:
    agent = probes.check_overlap(replace(CONFIG, env=EnvSettings(num_envs=2)), "cpu", 30)
    assert agent.global_step == 60 and agent.num_updates > 5


# ------------------------------------------------------------------------- networks: fast against plain


def test_space_to_depth_moves_every_pixel_where_it_belongs() -> None:
    for dtype in (torch.uint8, torch.bfloat16, torch.float32):
        x = torch.randint(0, 255, (2, 3, 8, 12)).to(dtype)
        blocks = space_to_depth(x, torch.float32)
        assert blocks.shape == (2, 48, 2, 3) and blocks.dtype == torch.float32
        for c, i, j in ((0, 0, 0), (1, 5, 7), (2, 7, 11), (1, 2, 9)):
            channel = c * 16 + (i % 4) * 4 + j % 4
            torch.testing.assert_close(blocks[:, channel, i // 4, j // 4], x[:, c, i, j].float())


@pytest.mark.parametrize("channels", [1, 4])
def test_the_first_convolution_is_the_plain_one(channels: int) -> None:
    torch.manual_seed(0)
    conv = PixelConv2d(channels, 32)
    pixels = torch.randint(0, 256, (3, channels, 84, 84), dtype=torch.uint8)
    expected = F.conv2d(pixels.float() / 255, conv.weight, conv.bias, stride=4)
    torch.testing.assert_close(conv(pixels), expected, rtol=1e-4, atol=1e-5)
    floats = torch.randn(3, channels, 84, 84)
    torch.testing.assert_close(conv(floats), F.conv2d(floats, conv.weight, conv.bias, stride=4), rtol=1e-4, atol=1e-5)
    grads = torch.autograd.grad(conv(pixels).square().mean(), [conv.weight, conv.bias])
    plain = F.conv2d(pixels.float() / 255, conv.weight, conv.bias, stride=4)
    for mine, theirs in zip(grads, torch.autograd.grad(plain.square().mean(), [conv.weight, conv.bias]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_the_trunk_is_the_plain_one_with_its_features_reordered() -> None:
    torch.manual_seed(0)
    fast, plain = conv_trunk(4), plain_trunk(4)[:-1]
    plain.load_state_dict(fast.state_dict())
    pixels = torch.randint(0, 256, (2, 4, 84, 84), dtype=torch.uint8)
    expected = plain(pixels.float() / 255).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(fast(pixels), expected, rtol=1e-4, atol=1e-5)


def test_bf16_and_fp32_choose_the_same_actions_and_have_the_same_loss() -> None:
    torch.manual_seed(0)
    network = DuelingConvQNetwork(4, 18)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter *= 2  # a new network's values hardly depend on what it sees
    stacks = torch.randint(0, 256, (512, 4, 84, 84), dtype=torch.uint8)
    targets, weights, actions = torch.randn(512), torch.ones(512), torch.randint(18, (512,))
    with torch.no_grad():
        exact = network(stacks)
        with torch.autocast("cpu", torch.bfloat16):
            fast = network(stacks)
    found = [losses.td_loss(q, actions, targets, weights)[0].item() for q in (exact, fast)]
    assert exact.argmax(1).unique().numel() > 3
    assert (exact.argmax(1) == fast.argmax(1)).float().mean() >= 0.99
    assert found[1] == pytest.approx(found[0], rel=1e-3)
