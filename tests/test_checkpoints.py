"""Checkpoints of a whole run: going on gives the same bits; a file is whole or refused; an error changes nothing."""

import collections
import errno
import json
import math
import os
import random
import resource
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader

import schuss
from checkpoint_writer import EXAMPLES, Run, Shuffled, dataset, digest, generators
from schuss import optim
from schuss.schedules import Schedule, cosine
from schuss.training import checkpoints, files
from schuss.training.checkpoints import CheckpointError, load_checkpoint, save_checkpoint

EPOCH = math.ceil(EXAMPLES / 64)
STEPS = 3 * EPOCH + 2
SCRIPT = Path(__file__).with_name("checkpoint_writer.py")


@pytest.fixture(scope="module")
def reference() -> list[str]:
    """The digest of a run that is never stopped, after each step."""
    run = Run()
    digests = [run.digest()]
    for step in run.train():
        digests.append(run.digest())
        if step == STEPS:
            break
    return digests


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A checkpoint of a run in the middle of an epoch."""
    run = Run()
    run.train_until(EPOCH + 3)
    return run.save(tmp_path / "run")


@contextmanager
def unchanged(*runs: Run) -> Iterator[None]:
    before = [run.digest() for run in runs]
    yield
    assert [run.digest() for run in runs] == before


def other_run() -> Run:
    """One that has been trained, and differently."""
    run = Run(seed=1)
    run.train_until(2)
    return run


# --- going on ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [0, 1, EPOCH - 1, EPOCH, EPOCH + 1, 2 * EPOCH, STEPS - 1])
def test_going_on_gives_the_bits_of_never_having_stopped(stop: int, tmp_path: Path, reference: list[str]) -> None:
    first = Run()
    first.train_until(stop)
    with unchanged(first):
        path = first.save(tmp_path)
    stopped = first.step, first.epoch, first.loss
    first.train_until(STEPS)  # which saving has not changed
    assert first.digest() == reference[STEPS]
    second = other_run()  # what was trained before leaves no trace
    found = second.load(tmp_path)
    assert (found.step, found.epoch, found.loss, found.path) == (*stopped, path)
    assert second.digest() == reference[stop]
    for step in second.train():
        assert second.digest() == reference[step]
        if step == STEPS:
            break


def test_a_run_is_killed_200_times_while_it_saves(tmp_path: Path) -> None:
    """After each kill the last save that had returned is there, whole; in the end the bits are the same."""
    search = os.pathsep.join(filter(None, [str(Path(schuss.__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), "200"], env=environment, capture_output=True, text=True,
        check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert seen["same"]
    assert seen["torn"] >= 20
    assert seen["steps"] >= seen["saves"] >= 20
    assert seen["files"] == 3  # what the killed ones had begun is gone


PARAMETERS = {"state_dtype": "int8"}, {"rounding": "kahan"}, {"rounding": "stochastic"}, {"state_dtype": "bfloat16"}


@pytest.mark.parametrize("options", PARAMETERS, ids=lambda options: next(iter(options.values())))
def test_stored_states_go_on_bit_for_bit(options: dict[str, Any], tmp_path: Path) -> None:
    def build() -> tuple[nn.Module, optim.AdamW]:
        torch.manual_seed(0)
        model = nn.Linear(128, 64).bfloat16()
        return model, optim.AdamW(model.named_parameters(), lr=0.01, ema_decay=0.9, **options)

    def train(model: nn.Module, optimizer: optim.AdamW, steps: int) -> str:
        for _ in range(steps):
            for p in model.parameters():
                p.grad = torch.randn(p.shape).bfloat16()
            optimizer.step()
        return digest(model.state_dict(), optimizer.state_dict())

    first, second = build(), build()
    train(*first, 3)
    save_checkpoint(tmp_path, model=first[0], optimizer=first[1], step=3)
    load_checkpoint(tmp_path, model=second[0], optimizer=second[1])
    state = torch.get_rng_state()
    expected = train(*first, 3)
    torch.set_rng_state(state)
    assert train(*second, 3) == expected


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda _: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)], [4]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 9),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(o, 0.9)], o),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, 3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, 20),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 9),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01),
    "Schedule": lambda o: Schedule(o, lr=cosine(9), weight_decay=cosine(9)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_goes_on(name: str, tmp_path: Path) -> None:
    def build() -> tuple[Any, Any]:
        optimizer = optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9, weight_decay=0.1)
        return optimizer, SCHEDULES[name](optimizer)

    def values(optimizer: Any, schedule: Any, steps: int) -> list[tuple[float, ...]]:
        found = []
        for _ in range(steps):
            optimizer.step()
            schedule.step()
            found.append(tuple(optimizer.param_groups[0][key] for key in ("lr", "momentum", "weight_decay")))
        return found

    first, second = build(), build()
    values(*first, 3)
    save_checkpoint(tmp_path, optimizer=first[0], schedule=first[1], step=3)
    load_checkpoint(tmp_path, optimizer=second[0], schedule=second[1])
    assert values(*second, 6) == values(*first, 6)


def test_plateau_scaler_several_of_a_kind_and_an_averaged_model(tmp_path: Path) -> None:
    def build() -> dict[str, Any]:
        models = {"generator": nn.Linear(3, 2), "critic": nn.Linear(2, 1)}
        optimizers = {
            "generator": optim.AdamW(models["generator"].named_parameters(), lr=0.1),
            "critic": torch.optim.LBFGS(models["critic"].parameters(), lr=0.1),
        }
        return {
            "model": models,
            "optimizer": optimizers,
            "schedule": lr_scheduler.ReduceLROnPlateau(optimizers["generator"], patience=0),
            "scaler": torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=1),
            "average": torch.optim.swa_utils.AveragedModel(models["generator"]),
        }

    def train(of: dict[str, Any], loss: float) -> None:
        x, scaler = torch.randn(4, 3), of["scaler"]
        optimizer, critic = of["optimizer"]["generator"], of["optimizer"]["critic"]
        optimizer.zero_grad()
        scaler.scale(of["model"]["critic"](of["model"]["generator"](x)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()

        def closure() -> torch.Tensor:
            critic.zero_grad()
            value = of["model"]["critic"](x[:, :2]).square().sum()
            value.backward()
            return value

        critic.step(closure)
        of["schedule"].step(loss)
        of["average"].update_parameters(of["model"]["generator"])

    def bits(of: dict[str, Any]) -> str:
        several = (*of["model"].values(), *of["optimizer"].values())
        return digest(*(part.state_dict() for part in (*several, of["schedule"], of["scaler"], of["average"])))

    first, second = build(), build()
    for loss in (1.0, 2.0):
        train(first, loss)
    save_checkpoint(
        tmp_path, **{k: v for k, v in first.items() if k != "average"}, step=2, extra={"a": first["average"]}
    )
    found = load_checkpoint(
        tmp_path, **{k: v for k, v in second.items() if k != "average"}, extra={"a": second["average"]}
    )
    assert found.extra == {}
    assert bits(first) == bits(second)
    state = torch.get_rng_state()
    train(first, 3.0)
    torch.set_rng_state(state)
    train(second, 3.0)
    assert bits(first) == bits(second)
    assert second["scaler"].get_scale() == 64
    assert second["schedule"].get_last_lr() == [pytest.approx(0.001)]


def test_random_numbers_of_all_kinds(tmp_path: Path) -> None:
    named: dict[str, Any] = {
        "pcg": np.random.default_rng(1),
        "philox": np.random.Generator(np.random.Philox(1)),
        "mt": np.random.Generator(np.random.MT19937(1)),
        "legacy": np.random.RandomState(1),
        "python": random.Random(1),
        "torch": torch.Generator().manual_seed(1),
    }

    def draw() -> list[float]:
        normal = [of.standard_normal() for name, of in named.items() if name in ("pcg", "philox", "mt", "legacy")]
        ours = [named["python"].gauss(0, 1), torch.randn((), generator=named["torch"]).item()]
        return [*normal, *ours, random.gauss(0, 1), np.random.standard_normal(), torch.randn(()).item()]

    draw()  # the second number of a pair is kept by gauss and standard_normal
    save_checkpoint(tmp_path, step=0, extra=named)
    expected, later = draw(), draw()
    assert load_checkpoint(tmp_path, extra=named).extra == {}
    assert draw() == expected
    state = generators()
    found = load_checkpoint(tmp_path, rng=False)
    assert digest(state) == digest(generators())
    assert found.extra.keys() == named.keys()
    assert draw() == later


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).cuda()
    optimizer = optim.AdamW(model.named_parameters(), lr=torch.tensor(0.1, device="cuda"), capturable=True)
    generator = torch.Generator("cuda").manual_seed(1)

    def draw() -> list[float]:
        return [torch.rand((), device="cuda").item(), torch.rand((), device="cuda", generator=generator).item()]

    def step() -> str:
        optimizer.zero_grad()
        model(torch.randn(2, 4, device="cuda")).sum().backward()
        optimizer.step()
        return digest([p.cpu() for p in model.parameters()])

    step()
    for location in (None, "cpu", "cuda"):
        save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=1, extra={"g": generator})
        expected = draw(), step()
        load_checkpoint(tmp_path, model=model, optimizer=optimizer, map_location=location, extra={"g": generator})
        assert (draw(), step()) == expected


def test_what_of_a_data_loader_is_saved(tmp_path: Path) -> None:
    def loaders() -> dict[str, DataLoader[Any]]:
        return {
            "shuffled": DataLoader(dataset(), 64, shuffle=True, generator=torch.Generator().manual_seed(0)),
            "global": DataLoader(dataset(), 64, shuffle=True),
            "plain": DataLoader(dataset(), 64),
            "sampler": DataLoader(dataset(), 64, sampler=Shuffled(EXAMPLES)),
        }

    def epoch(of: dict[str, DataLoader[Any]]) -> str:
        return digest([[y for _, y in loader] for loader in of.values()])

    first, second = loaders(), loaders()
    epoch(first)
    save_checkpoint(tmp_path, data=first, step=0)
    expected = epoch(first)
    load_checkpoint(tmp_path, data=second)
    assert epoch(second) == expected
    with pytest.raises(CheckpointError, match=r"saved of the loader: loader\.generator, .* to load here: nothing"):
        load_checkpoint(tmp_path, data=second | {"shuffled": DataLoader(dataset())})


class Position(DataLoader[Any]):
    """Like torchdata's StatefulDataLoader: asked for its state, it makes the iterator that the next loop uses."""

    def state_dict(self) -> dict[str, Any]:
        torch.rand(())
        return {"made": True}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


def test_a_loader_that_draws_a_seed_when_it_starts(tmp_path: Path) -> None:
    """It has drawn its seed when the generators are saved, and again before they are restored."""
    save_checkpoint(tmp_path, data=Position(dataset()), step=0)
    expected = torch.rand(3)
    load_checkpoint(tmp_path, data=Position(dataset()))
    assert torch.equal(torch.rand(3), expected)


# --- values -----------------------------------------------------------------------------------------------------------

leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 200), 1 << 200), st.just(-(1 << 9999)), st.floats(), st.text(),
    st.binary(), st.complex_numbers(), st.floats().map(np.float64), st.integers(0, 255).map(np.uint8),
    st.lists(st.integers(0, 2**31)).map(lambda x: np.array(x, dtype=np.uint64)),
    st.lists(st.floats(width=32)).map(lambda x: torch.tensor(x, dtype=torch.bfloat16)),
    st.sampled_from([torch.float32, torch.device("cpu"), torch.Size([2, 3])]),
)  # fmt: skip
keys = st.one_of(st.text(), st.integers(), st.tuples(st.text(), st.booleans()))
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner), st.lists(inner).map(tuple), st.dictionaries(keys, inner), st.sets(keys),
        st.dictionaries(keys, inner).map(collections.OrderedDict), st.lists(st.text()).map(collections.Counter),
    ),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=values)
def test_plain_values_come_back(value: Any, tmp_path: Path) -> None:
    file = save_checkpoint(tmp_path / "v.schuss", extra={"value": value})
    found = load_checkpoint(file, rng=False).extra["value"]
    assert type(found) is type(value)
    assert digest(found) == digest(value)


class Colour:
    pass


def nothing() -> None:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, Colour()]}, r"extra\['x'\]\['a'\]\[1\] is of type Colour, which cannot be loaded without running"),
        (nothing, r"extra\['x'\] is of type function"),
        (Path("a"), r"extra\['x'\] is of type PosixPath"),
        ({Colour: 1}, r"extra\['x'\] has <class .*Colour'> \(type\) for a key; use other strings and numbers"),
        ({"schuss: array": 1}, r"has 'schuss: array' \(str\) for a key"),
        ({b""}, r"extra\['x'\] has b'' \(bytes\) for a key"),
        (np.array([1], dtype=">i8"), r"is of NumPy's dtype >i8"),
        (np.array(["a"]), r"extra\['x'\] is of NumPy's dtype <U1, which torch does not have"),
        (np.array([Colour()]), r"is of NumPy's dtype object"),
        (torch.ones(2, device="meta"), r"extra\['x'\] is a tensor on the meta device"),
        (torch.ones(2).as_subclass(type("DTensor", (torch.Tensor,), {})), r"is a DTensor, .* torch.distributed"),
    ],
    ids=lambda argument: argument if isinstance(argument, str) else type(argument).__name__,
)
def test_what_no_file_holds_is_refused_before_anything_is_written(value: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        save_checkpoint(tmp_path / "new", step=0, extra={"x": value})
    assert not (tmp_path / "new").exists()


def test_names_that_are_taken(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"save_checkpoint: extra has 'schuss: x' \(str\) for a key"):
        save_checkpoint(tmp_path, step=0, extra={"schuss: x": 1})
    save_checkpoint(tmp_path, step=0, extra={"": 1})
    assert load_checkpoint(tmp_path).extra == {"": 1}


def test_a_state_that_no_file_holds_is_named(tmp_path: Path) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1)
    optimizer.param_groups[0]["shape"] = nothing
    with pytest.raises(TypeError, match=r"save_checkpoint: optimizer\['g'\]\['param_groups'\]\[0\]\['shape'\] is of"):
        save_checkpoint(tmp_path, optimizer={"g": optimizer}, step=0)
    assert [*tmp_path.iterdir()] == []


def test_torch_reads_the_file(saved: Path) -> None:
    payload = torch.load(saved, weights_only=True)
    assert payload["step"] == EPOCH + 3
    Run().model.load_state_dict(payload["parts"]["model", ""]["state"])


def test_arguments(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    model, optimizer = nn.Linear(2, 2), optim.SGD([nn.Parameter(torch.ones(2))], ema_decay=0.9)
    for error, match, arguments in [
        (ValueError, "step is needed to name a file", {"step": None}),
        (ValueError, r"step must be in \[0, inf\), got -1", {"step": -1}),
        (TypeError, r"epoch must be an integer, got 1\.5", {"epoch": 1.5}),
        (ValueError, r"keep_last must be None or in \[1, inf\), got 0", {"keep_last": 0}),
        (
            TypeError,
            "schedule must have state_dict and load_state_dict, or be a dict .* got list",
            {"schedule": []},
        ),
        (TypeError, r"model\['a'\] must have state_dict", {"model": {"a": 3}}),
    ]:
        with pytest.raises(error, match=match):
            save_checkpoint(tmp_path, **{"step": 0, **arguments})
    with pytest.raises(ValueError, match=r"notes\.txt is a file whose name does not end in \.schuss"):
        save_checkpoint(tmp_path / "notes.txt", step=1)
    with pytest.raises(TypeError, match=r"load_checkpoint: extra\['best'\] must have .* plain values are in what"):
        load_checkpoint(tmp_path, extra={"best": 0.3})
    save_checkpoint(tmp_path, model=model, optimizer=optimizer, step=0)
    with optimizer.averaged():
        for call in (save_checkpoint, load_checkpoint):
            with pytest.raises(RuntimeError, match=r"optimizer is inside averaged\(\)"):
                call(tmp_path / "a.schuss", optimizer=optimizer)


# --- files that are refused -------------------------------------------------------------------------------------------


def test_a_file_that_is_cut_short_is_refused(saved: Path) -> None:
    whole, run = saved.read_bytes(), other_run()
    for sixteenth in range(16):
        saved.write_bytes(whole[: len(whole) * sixteenth // 16])
        with unchanged(run), pytest.raises(CheckpointError, match="cut short" if sixteenth else "the file is empty"):
            run.load(saved)
    for wrong in (whole[:-1], whole + b"\0", whole + whole, whole[1:]):
        saved.write_bytes(wrong)
        with unchanged(run), pytest.raises(CheckpointError, match=r"step-0+10\.schuss: the (end|file)"):
            run.load(saved)


def test_a_flipped_bit_is_noticed(saved: Path) -> None:
    whole, run = saved.read_bytes(), other_run()
    chance = random.Random(0)
    places = [*chance.sample(range(len(whole) * 8), 200), *range(len(whole) * 8 - 56 * 8, len(whole) * 8, 7)]
    with unchanged(run):
        for place in places:
            broken = bytearray(whole)
            broken[place // 8] ^= 1 << place % 8
            saved.write_bytes(broken)
            with pytest.raises(CheckpointError, match=r"damaged|were written"):
                run.load(saved)


def test_a_folder_gives_the_newest_file_that_is_whole(tmp_path: Path) -> None:
    first, second = Run(), other_run()
    digests = {}
    for step in (5, 6, 7):
        first.train_until(step)
        first.save(tmp_path)
        digests[step] = first.digest()
    newest = tmp_path / "step-00000007.schuss"
    newest.write_bytes(newest.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match=r"step-00000007\.schuss: the end of a checkpoint is .*Loads step-00000006"):
        assert second.load(tmp_path).step == 6
    assert second.digest() == digests[6]
    for path in tmp_path.iterdir():
        path.write_bytes(b"x" * 100)
    second = other_run()
    with unchanged(second), pytest.raises(CheckpointError, match=r"all checkpoints are damaged.*07.*06.*05"):
        second.load(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint \(step-\*\.schuss\) in the folder"):
        load_checkpoint(tmp_path.parent)
    with pytest.raises(FileNotFoundError):
        load_checkpoint(tmp_path / "none")


class Hostile:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


def write(payload: Any, path: Path) -> None:
    with path.open("wb") as file:
        files.write(payload, file)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    mark, path, run = tmp_path / "was here", tmp_path / "step-00000009.schuss", other_run()
    run.save(tmp_path)
    write({"format": 1, "model": Hostile(mark)}, path)
    for target in (path, tmp_path):  # a folder's is no reason to fall back: somebody has made it so
        with (
            unchanged(run),
            pytest.raises(CheckpointError, match=r"09\.schuss: .* refuses it: .* code to run, .*trust"),
        ):
            run.load(target)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # it would have run


@pytest.mark.parametrize(
    ("payload", "message"),
    [
        ([], "not as save_checkpoint writes it"),
        ({"format": 1}, "not as save_checkpoint writes it"),
        ({"format": 2}, "format 2, of a newer schuss"),
        ({"schuss: array": 3}, r"torch\.load\(weights_only=True\) refuses it"),
        ("model", "model cannot be loaded"),
        ("optimizer", "optimizer cannot be loaded: it is not such a state"),
        ("data", "data cannot be loaded"),
        ("rng", "python cannot be loaded"),
    ],
    ids=str,
)
def test_other_data_is_refused(payload: Any, message: str, saved: Path) -> None:
    if isinstance(payload, str):
        part, payload = payload, torch.load(saved, weights_only=True)
        if part == "rng":
            payload["rng"]["python"] = {"version": 3, "numbers": torch.zeros(3), "gauss": None}
        else:
            payload["parts"][part, ""]["state"] = ["of another kind"]
    write(payload, saved)
    run = other_run()
    with unchanged(run), pytest.raises(CheckpointError, match=message):
        run.load(saved)


# --- what does not fit ------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    def save(model: nn.Module) -> None:
        save_checkpoint(tmp_path, model=model, step=0)

    class Own(nn.Linear):
        """Checks by itself, as many layers do: what was loaded before it fails is put back."""

        def _load_from_state_dict(self, *args: Any) -> None:
            super()._load_from_state_dict(*args)

    for layer in (nn.Linear, Own):
        save(nn.Sequential(layer(2, 3), layer(3, 4)))
        for model, message in [
            (nn.Sequential(layer(2, 3), layer(3, 5)), r"1\.weight"),
            (nn.Sequential(layer(2, 3)), r"1\.weight"),
            (nn.Sequential(layer(2, 3), layer(3, 4), layer(4, 2)), r"2\.weight"),
        ]:
            before = digest(model.state_dict(), generators())
            with pytest.raises(CheckpointError, match=rf"(?s)model cannot be loaded: .*{message}.*Nothing has been"):
                load_checkpoint(tmp_path, model=model)
            assert digest(model.state_dict(), generators()) == before
        larger = nn.Sequential(layer(2, 3), layer(3, 4), layer(4, 2))
        load_checkpoint(tmp_path, model=larger, strict=False)
        assert torch.equal(
            larger[1].weight, torch.load(tmp_path / "step-00000000.schuss")["parts"]["model", ""]["state"]["1.weight"]
        )


def test_an_optimizer_that_does_not_fit_changes_nothing(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    names = [*model.named_parameters()]
    first = optim.AdamW(names, lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    first.step()
    save_checkpoint(tmp_path, model=model, optimizer=first, step=1)
    for other, message in [
        (optim.AdamW([{"params": names[:1]}, {"params": names[1:]}]), "saved with 1 parameter groups, and there are 2"),
        (optim.AdamW(model[0].parameters()), "group 0 was saved with 4 parameters, and has 2"),
        (optim.AdamW(names[:3]), "parameter names do not match: only in the state dict: 1.bias"),
        (torch.optim.AdamW(names[::-1]), "the parameters of group 0 have other names, or another order"),
        (optim.AdamW([*reversed([p for _, p in names])]), "'exp_avg' of parameter 0 of group 0 has the shape"),
        (optim.SGD(names), "it was saved of AdamW, this is SGD; strict=False loads it anyway"),
    ]:
        fresh = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
        before = digest(fresh.state_dict(), other.state_dict(), generators())
        with pytest.raises(CheckpointError, match=f"optimizer cannot be loaded: .*{message}"):
            load_checkpoint(tmp_path, model=fresh, optimizer=other)
        assert digest(fresh.state_dict(), other.state_dict(), generators()) == before
    theirs = torch.optim.AdamW(names, lr=0.3)
    load_checkpoint(tmp_path, model=model, optimizer=theirs)
    assert digest(theirs.state_dict()["state"]) == digest(first.state_dict()["state"])


def test_parts_that_are_missing_or_forgotten(tmp_path: Path, saved: Path) -> None:
    run = other_run()
    parts, scaler = run.parts, torch.amp.GradScaler("cpu")
    with (
        unchanged(run),
        pytest.raises(CheckpointError, match=r"scaler cannot be loaded, for the file holds model, opt"),
    ):
        load_checkpoint(saved, **parts, scaler=scaler)
    without = {name: part for name, part in parts.items() if name != "schedule"}
    with unchanged(run), pytest.raises(CheckpointError, match=r"schedule of the file has no object to load into"):
        load_checkpoint(saved, **without)
    with unchanged(run), pytest.raises(CheckpointError, match=r"optimizer\['g'\] cannot be loaded"):
        load_checkpoint(saved, optimizer={"g": run.optimizer})
    with unchanged(run), pytest.raises(CheckpointError, match=r"extra\['digest'\] cannot be loaded"):
        load_checkpoint(saved, extra={"digest": run.noise})
    schedule = lr_scheduler.StepLR(run.optimizer, 3)
    with unchanged(run), pytest.raises(CheckpointError, match=r"schedule cannot be loaded: .* this is StepLR"):
        load_checkpoint(saved, **without, schedule=schedule)
    with pytest.warns(UserWarning, match="scaler cannot be loaded, .* schedule of the file has no object .* left out"):
        load_checkpoint(saved, **without, scaler=scaler, strict=False)


def test_a_schedule_for_other_groups(tmp_path: Path) -> None:
    def build(*sizes: int) -> Any:
        optimizer = torch.optim.SGD([{"params": [nn.Parameter(torch.ones(n))]} for n in sizes], lr=0.1)
        return lr_scheduler.StepLR(optimizer, 3)

    save_checkpoint(tmp_path, schedule=build(1), step=0)
    with pytest.raises(CheckpointError, match="saved for 1 parameter groups, and there are 2"):
        load_checkpoint(tmp_path, schedule=build(1, 2))


def test_only_the_model(saved: Path) -> None:
    run, before = Run(), generators()
    found = load_checkpoint(saved, model=run.model, rng=False)
    assert found.step == EPOCH + 3
    assert digest(before) == digest(generators())
    first = Run()
    first.train_until(EPOCH + 3)
    assert digest(run.model.state_dict()) == digest(first.model.state_dict())
    assert run.optimizer.state == {}


class Fragile:
    """Fails when it is loaded, as the last of all."""

    def state_dict(self) -> dict[str, int]:
        return {"a": 1}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        if state_dict["a"] == 1:
            raise KeyError("a")


def test_a_late_error_puts_everything_back(tmp_path: Path) -> None:
    first = Run()
    first.train_until(4)
    save_checkpoint(
        tmp_path,
        **{**first.parts, "data": Fragile()},
        extra={**first.generators, "loader": first.loader.sampler},
        step=4,
    )
    run = other_run()
    state, groups = run.optimizer.state, run.optimizer.param_groups
    extra = {**run.generators, "loader": run.loader.sampler}
    with unchanged(run), pytest.raises(CheckpointError, match=r"data cannot be loaded: 'a'\. data cannot be put back"):
        load_checkpoint(tmp_path, **{**run.parts, "data": Fragile()}, extra=extra)
    assert run.optimizer.state is state
    assert run.optimizer.param_groups is groups


def test_map_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of a device that is missing here; random numbers stay on the CPU wherever tensors go."""
    model = nn.Linear(2, 2)
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        save_checkpoint(tmp_path, model=model, step=0)
    if not torch.cuda.is_available():
        with pytest.raises(CheckpointError, match=r"If a device is missing here, give map_location"):
            load_checkpoint(tmp_path, model=nn.Linear(2, 2))
    other = nn.Linear(2, 2)
    for location in ("cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, _: storage):
        load_checkpoint(tmp_path, model=other, map_location=location)
        assert torch.equal(model.weight, other.weight)


# --- writing ----------------------------------------------------------------------------------------------------------


def test_the_order_that_makes_it_durable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step=step, keep_last=2)
    done: list[str] = []

    def note(module: Any, name: str, text: Callable[..., str]) -> None:
        original = getattr(module, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            done.append(text(*args))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, noted)

    note(os, "fsync", lambda fd: "sync " + ("folder" if os.path.isdir(f"/proc/self/fd/{fd}") else "file"))
    note(os, "replace", lambda _, new: f"name {Path(new).name}")
    note(Path, "unlink", lambda path: f"remove {path.name}")
    save_checkpoint(tmp_path, step=3, keep_last=2)
    assert done == ["sync file", "name step-00000003.schuss", "sync folder", "remove step-00000001.schuss"]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 1, 5_000, 300_000, 999_999])
def test_a_file_that_cannot_grow_leaves_the_old_ones(size: int, tmp_path: Path) -> None:
    extra = {"x": torch.zeros(250_000)}
    kept = save_checkpoint(tmp_path, step=1, extra=extra)
    whole = kept.read_bytes()
    with largest_file(size), pytest.raises(OSError, match="too large") as raised:
        save_checkpoint(tmp_path, step=2, extra=extra, keep_last=1)
    assert raised.value.errno == errno.EFBIG
    assert "while saving" in raised.value.__notes__[0]
    assert names(tmp_path) == [kept.name]
    assert kept.read_bytes() == whole


@pytest.mark.parametrize(
    ("call", "code"),
    [("fsync", errno.ENOSPC), ("replace", errno.EACCES), ("write", errno.ENOSPC), ("fsync", errno.EIO)],
)
def test_a_full_disk_and_no_permission(call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = save_checkpoint(tmp_path, step=1)

    def fail(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    if call == "write":
        monkeypatch.setattr(checkpoints, "write", fail)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        save_checkpoint(tmp_path, step=2, keep_last=1)
    assert "earlier checkpoints are as they were" in raised.value.__notes__[0]
    assert names(tmp_path) == [kept.name]


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is forbidden to root")
def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(PermissionError):
        save_checkpoint(tmp_path, step=2)


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(files._Sink, "write", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(tmp_path, step=2)
    assert names(tmp_path) == []


def test_the_last_ones_are_kept(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"  # made with its parents
    for step in range(6):
        assert save_checkpoint(folder, step=step).name == f"step-{step:08d}.schuss"
    save_checkpoint(folder / "best.schuss", step=0)
    assert names(folder) == ["best.schuss", *(f"step-0000000{step}.schuss" for step in (3, 4, 5))]
    damaged = folder / "step-00000005.schuss"
    damaged.write_bytes(b"")
    save_checkpoint(folder, step=6, keep_last=2)  # what is damaged does not count, and stays
    assert names(folder) == ["best.schuss", *(f"step-0000000{step}.schuss" for step in (4, 5, 6))]
    save_checkpoint(folder, step=10**9, keep_last=None)
    assert load_checkpoint(folder).step == 10**9
    with pytest.warns(UserWarning, match="later steps than 4, step-1000000000.schuss the last; load_checkpoint takes"):
        save_checkpoint(folder, step=4, keep_last=1)  # the file itself stays, though others are newer
    assert load_checkpoint(folder / "step-00000004.schuss").step == 4
    assert load_checkpoint(folder).step == 10**9


def test_leftovers_are_removed_but_not_what_is_being_written(tmp_path: Path) -> None:
    dead = tmp_path / f".step-00000001.schuss.{'0' * 16}.tmp"
    foreign = tmp_path / ".other.tmp"
    dead.write_bytes(b"half")
    foreign.write_bytes(b"not ours")
    with files.replacing(tmp_path / "step-00000007.schuss") as file:
        (live,) = {*tmp_path.iterdir()} - {dead, foreign}
        save_checkpoint(tmp_path, step=2)
        assert not dead.exists()
        assert live.exists()
        file.write(b"written")
    assert (tmp_path / "step-00000007.schuss").read_bytes() == b"written"
    assert names(tmp_path) == [".other.tmp", "step-00000002.schuss", "step-00000007.schuss"]


@pytest.mark.filterwarnings("ignore:.*later steps")
def test_many_save_and_load_at_once(tmp_path: Path) -> None:
    """Threads that save steps of their own, and all the same step; what is loaded is always whole."""
    errors: list[BaseException] = []

    def save(offset: int) -> None:
        try:
            for i in range(12):
                for step in (4 * i + offset + 1, 1000):
                    save_checkpoint(tmp_path, step=step, extra={"step": step, "x": torch.full((20_000,), offset)})
        except BaseException as error:
            errors.append(error)

    save_checkpoint(tmp_path, step=0, extra={"step": 0, "x": torch.zeros(20_000)})
    threads = [threading.Thread(target=save, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    loaded = 0
    while any(thread.is_alive() for thread in threads):
        found = load_checkpoint(tmp_path, rng=False)
        assert found.extra["step"] == found.step
        assert found.extra["x"].unique().numel() == 1
        loaded += 1
    assert errors == []
    assert loaded > 3
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


# --- many processes ---------------------------------------------------------------------------------------------------


def test_the_first_process_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(2, 2)
    path = save_checkpoint(tmp_path, model=model, step=1)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    assert save_checkpoint(tmp_path / "never", model=model, step=1).name == path.name
    assert names(tmp_path) == [path.name]
    other, state = nn.Linear(2, 2), torch.get_rng_state()
    with pytest.warns(UserWarning, match="random numbers of process 0, not of process 1"):
        load_checkpoint(tmp_path, model=other)
    assert torch.equal(other.weight, model.weight)
    assert torch.equal(state, torch.get_rng_state())
    sharded = nn.Sequential(type("FullyShardedDataParallel", (nn.Module,), {})())
    with pytest.raises(TypeError, match=r"model is sharded over processes; use torch\.distributed\.checkpoint"):
        save_checkpoint(tmp_path, model=sharded, step=2)


def test_wrappers_of_torch_are_looked_through(tmp_path: Path) -> None:
    model, other = nn.Linear(2, 2), nn.Linear(2, 2)
    compiled = nn.Module()
    compiled._orig_mod = nn.DataParallel(model)
    save_checkpoint(tmp_path, model=compiled, step=1)
    load_checkpoint(tmp_path, model=other)
    assert torch.equal(other.weight, model.weight)


def test_random_numbers_of_a_missing_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = checkpoints.generators_here()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "generators_here", lambda: ours | {"cuda:31": torch.Generator()})
        save_checkpoint(tmp_path, step=0)
    with pytest.warns(UserWarning, match="random numbers of cuda:31, which this machine lacks"):
        load_checkpoint(tmp_path)
    with warnings.catch_warnings():
        load_checkpoint(tmp_path, rng=False)
