"""Curiosity: statistics and bonus against loops and hand-computed numbers, and that it fades."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from probes import spec_of_shape

from gravitar_dqn.config import RNDSettings
from gravitar_dqn.rnd import RND, NotebookRND, RewardForwardFilter, RunningMeanStd, make_rnd


def stacks(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, 4, 84, 84), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@given(
    st.lists(
        st.lists(st.tuples(st.floats(-1e3, 1e3, width=32), st.booleans()), min_size=1, max_size=6),
        min_size=1,
        max_size=5,
    )
)
def test_running_statistics_agree_with_numpy(batches: list[list[tuple[float, bool]]]) -> None:
    rms, seen = RunningMeanStd(), []
    for batch in batches:
        values, mask = zip(*batch, strict=True)
        rms.update(torch.tensor(values), torch.tensor(mask))
        seen += [v for v, m in batch if m]
    if seen:
        # the start counts as 1e-4 of an observation with mean 0 and variance 1
        assert rms.mean.item() == pytest.approx(np.mean(seen), abs=0.11, rel=1e-3)
        assert rms.count.item() == pytest.approx(len(seen) + 1e-4)
    else:
        assert rms.mean.item() == 0 and rms.var.item() == 1


def test_running_statistics_in_two_batches() -> None:
    rms = RunningMeanStd((2,))
    rms.update(torch.tensor([[1.0, 10.0], [3.0, 30.0]]))
    rms.update(torch.tensor([[5.0, 50.0], [100.0, -1.0]]), torch.tensor([True, False]))
    # 1, 3, 5: mean 3, variance 8/3
    torch.testing.assert_close(rms.mean, torch.tensor([3.0, 30.0]).double(), rtol=1e-3, atol=0)
    torch.testing.assert_close(rms.var, torch.tensor([8 / 3, 800 / 3]).double(), rtol=1e-3, atol=0)


def test_forward_filter_runs_along_time_and_waits_where_nothing_was_played() -> None:
    forward = RewardForwardFilter(2, 0.5)
    both = torch.tensor([True, True])
    assert forward.update(torch.tensor([1.0, 2.0]), both).tolist() == [1.0, 2.0]
    assert forward.update(torch.tensor([1.0, 9.0]), torch.tensor([True, False])).tolist() == [1.5, 2.0]
    assert forward.update(torch.tensor([1.0, 0.0]), both).tolist() == [1.75, 1.0]


def test_the_bonus_is_the_mean_squared_error_on_one_normalization_for_both_networks() -> None:
    torch.manual_seed(0)
    rnd = make_rnd(spec_of_shape((4, 84, 84)), 3, RNDSettings(coef=1.0))
    obs = stacks(3)
    rnd.obs_rms.mean.fill_(100.0)
    rnd.obs_rms.var.fill_(400.0)
    z = ((obs[:, -1:].float() - 100) / 20).clamp(-5, 5)  # the newest frame alone, not divided by 255
    expected = ((rnd.predictor(z) - rnd.target(z)) ** 2).sum(1) / 512
    torch.testing.assert_close(rnd.bonus(obs), expected, rtol=1e-4, atol=1e-5)


def test_the_bonus_uses_the_statistics_from_before_its_own_frames() -> None:
    rnd = make_rnd(spec_of_shape((4, 84, 84)), 2, RNDSettings(coef=1.0, init_updates=0))
    played = torch.tensor([True, True])
    rnd.step_bonus(stacks(2, 1), played)
    obs = stacks(2, 2)
    expected = rnd.bonus(obs).detach()
    torch.testing.assert_close(rnd.step_bonus(obs, played), expected)
    assert not torch.allclose(rnd.bonus(obs), expected)


def test_there_is_no_bonus_and_no_scale_until_the_predictor_has_learned() -> None:
    torch.manual_seed(0)
    rnd = make_rnd(spec_of_shape((8,)), 4, RNDSettings(coef=1.0, init_updates=100, update_frequency=1))
    optimizer = torch.optim.Adam(rnd.predictor.parameters(), 1e-3)
    played, generator = torch.ones(4, dtype=torch.bool), torch.Generator().manual_seed(0)
    untrained = None
    for update in range(300):
        obs = torch.randn(4, 8, generator=generator)
        bonus = rnd.step_bonus(obs, played)
        loss, fresh = rnd.loss(torch.randn(32, 8, generator=generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if update < 99:
            assert not bonus.any() and not fresh.any()
            assert rnd.reward_rms.count < 1 and rnd.obs_rms.count > 4 * update
        if update == 5:
            untrained = rnd.bonus(obs).mean().item()
    assert bonus.all() and fresh.all()
    # the scale is that of the trained predictor's errors: at most a hundred steps of them
    assert rnd.reward_rms.std.item() < 0.1 * untrained / (1 - 0.99)


def test_the_predictor_learns_and_the_bonus_fades_where_it_has_been() -> None:
    torch.manual_seed(0)
    rnd = make_rnd(spec_of_shape((8,)), 1, RNDSettings(coef=1.0, update_frequency=1))
    generator = torch.Generator().manual_seed(0)
    known, new = torch.randn(64, 8), torch.randn(64, 8) + 3
    optimizer = torch.optim.Adam(rnd.predictor.parameters(), 1e-3)
    before = rnd.bonus(known).mean().item()
    for _ in range(150):
        loss, fresh = rnd.loss(known, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert not fresh.requires_grad
    assert rnd.bonus(known).mean().item() < 0.1 * before
    assert rnd.bonus(new).mean().item() > 3 * rnd.bonus(known).mean().item()
    assert all(p.grad is None for p in rnd.target.parameters())


def test_the_loss_comes_with_the_fresh_bonus_of_its_rows() -> None:
    rnd = make_rnd(spec_of_shape((8,)), 1, RNDSettings(coef=1.0, init_updates=0))
    obs = torch.randn(40, 8)
    loss, fresh = rnd.loss(obs, torch.Generator())
    assert loss.requires_grad and not fresh.requires_grad
    torch.testing.assert_close(fresh, rnd.bonus(obs).detach())
    torch.testing.assert_close(loss, rnd.bonus(obs).mean())


def test_statistics_go_on_counting_after_16_million() -> None:
    """2^24 + 1 is the first whole number that float32 does not have."""
    seen = RunningMeanStd()
    seen.count.fill_(2**24)
    seen.update(torch.ones(1))
    assert seen.count == 2**24 + 1


def test_statistics_are_exact_under_autocast() -> None:
    frames = torch.randint(0, 256, (64, 1, 84, 84), dtype=torch.uint8)
    frames[:, 0, 0, 0] = 3
    mask = torch.rand(64) < 0.8
    inside, outside = RunningMeanStd((1, 84, 84)), RunningMeanStd((1, 84, 84))
    with torch.autocast("cpu", torch.bfloat16):
        inside.update(frames, mask)
    outside.update(frames, mask)
    assert torch.equal(inside.mean, outside.mean) and torch.equal(inside.var, outside.var)
    kept = frames[mask].double()
    torch.testing.assert_close(inside.mean, kept.mean(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(inside.var, kept.var(0, unbiased=False), rtol=1e-2, atol=1e-2)
    assert inside.std[0, 0, 0] < 0.1, "a pixel that never changes"


def test_learning_rewards_are_in_units_of_the_intrinsic_return() -> None:
    rnd = make_rnd(spec_of_shape((8,)), 1, RNDSettings(coef=1.0))
    rnd.reward_rms.var.fill_(4.0)
    torch.testing.assert_close(rnd.learning_rewards(torch.tensor([1.0, 3.0])), torch.tensor([0.5, 1.5]))


# ---------------------------------------------------------------- the notebook's, faults included


def test_notebook_bonus_sees_two_scales_and_is_normalized_over_the_last_thousand() -> None:
    torch.manual_seed(0)
    rnd = NotebookRND(spec_of_shape((4, 84, 84)))
    rnd.predictor.layers[-1].weight.data *= 0.01  # keep 0..255 from drowning the target
    played = torch.tensor([True])
    raw, stored = [], []
    for seed in range(5):
        obs = stacks(1, seed)
        target, predictor = rnd.target(obs.float() / 255), rnd.predictor(obs.float())
        raw.append(0.5 * ((target - predictor) ** 2).sum().item())
        stored.append(rnd.step_bonus(obs, played).item())
    assert stored[0] == 0.0
    expected = [(raw[i] - np.mean(raw[: i + 1])) / np.std(raw[: i + 1]) for i in range(1, 5)]
    assert stored[1:] == pytest.approx(np.clip(expected, -5, 5), rel=1e-3)


def test_notebook_bonus_is_clipped_and_forgets_after_a_thousand() -> None:
    rnd = NotebookRND(spec_of_shape((8,)))
    rnd.history[:1000] = torch.arange(1000) % 2  # mean 0.5, standard deviation 0.5
    rnd.seen.fill_(1000)
    torch.nn.init.zeros_(rnd.predictor.layers[-1].weight)
    rnd.predictor.layers[-1].bias.data.fill_(100.0)
    played = torch.tensor([True])
    assert rnd.step_bonus(torch.randn(1, 8), played).item() == 5.0  # far above the rest
    assert rnd.history[0] > 1e5  # the oldest made room
    assert rnd.seen.item() == 1001
    rnd.step_bonus(torch.randn(1, 8), torch.tensor([False]))
    assert rnd.seen.item() == 1001  # the dummy step after a game's end is no step


def test_notebook_predictor_never_learns() -> None:
    rnd = NotebookRND(spec_of_shape((8,)))
    loss, fresh = rnd.loss(torch.randn(32, 8), torch.Generator().manual_seed(0))
    assert not loss.requires_grad and fresh is None


def test_notebook_loss_is_over_a_random_quarter_of_the_rows() -> None:
    rnd = NotebookRND(spec_of_shape((8,)))
    obs = torch.randn(400, 8)
    loss, _ = rnd.loss(obs, torch.Generator().manual_seed(0))
    mask = torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.25
    with torch.no_grad():
        errors = ((rnd.target(obs) - rnd.predictor(obs)) ** 2).mean(1)
    torch.testing.assert_close(loss, errors[mask].mean())
    assert 70 < mask.sum() < 130


def test_no_curiosity_is_built_for_a_coefficient_of_zero() -> None:
    assert make_rnd(spec_of_shape((8,)), 1, RNDSettings(coef=0.0)) is None
    assert isinstance(make_rnd(spec_of_shape((8,)), 1, RNDSettings(coef=0.1)), RND)


# ---------------------------------------------------------------- both kinds, all kinds of observations


@pytest.mark.parametrize("variant", ["rnd", "notebook"])
@pytest.mark.parametrize("shape", [(4, 84, 84), (2, 128), (5,)], ids=["pictures", "RAM", "vectors"])
def test_curiosity_of_every_observation(shape: tuple[int, ...], variant: str) -> None:
    torch.manual_seed(0)
    rnd = make_rnd(spec_of_shape(shape), 3, RNDSettings(coef=1.0, variant=variant, init_updates=0))
    assert rnd is not None
    dtype = torch.float32 if len(shape) == 1 else torch.uint8
    obs = torch.randint(0, 256, (3, *shape)).to(dtype)
    assert rnd.step_bonus(obs, torch.ones(3, dtype=torch.bool)).shape == (3,)
    loss, _ = rnd.loss(obs, torch.Generator().manual_seed(1))
    assert loss.isfinite()
    if len(shape) == 2:  # of RAM only the newest counts
        older, newer = obs.clone(), obs.clone()
        older[:, 0], newer[:, 1] = 255 - older[:, 0], 255 - newer[:, 1]
        torch.testing.assert_close(rnd.bonus(older), rnd.bonus(obs))
        assert (rnd.bonus(newer) != rnd.bonus(obs)).all()
