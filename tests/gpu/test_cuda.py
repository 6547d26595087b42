"""What training does on CUDA alone: layout, pinned batches, memory bound, compiling, resuming."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from synthmed import configfile, memory
from synthmed.config import Config
from synthmed.keys import Key
from synthmed.loader import Loader
from synthmed.measure import Request, measure
from synthmed.stages import train as stage
from synthmed.training import Training, gradient, named_state, one_step
from synthmed.trial import noise_loader

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = "cuda"
KEY = Key.root(3)


@pytest.fixture
def config(make_config: Callable[..., Path]) -> Config:
    values = {"train.precision": "fp32", "backbone.widths": [16, 32], "train.batch_patients": 8}
    return configfile.load(make_config(), (), values)


@pytest.fixture(autouse=True)
def _full_float32() -> Iterator[None]:
    with stage.arithmetic(DEVICE, amp=False):
        yield


def trained(config: Config, source: Loader, steps: int, pieces: int = 1) -> Training:
    state = Training(stage.build(config, source, KEY, DEVICE), [20], pieces)
    for _ in range(steps):
        one_step(state, source, config, KEY, DEVICE, amp=False)
        state.step += 1
    return state


def test_a_batch_is_the_same_as_on_the_cpu(config: Config) -> None:
    source = noise_loader(config, 16, 8)
    phase = stage.build(config, source, KEY, "cpu").rounds()[0].phases[0]
    with source.ahead():
        for step in range(3):
            early, draws = source.draw(phase, KEY, step, DEVICE)
            plain, expected = noise_loader(config, 16, 8).draw(phase, KEY, step, "cpu")
            assert early is not None
            assert plain is not None
            assert all(torch.equal(a.cpu(), b) for a, b in zip(early, plain, strict=True))
            assert all(torch.equal(draws[k].cpu(), v) for k, v in expected.items())


def test_convolutions_lie_channels_last_and_steps_agree_with_the_cpu(config: Config) -> None:
    source = noise_loader(config, 16, 8)
    there = stage.build(config, source, KEY, DEVICE)
    convolutions = [
        m for module in there.modules.values() for m in module.modules()
        if isinstance(m, torch.nn.Conv3d)
    ]  # fmt: skip
    assert convolutions
    last = torch.channels_last_3d
    assert all(m.weight.is_contiguous(memory_format=last) for m in convolutions)
    here = stage.build(config, source, KEY, "cpu")
    losses = []
    for model, device in ((here, "cpu"), (there, DEVICE)):
        phase = model.rounds()[0].phases[0]
        batch, draws = source.draw(phase, KEY, 0, device)
        state = Training(model, [10])
        losses.append(gradient(state, phase, batch, draws, 0.5, list(state.params.values())))
    torch.testing.assert_close(losses[0][0], losses[1][0].cpu(), rtol=1e-4, atol=1e-5)
    size = torch.stack([g.norm() for g in losses[0][1] if g is not None]).norm()
    for a, b in zip(losses[0][1], losses[1][1], strict=True):
        if a is not None and b is not None:
            assert (a - b.cpu()).norm() <= 1e-3 * size


@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_checkpoint_holds_the_whole_state(config: Config, tmp_path: Path, stop_at: int) -> None:
    """Weights, moments, step counts and averages come back, in the layout of the parameters."""
    source = noise_loader(config, 16, 8)
    state = trained(config, source, stop_at)
    state.save(tmp_path / "checkpoint")
    fresh = stage.build(config, source, Key.root(9), DEVICE)
    again = Training.restore(fresh, tmp_path / "checkpoint")
    before, after = named_state(state.model), named_state(again.model)
    assert all(torch.equal(before[k], after[k]) for k in before)
    for phase, optimizer in state.optimizers.items():
        for name, p in state.params.items():
            q = again.params[name]
            for slot, value in optimizer.state.get(p, {}).items():
                got = again.optimizers[phase].state[q][slot]
                assert torch.equal(value, got), (name, slot)
                assert value.device == got.device
                assert value.stride() == got.stride()
        for name, value in state.averages[phase].items():
            assert torch.equal(value, again.averages[phase][name])
    for one in (state, again):
        one_step(one, source, config, KEY, DEVICE, amp=False)
    for a, b in zip(state.params.values(), again.params.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_pieces_need_less_and_give_the_same_gradient(config: Config) -> None:
    source = noise_loader(config, 16, 8)
    peaks, grads = [], []
    for pieces in (1, 4):
        model = stage.build(config, source, KEY, DEVICE)
        phase = model.rounds()[0].phases[0]
        batch, draws = source.draw(phase, KEY, 0, DEVICE)
        state = Training(model, [10], pieces)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        grads.append(gradient(state, phase, batch, draws, 0.5, list(state.params.values()))[1])
        peaks.append(torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated())
    assert peaks[1] < 0.6 * peaks[0]
    size = torch.stack([g.norm() for g in grads[0] if g is not None]).norm()
    for a, b in zip(*grads, strict=True):
        if a is not None and b is not None:
            assert (a - b).norm() <= 1e-4 * size


def test_the_bound_is_kept(config: Config) -> None:
    """Halfway between what a whole batch and the smallest pieces take."""
    data = config.data.model_copy(update={"grid": (48, 48, 48)})
    config = config.model_copy(update={"data": data})

    def peak(pieces: int) -> int:
        return measure(config, Request(8, 0, 8, pieces, False, 3, False, DEVICE, 1)).peak_bytes

    limit = (peak(1) + peak(8)) / 2 / memory.GIB
    train = config.train.model_copy(update={"memory_gib": limit})
    bounded = config.model_copy(update={"train": train})
    pieces, recompute = memory.fitting(bounded, noise_loader(bounded, 8, 8), DEVICE)
    assert not recompute
    assert 1 < pieces <= 8
    assert peak(pieces) <= limit * memory.GIB * 1.02


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_modules_give_the_same_steps(config: Config) -> None:
    source = noise_loader(config, 16, 8)
    plain = trained(config, source, 0)
    compiled = trained(config, source, 0)
    for module in compiled.model.modules.values():
        module.compile()
    for _ in range(2):
        a, b = (one_step(s, source, config, KEY, DEVICE, amp=False) for s in (plain, compiled))
        assert a["vae"] == pytest.approx(b["vae"], rel=1e-3)
        plain.step += 1
        compiled.step += 1
    assert set(named_state(compiled.model)) == set(named_state(plain.model)), "no name has changed"


def test_float32_is_asked_of_the_device_only_while_it_trains() -> None:
    matmul = torch.backends.cuda.matmul
    with stage.arithmetic(DEVICE, amp=True):
        assert matmul.fp32_precision == "tf32"
        with stage.arithmetic(DEVICE, amp=False):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
