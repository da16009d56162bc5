"""Checkpoints: whole or not there, and read without trusting them."""

import contextlib
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import injected
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gravitar_dqn.errors import UserError
from gravitar_dqn.run import checkpoint


def state(value: float = 1.0) -> dict[str, Any]:
    return {
        "agent": {"weights": torch.full((3, 2), value), "clocks": [int(value), 2, 3], "replay": None},
        "tracker": {"returns": [value, -1.5], "name": "x"},
    }


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in checkpoint.folder(run_dir).iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(7.0), 1234)
    assert path.name == "step_000000001234.pt"
    assert names(tmp_path) == ["latest", path.name]
    for loaded in (checkpoint.load(tmp_path), checkpoint.read(path)):
        torch.testing.assert_close(loaded["agent"].pop("weights"), torch.full((3, 2), 7.0))
        assert loaded["agent"] == {"clocks": [7, 2, 3], "replay": None}
        assert loaded["tracker"] == {"returns": [7.0, -1.5], "name": "x"}


def test_latest_survives_moving_the_run(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "a", state(7.0), 1)
    (tmp_path / "a").rename(tmp_path / "b")
    assert checkpoint.load(tmp_path / "b")["agent"]["clocks"][0] == 7


@pytest.mark.parametrize("copied", ["without links", "links as files", "all but the newest"])
def test_latest_is_made_again_after_a_copy_that_lost_it(copied: str, tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), step)
    home = checkpoint.folder(tmp_path)
    newest = (home / "latest").resolve()
    if copied == "all but the newest":
        newest.unlink()
    else:
        (home / "latest").unlink()
    if copied == "links as files":
        (home / "latest").write_bytes(newest.read_bytes())
    checkpoint.mend(tmp_path)
    assert (home / "latest").is_symlink()
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == (1 if copied == "all but the newest" else 2)
    checkpoint.mend(tmp_path / "nothing there")


def test_the_newest_and_the_one_before_it_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30, 400):
        checkpoint.save(tmp_path, state(step), step)
    assert names(tmp_path) == ["latest", "step_000000000030.pt", "step_000000000400.pt"]
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 400


@pytest.mark.parametrize("keep", [1, 3, 9])
def test_as_many_are_kept_as_asked_for(tmp_path: Path, keep: int) -> None:
    steps = [1, 2, 30, 400, 5000]
    for step in steps:
        checkpoint.save(tmp_path, state(step), step, keep)
    assert names(tmp_path) == ["latest", *(f"step_{step:012d}.pt" for step in steps[-keep:])]


def test_a_checkpoint_of_the_same_step_takes_its_place(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), 5)
    checkpoint.save(tmp_path, state(2), 5)
    assert names(tmp_path) == ["latest", "step_000000000005.pt"]
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 2


def test_checkpoints_of_an_abandoned_future_do_not_crowd_out_the_newest(tmp_path: Path) -> None:
    """A kill between writing a checkpoint and naming it `latest` leaves one that is ahead of where the run resumes."""
    checkpoint.save(tmp_path, state(100), 100)
    for step in (200, 300):
        (checkpoint.folder(tmp_path) / f"step_{step:012d}.pt").write_bytes(b"")
    checkpoint.save(tmp_path, state(150), 150)
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 150
    assert names(tmp_path) == ["latest", "step_000000000100.pt", "step_000000000150.pt"]


def half_written(error: Exception) -> Any:
    def fail(saved: Any, path: Path) -> None:
        path.write_bytes(b"PK\x03\x04 half a checkpoint")
        raise error

    return fail


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64 vs 0")])
@pytest.mark.parametrize("step", [1, 2], ids=["over the previous one", "beside the previous one"])
@pytest.mark.faults
def test_a_save_that_fails_half_way_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, step: int
) -> None:
    injected("a save that fails half-way")
    checkpoint.save(tmp_path, state(1), 1)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", half_written(error))
        with pytest.raises(OSError, match=r"^checkpoint not written: "):
            checkpoint.save(tmp_path, state(2), step)
    assert names(tmp_path) == ["latest", "step_000000000001.pt"]
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 1
    checkpoint.save(tmp_path, state(2), 2)
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 2


@pytest.mark.parametrize("call", ["fsync", "replace", "symlink"])
@pytest.mark.faults
def test_a_save_that_fails_at_any_call_leaves_a_whole_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    injected("a save that fails at a call")
    checkpoint.save(tmp_path, state(1), 1)

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(OSError, match="No space left on device"):
            checkpoint.save(tmp_path, state(2), 2)
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 1
    assert not list(checkpoint.folder(tmp_path).glob("step_*.tmp"))
    checkpoint.save(tmp_path, state(3), 3)
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 3


class Killed(BaseException):
    """No handler of errors sees it, as none would see a kill."""


@pytest.mark.faults
def test_a_kill_before_any_call_to_the_system_leaves_a_whole_latest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = {name: getattr(os, name) for name in ("mkdir", "fsync", "replace", "rename", "symlink", "unlink")}
    checkpoint.save(tmp_path, state(1), 1)
    checkpoint.save(tmp_path, state(2), 2)
    survived = 0
    for allowed in range(100):
        left = allowed

        def counted(name: str) -> Any:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    raise Killed
                left -= 1
                return calls[name](*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for name in calls:
                patch.setattr(os, name, counted(name))
            try:
                checkpoint.save(tmp_path, state(3), 3)
                break
            except Killed:
                survived += 1
                injected("kill at a call of a save")
        assert checkpoint.load(tmp_path)["agent"]["clocks"][0] in (2, 3)
    assert survived >= 5, "the save made hardly a call"
    assert names(tmp_path) == ["latest", "step_000000000002.pt", "step_000000000003.pt"]
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 3


def test_what_a_kill_left_half_written_is_swept_up(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, state(1), 1)
    (checkpoint.folder(tmp_path) / "step_000000000002.tmp").write_bytes(b"half")
    (checkpoint.folder(tmp_path) / "latest.tmp").symlink_to("step_000000000002.pt")
    checkpoint.save(tmp_path, state(3), 3)
    assert names(tmp_path) == ["latest", "step_000000000001.pt", "step_000000000003.pt"]


def test_a_run_without_a_checkpoint_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no checkpoint yet"):
        checkpoint.load(tmp_path)


@pytest.mark.faults
def test_a_checkpoint_cut_at_any_length_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, state(), 1)
    whole = path.read_bytes()
    for length in [*range(0, len(whole), 29), len(whole) - 1]:
        path.write_bytes(whole[:length])
        injected("checkpoint cut short")
        with pytest.raises(UserError, match="is not a whole checkpoint") as refused:
            checkpoint.load(tmp_path)
        assert "\n" not in str(refused.value)


def flip(path: Path, start: int, count: int) -> None:
    """Change `count` bytes of a file, from `start` on."""
    data = bytearray(path.read_bytes())
    data[start : start + count] = bytes(byte ^ 0xFF for byte in data[start : start + count])
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def flip_a_weight(path: Path) -> None:
    flip(path, path.read_bytes().index(torch.full((3, 2), 2.0).numpy().tobytes()), 8)


def put_nan(path: Path) -> None:
    saved = torch.load(path, weights_only=True)
    saved["agent"]["weights"][1, 1] = torch.nan
    torch.save(saved, path)


DAMAGE = {cut: "is not a whole checkpoint", flip_a_weight: "checksum", put_nan: "NaN or infinity in agent.weights"}


@pytest.mark.parametrize(("damage", "expected"), DAMAGE.items())
@pytest.mark.faults
def test_a_damaged_checkpoint_is_not_used_and_the_one_before_it_is(
    damage: Any, expected: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    injected("a damaged checkpoint")
    before, newest = (checkpoint.save(tmp_path, state(float(step)), step) for step in (1, 2))
    damage(newest)
    with pytest.raises(checkpoint.NotWhole, match=expected) as refused:
        checkpoint.read(newest)
    assert "\n" not in str(refused.value) and str(newest) in str(refused.value)
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 1
    (told,) = caplog.messages
    assert told == f"{refused.value}; {before.name} is used instead"


def test_of_damaged_checkpoints_alone_the_newest_is_told(tmp_path: Path) -> None:
    paths = [checkpoint.save(tmp_path, state(step), step) for step in (1, 2)]
    for path in paths:
        cut(path)
    with pytest.raises(checkpoint.NotWhole, match=str(paths[1])):
        checkpoint.load(tmp_path)


def test_without_the_link_the_newest_file_is_loaded(tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step), step)
    (checkpoint.folder(tmp_path) / "latest").unlink()
    assert checkpoint.load(tmp_path)["agent"]["clocks"][0] == 2


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100, deadline=None)
@given(st.floats(0, 1), st.integers(1, 200))
@pytest.mark.faults
def test_bytes_flipped_anywhere_change_nothing_that_is_loaded(tmp_path: Path, at: float, count: int) -> None:
    """Names and padding may be hit, which no checksum covers: then the file is refused, or it is as it was."""
    injected("bytes flipped in a checkpoint")
    path = checkpoint.save(tmp_path, state(7.0), 1)
    flip(path, int(at * path.stat().st_size), count)
    with contextlib.suppress(UserError):
        loaded = checkpoint.read(path)
        torch.testing.assert_close(loaded["agent"].pop("weights"), torch.full((3, 2), 7.0), rtol=0, atol=0)
        assert loaded["agent"] == {"clocks": [7, 2, 3], "replay": None}
        assert loaded["tracker"] == {"returns": [7.0, -1.5], "name": "x"}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_where_a_state_is_not_finite_is_named(bad: float) -> None:
    whole = {"a": torch.ones(3), "n": torch.tensor([2**40]), "list": [1.0, {"b": torch.zeros(2)}], "none": None}
    assert checkpoint.not_finite(whole) == ""
    whole["list"][1]["b"][1] = bad  # type: ignore[index]
    assert checkpoint.not_finite(whole) == "list.1.b"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=64),
        st.binary(max_size=64).map(lambda tail: b"\x80\x02" + tail),  # how a pickle begins
        st.binary(max_size=64).map(lambda tail: b"PK\x03\x04" + tail),  # how a zip file begins
        st.recursive(st.integers() | st.text(max_size=3), lambda inner: st.lists(inner, max_size=3)).map(pickle.dumps),
    )
)
@pytest.mark.faults
def test_any_other_file_is_refused(tmp_path: Path, data: bytes) -> None:
    injected("rubbish in place of a checkpoint")
    path = tmp_path / "step_000000000001.pt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"is not a (whole )?checkpoint"):
        checkpoint.read(path)


@pytest.mark.parametrize("other", [{"format": 1}, {"format": 4}, {"model": torch.zeros(2)}, [1, 2], torch.zeros(3)])
@pytest.mark.faults
def test_a_torch_file_of_another_program_is_refused(tmp_path: Path, other: object) -> None:
    injected("a checkpoint of another program or version")
    path = tmp_path / "other.pt"
    torch.save(other, path)
    with pytest.raises(UserError, match="is not a checkpoint of this program"):
        checkpoint.read(path)


def test_a_checkpoint_of_the_format_before_is_read_with_todays_names(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save({"format": 2, "agent": {"policy": {}, "curiosity": {"updates": 3}}}, path)
    assert checkpoint.read(path)["agent"] == {"policy": {}, "rnd": {"updates": 3}}
    assert checkpoint.FORMAT == 3


class Trap:
    """Runs a command when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.faults
def test_a_checkpoint_cannot_run_code(tmp_path: Path) -> None:
    injected("a pickle that runs code", 2)
    path, sprung = tmp_path / "trap.pt", tmp_path / "sprung"
    torch.save({"format": checkpoint.FORMAT, "agent": Trap(sprung)}, path)
    with pytest.raises(UserError, match=r"might run code: not read$"):
        checkpoint.read(path)
    assert not sprung.exists()
    path.write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        checkpoint.read(path)
    assert not sprung.exists()
    pickle.loads(path.read_bytes())
    assert sprung.exists(), "the trap was a trap"
