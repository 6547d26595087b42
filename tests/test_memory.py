"""Pieces of a batch: as few as fit, the same gradient, decided once."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from synthmed import configfile, memory
from synthmed.backbones.nets.recomputable import Recomputable
from synthmed.config import Config, Privacy
from synthmed.errors import ResourceError, UsageError
from synthmed.keys import Key
from synthmed.measure import Measured, Request, held_bytes, measure, peak_bytes
from synthmed.memory import GIB, Fitting, fewest
from synthmed.stages import train as stage
from synthmed.training import Training, gradient, split
from synthmed.trial import noise_loader, perform


@pytest.fixture
def config(make_config: Callable[..., Path]) -> Config:
    return configfile.load(make_config())


@pytest.mark.parametrize("pieces", [2, 3])
def test_the_pieces_gradients_sum_to_that_of_the_whole(config: Config, pieces: int) -> None:
    source = noise_loader(config, 7, 7)
    model = stage.build(config, source, Key.root(0), "cpu")
    phase = model.rounds()[0].phases[0]
    batch, draws = source.draw(phase, Key.root(1), 0, "cpu")
    got = []
    for n in (1, pieces):
        state = Training(model, [10], n)
        got.append(gradient(state, phase, batch, draws, 0.5, list(state.params.values())))
    torch.testing.assert_close(got[0][0], got[1][0], rtol=1e-5, atol=1e-6)
    # some gradients vanish but for rounding (a bias before a norm): the measure is the whole one
    size = torch.stack([g.norm() for g in got[0][1] if g is not None]).norm()
    for a, b in zip(got[0][1], got[1][1], strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            assert (a - b).norm() <= 1e-5 * size


@pytest.mark.parametrize("kind", ["voxel", "wavelet", "latent"])
def test_what_is_computed_again_gives_the_same_gradient(config: Config, kind: str) -> None:
    """To the last bit."""
    tree = config.model_dump(mode="json")
    tree["backbone"] = {"name": "ddpm", "widths": [4, 8], "depth": 2, "space": {"kind": kind}}
    tried = Config.model_validate(tree)
    source = noise_loader(tried, 4, 4)
    model = stage.build(tried, source, Key.root(0), "cpu")
    phase = model.rounds()[-1].phases[0]
    batch, draws = source.draw(phase, Key.root(1), 0, "cpu")
    got, calls = [], []
    for recompute in (False, True):
        state = Training(model, [10] * len(model.rounds()), recompute=recompute)
        every = [b for m in model.modules.values() for b in m.modules()]
        blocks = [b for b in every if isinstance(b, Recomputable)]
        assert len(blocks) == 8
        n_convolved = 0

        def counted(layer: torch.nn.Module, args: object) -> None:
            nonlocal n_convolved
            n_convolved += 1

        hooks = [b.second.register_forward_pre_hook(counted) for b in blocks]
        got.append(gradient(state, phase, batch, draws, 0.5, list(state.params.values())))
        calls.append(n_convolved)
        for hook in hooks:
            hook.remove()
    assert calls == [8, 16]
    assert torch.equal(got[0][0], got[1][0])
    for a, b in zip(got[0][1], got[1][1], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def test_a_batch_is_split_whole_and_in_order() -> None:
    from synthmed.backbones.generative import Batch

    batch = Batch(*(torch.arange(7.0)[:, None] for _ in range(4)))
    parts = split(batch, {"e": torch.arange(7.0)}, 3)
    assert [len(d["e"]) for _, d in parts] == [3, 2, 2]
    assert torch.equal(torch.cat([d["e"] for _, d in parts]), torch.arange(7.0))
    for i in range(4):
        assert torch.equal(torch.cat([b[i] for b, _ in parts if b is not None]), batch[i])
    assert all(b is None for b, _ in split(None, {"e": torch.arange(4.0)}, 2))


@given(
    n=st.integers(2, 64),
    smallest=st.sampled_from([1, 2]),
    limit=st.integers(100, 2000),
    constant=st.integers(0, 300),
    each=st.integers(1, 60),
)
def test_the_fewest_pieces_that_fit(
    n: int, smallest: int, limit: int, constant: int, each: int
) -> None:
    """Against going through all of them."""
    sizes = {k: math.ceil(n / k) for k in range(1, max(1, n // smallest) + 1)}
    fitting = [k for k, size in sizes.items() if constant + each * size <= limit]
    measured: list[int] = []

    def needs(size: int) -> int:
        measured.append(size)
        return constant + each * size

    if fitting:
        count = fewest(n, smallest, limit, needs)
        assert count == fitting[0]
        assert n // count >= min(smallest, n), "no piece smaller than that"
        assert len(measured) <= 3, "two for the line, one to make sure"
    else:
        with pytest.raises(ResourceError, match="even with"):
            fewest(n, smallest, limit, needs)


def test_a_line_that_promised_too_much_is_not_trusted() -> None:
    """Two and four patients take little, eight take more than their line says."""
    taken = {2: 20, 4: 40, 8: 500, 16: 1000, 6: 60, 3: 30}
    assert fewest(16, 2, 100, taken.__getitem__) == 3


def test_unbounded_memory_needs_no_trial(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "measure", lambda *a: pytest.fail("a trial was run"))
    assert memory.fitting(config, noise_loader(config, 4, 4), "cpu") == Fitting(1, False)


TAKEN = Measured(
    n_parameters=1,
    n_trained=1,
    build_seconds=1,
    seconds_per_step=(1,),
    steps=(1,),
    finish_seconds=0,
    finish_scans=None,
    finish_bytes=0,
    draw_bytes=0,
    reads_nobody=False,
    examine_seconds=0,
    first_batch_seconds=0,
    batch_seconds=0,
    built_bytes=1000 * GIB,
    peak_bytes=0,
)
"""What a trial says; what this process holds is less than its model."""


def test_what_a_phase_draws_that_reads_nobody_is_bounded_too(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """64 volumes are asked for of 8 patients; a tenth of a GiB each, 20 fit at once."""
    train = config.train.model_copy(update={"memory_gib": 2, "batch_patients": 64})
    bounded = config.model_copy(update={"train": train})
    noted: list[Request] = []

    def answer(config: Config, request: Request) -> Measured:
        noted.append(request)
        at_once = math.ceil(request.batch_patients / request.pieces)
        return replace(TAKEN, reads_nobody=True, peak_bytes=at_once * GIB // 10)

    monkeypatch.setattr(memory, "measure", answer)
    assert memory.fitting(bounded, noise_loader(bounded, 8, 64), "cpu") == Fitting(4, False)
    assert {(r.n_read, r.batch_patients) for r in noted} >= {(4, 32), (8, 64)}
    assert {r.n_patients for r in noted} == {8}


def test_what_ends_a_training_and_what_is_drawn_ahead_are_bounded_too(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 patients; a piece of two takes nothing, what lies there for the others 0.2 GiB each."""
    train = config.train.model_copy(update={"memory_gib": 3, "batch_patients": 32})
    bounded = config.model_copy(update={"train": train})
    source = noise_loader(bounded, 64, 32, 40)
    taken = replace(TAKEN, built_bytes=held_bytes("cpu"), draw_bytes=GIB // 10)
    noted: list[Request] = []

    def fits(measured: Measured) -> bool:
        def answer(config: Config, request: Request) -> Measured:
            noted.append(request)
            return measured

        monkeypatch.setattr(memory, "measure", answer)
        try:
            memory.fitting(bounded, source, "cpu")
        except ResourceError:
            return False
        return True

    # in one piece nothing is left to lie there
    assert fits(taken)
    assert {r.n_holdout for r in noted} == {32} and min(r.n_patients for r in noted) == 64
    # 64 scans at once after the steps, whatever the pieces
    assert fits(replace(taken, finish_bytes=GIB // 100))
    assert not fits(replace(taken, finish_bytes=GIB // 10))
    with pytest.raises(ResourceError, match="fitted to all 640 training scans takes"):
        memory.fitting(bounded, source, "cpu", 640, 200)


def test_draws_that_wait_for_their_piece_count(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces of 22 would fit, but for what is drawn for the patients of the third."""
    train = config.train.model_copy(update={"memory_gib": 1.5, "batch_patients": 64})
    bounded = config.model_copy(update={"train": train})

    def found(draw_bytes: int) -> Fitting:
        def answer(config: Config, request: Request) -> Measured:
            at_once = math.ceil(request.batch_patients / request.pieces)
            return replace(TAKEN, peak_bytes=at_once * GIB // 16, draw_bytes=draw_bytes)

        monkeypatch.setattr(memory, "measure", answer)
        return memory.fitting(bounded, noise_loader(bounded, 64, 64), "cpu")

    assert found(0) == Fitting(3)
    with pytest.raises(ResourceError):
        found(GIB)


def test_activations_are_recomputed_where_no_pieces_fit(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A patient takes 1 GiB, or 0.3 GiB with its activations computed again."""

    def answer(config: Config, request: Request) -> Measured:
        assert request.n_read is not None
        at_once = math.ceil(request.n_read / request.pieces)
        each = 0.3 if request.recompute else 1.0
        return replace(TAKEN, peak_bytes=int(at_once * each * GIB))

    monkeypatch.setattr(memory, "measure", answer)
    source = noise_loader(config, 8, 8)

    def found(memory_gib: float, private: bool = False, backbone: str = "ddpm") -> Fitting:
        train = config.train.model_copy(update={"memory_gib": memory_gib, "batch_patients": 8})
        privacy = (
            Privacy(epsilon=8, delta=1e-3, sample_rate=0.1, patients=1000) if private else None
        )
        tree = {**config.model_dump(mode="json"), "backbone": {"name": backbone}}
        bounded = Config.model_validate(tree).model_copy(
            update={"train": train, "privacy": privacy}
        )
        return memory.fitting(bounded, source, "cpu")

    assert found(2.5) == Fitting(4, False)
    assert found(1.5) == Fitting(2, True)
    with pytest.raises(ResourceError, match="even with 2 patients at once"):
        found(0.5)
    with pytest.raises(ResourceError, match="even with 2 patients at once"):
        found(1.5, private=True)
    with pytest.raises(ResourceError, match="even with 2 patients at once"):
        found(1.5, backbone="cvae")  # none of its blocks can be computed again


@pytest.mark.parametrize("private", [False, True])
def test_under_a_promise_pieces_do_not_tell_how_many_people_there_are(
    config: Config, monkeypatch: pytest.MonkeyPatch, private: bool
) -> None:
    """They decide how the step of a phase that reads nobody is rounded."""

    def answer(config: Config, request: Request) -> Measured:
        assert request.n_read is not None
        at_once = math.ceil(request.n_read / request.pieces)
        return replace(TAKEN, peak_bytes=at_once * GIB)

    monkeypatch.setattr(memory, "measure", answer)
    train = config.train.model_copy(update={"memory_gib": 3.5, "batch_patients": 16})
    promise = Privacy(epsilon=8, delta=1e-3, sample_rate=0.1, patients=20) if private else None
    bounded = config.model_copy(update={"train": train, "privacy": promise})
    found = [memory.fitting(bounded, noise_loader(bounded, n, 16), "cpu").pieces for n in (8, 20)]
    assert found == ([6, 6] if private else [3, 6])


@pytest.mark.parametrize("name", ["cgan", "cvae"])
def test_a_trial_tells_whether_a_phase_reads_nobody(config: Config, name: str) -> None:
    tree = {**config.model_dump(mode="json"), "backbone": {"name": name, "widths": [4, 4]}}
    tried = Config.model_validate(tree)
    found = perform(tried, Request(2, 0, 4, 1, False, 3, False, "cpu", 1))
    assert found.reads_nobody == (name == "cgan")


def test_a_bound_that_nothing_meets_is_exit_5(config: Config) -> None:
    train = config.train.model_copy(update={"memory_gib": 0.01})
    tight = config.model_copy(update={"train": train})
    with pytest.raises(ResourceError, match=r"train.memory_gib 0.01: training takes") as error:
        memory.fitting(tight, noise_loader(tight, 4, 4), "cpu")
    assert error.value.exit_code == 5


def test_a_trial_measures_time_and_memory_of_its_own_process(config: Config) -> None:
    ballast = bytearray(2 * GIB // 4)  # what this process holds must not count
    ballast[::4096] = b"x" * len(ballast[::4096])
    request = Request(8, 4, 4, 1, False, 4, True, "cpu", 1)
    small = measure(config, request)
    assert small.steps == (5,)
    assert len(small.seconds_per_step) == 1
    assert small.seconds_per_step[0] > 0
    assert 0 < small.built_bytes < small.peak_bytes < peak_bytes("cpu")
    assert min(small.finish_seconds, small.examine_seconds) > 0
    assert min(small.build_seconds, small.first_batch_seconds, small.batch_seconds) > 0
    assert held_bytes("cpu") > len(ballast)
    data = config.data.model_copy(update={"grid": (48, 48, 48)})
    large = measure(config.model_copy(update={"data": data}), request)
    assert large.peak_bytes > small.peak_bytes
    assert large.n_parameters > small.n_parameters


def test_recomputing_needs_less(config: Config, tmp_path: Path) -> None:
    """Of what two further patients take, at least a third: were all kept, nothing would change.

    By what torch allots, which is exact. A process's peak differs by tens of MiB from run to run.
    """
    tree = config.model_dump(mode="json")
    tree["data"]["grid"] = [24, 24, 24]
    space = {"kind": "voxel"}
    tree["backbone"] = {"name": "ddpm", "widths": [16, 16], "depth": 4, "space": space}
    large = Config.model_validate(tree)
    taken = []
    for recompute in (False, True):
        two, four = (allotted(large, n, recompute, tmp_path / "trace.json") for n in (2, 4))
        taken.append(four - two)
    assert taken[1] < taken[0] * 2 / 3, taken


def allotted(config: Config, n: int, recompute: bool, trace: Path) -> int:
    """The most bytes that torch held on the CPU in a trial, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        perform(config, Request(n, 0, n, 1, recompute, 3, False, "cpu", 1))
    profiled.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    events = sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"])
    before = events[0]["args"]["Total Allocated"] - events[0]["args"]["Bytes"]
    return max(e["args"]["Total Allocated"] for e in events) - before


def test_an_error_of_the_trial_is_its_own(config: Config) -> None:
    data = config.data.model_copy(update={"grid": (0, 0, 0)})
    broken = config.model_copy(update={"data": data})
    with pytest.raises(Exception, match="trial") as error:
        measure(broken, Request(8, 0, 4, 1, False, 4, False, "cpu", 1))
    assert "Traceback" not in str(error.value)
    assert not isinstance(error.value, UsageError)
