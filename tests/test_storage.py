"""States stored in fewer bits than they are computed in: how far off, how many bytes, through checkpoints, in training.

The checks of one back end are in `stored.py`. Those of Triton run in its interpreter, which takes a process of its own:
`triton_interpreted.py` runs there, and each of its cases is a test here.
"""

import copy
import fcntl
import importlib.util
import io
import json
import os
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cases import PLAIN, RICH, Case, each, exact_matrices, gradient, randn
from schuss import optim
from schuss.engine.storage import BLOCK, MAPS
from stored import (
    BLOCK_CHECKS,
    NAMES,
    ORDERS,
    SIGNED,
    SIZE,
    STORAGES,
    UNSIGNED,
    Trial,
    allowed,
    assert_same,
    bits,
    by_blocks,
    cell,
    check_codes,
    check_run,
    check_steps,
    kept,
    map_error,
    shares,
    states,
)
from triton_interpreted import cases as triton_cases

BACKENDS = ("numba", "foreach", "reference")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
ADAMW, MOMENTUM = Case("AdamW", {"lr": 0.01}), Case("SGD", {"lr": 0.1, "momentum": 0.9})


def stored(cases: list[Case], storages: tuple[str, ...] = STORAGES) -> Callable[[Any], Any]:
    """Parametrize by cases and the storages that each may have; the function of matrices of some is in float64."""
    pairs = [pytest.param(c, s, id=f"{c}-{s}") for c in cases for s in storages if allowed(c, s)]
    return lambda test: exact_matrices(pytest.mark.parametrize(("case", "storage"), pairs)(test))


ROUGHLY = [case for case in RICH if "matrices" not in case.needs]
"""Those whose steps are products of powers of states: a function of matrices may make more of an error."""


# --- numbers ----------------------------------------------------------------------------------------------------------


@stored(RICH)  # the form with all states: what they are stored as has nothing to do with the rule's flags
def test_a_step_is_exact_and_rounds_its_state_once(case: Case, storage: str) -> None:
    check_steps(case, storage, "numba")


@pytest.mark.parametrize("backend", ["foreach", "reference"])
@stored(RICH)
def test_a_step_of_eager_torch(case: Case, storage: str, backend: str) -> None:
    check_steps(case, storage, backend, 3)


@stored(ROUGHLY)
def test_a_few_steps_stay_within_the_bound(case: Case, storage: str) -> None:
    check_run(case, storage, "numba")


@pytest.mark.parametrize("backend", ["foreach", "reference"])
@stored(ROUGHLY)
def test_a_few_steps_of_eager_torch(case: Case, storage: str, backend: str) -> None:
    check_run(case, storage, backend)


@stored(RICH)
def test_back_ends_store_the_same(case: Case, storage: str) -> None:
    check_codes(case, storage, BACKENDS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("check", BLOCK_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_blocks(check: Callable[[str], None], backend: str) -> None:
    check(backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_parameters_keep_wider_states(backend: str) -> None:
    """A bfloat16 parameter with float32 states is rounded once, at the end; its gradients are exact here."""
    p = torch.nn.Parameter(torch.ones(SIZE, dtype=torch.bfloat16))
    optimizer = MOMENTUM.ours([p], state_dtype="float32", backend=backend)
    x, b = torch.ones(SIZE), torch.zeros(SIZE)
    for step in range(3):
        p.grad = gradient(p, step)
        optimizer.step()
        b = np.float32(0.9) * b + p.grad.float()
        x = (x - np.float32(0.1) * b).bfloat16().float()
        assert torch.equal(optimizer.state[p]["momentum_buffer"], b)
        assert torch.equal(p.detach().float(), x)


# --- Triton, in a process of its own ----------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What failed, case by case. The workers of a parallel run share one process: the first one starts it."""
    folder = tmp_path_factory.getbasetemp()
    if os.environ.get("PYTEST_XDIST_WORKER"):
        folder = folder.parent
    result = folder / "triton_interpreted.json"
    with (folder / "triton_interpreted.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            script = Path(__file__).with_name("triton_interpreted.py")
            environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
            command = [sys.executable, "-W", "error", str(script)]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            failed = json.loads(ran.stdout) if ran.returncode == 0 else dict.fromkeys(triton_cases(), ran.stderr)
            result.write_text(json.dumps(failed), encoding="utf-8")
    return json.loads(result.read_text(encoding="utf-8"))


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.parametrize("name", triton_cases())
def test_triton(interpreted: dict[str, str], name: str) -> None:
    assert name not in interpreted, interpreted[name]


# --- maps -------------------------------------------------------------------------------------------------------------


def encoded(dtype: torch.dtype, share: torch.Tensor) -> torch.Tensor:
    """The codes of shares."""
    return MAPS[dtype].encode(share).trunc().int()


@pytest.mark.parametrize(("dtype", "shift"), [(SIGNED, 1), (UNSIGNED, 2)])
def test_shares_are_chords_of_a_power(dtype: torch.dtype, shift: int) -> None:
    """Between powers of two, of share and code, the bits of a float32 are linear in it: so is one in the other."""
    top = MAPS[dtype].top
    origin = int(np.float32(top).view(np.int32)) - (int(np.float32(1).view(np.int32)) >> shift)

    def as_int(x: np.ndarray) -> np.ndarray:
        return x.astype(np.float32).view(np.int32)

    ends = np.exp2(np.arange(-40, 1.0))
    codes = np.exp2(np.arange(1.0, np.log2(top)))
    corners = dict(zip(((as_int(ends) >> shift) + origin).view(np.float32), ends, strict=True))
    corners |= dict(zip(codes, ((as_int(codes) - origin) << shift).view(np.float32), strict=True))
    x, y = zip(*sorted(corners.items()), strict=True)
    np.testing.assert_allclose(shares(dtype)[2:], np.interp(np.arange(2, top + 1), x, y), rtol=1e-6)
    assert shares(dtype)[[0, -1]].tolist() == [0, 1]
    power = (np.arange(top + 1) / top) ** (1 << shift)  # which a chord never leaves by more than its height
    assert ((shares(dtype)[1:].numpy() / power[1:]).clip(1) <= 2.0 ** (1 << shift) / 2).all()


@pytest.mark.parametrize("dtype", MAPS)
def test_maps(dtype: torch.dtype) -> None:
    """Each share has the code it came from, codes grow with shares, errors are what neighbouring codes make them."""
    table = shares(dtype)
    assert (table.diff() > 0).all()
    assert torch.equal(encoded(dtype, table.float()), torch.arange(len(table)).int())
    share = torch.cat([torch.linspace(0, 1, 200_001), torch.logspace(-30, 0, 200_001)]).clamp(max=1).sort().values
    codes = encoded(dtype, share)
    assert (codes.diff() >= 0).all()
    error = (table[codes] - share.double()).abs()
    assert (error <= map_error(dtype, share)).all()
    assert error.max() <= table.diff().max() / 2 + 1e-6
    if dtype == SIGNED:
        assert torch.equal(encoded(dtype, -share), -codes)
        assert torch.equal(MAPS[dtype].decode(-codes.float()), -MAPS[dtype].decode(codes.float()))
    else:
        assert (codes >= 1).equal(share > 0)


def test_a_momentum_without_gradients_vanishes() -> None:
    """Every code falls when its value decays by a tenth, so that after as many steps as there are codes all are 0."""
    table, codes = shares(SIGNED).float(), torch.arange(128)
    stuck = codes[1:][encoded(SIGNED, 0.9 * table[1:]) >= codes[1:]]
    assert not len(stuck), f"codes {stuck.tolist()} stay where they are"
    p = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = optim.SGD([p], lr=1, momentum=0.9, state_dtype="int8")
    for step in range(128):
        p.grad = torch.zeros(SIZE)
        p.grad[::BLOCK] = 1.0 if step == 0 else 0.1  # keeps the absmax where it is
        if step == 0:
            p.grad[1:128] = table[1:]
        optimizer.step()
    assert not cell(optimizer, p, "momentum_buffer").values[1:128].any()


PUBLISHED = {
    SIGNED: {0.1: 0.062, 0.01: 0.11, 1e-3: 0.18, 1e-4: 0.276},
    UNSIGNED: {0.1: 0.033, 0.01: 0.062, 1e-3: 0.11, 1e-4: 0.18, 1e-6: 0.466},
}
"""Largest relative errors of the dynamic map of Dettmers et al. 2021, of shares not smaller than these."""
FACTOR = {SIGNED: {0.1: 0.51, 0.01: 0.9, 1e-3: 1.65, 1e-4: 2.7}, UNSIGNED: dict.fromkeys(PUBLISHED[UNSIGNED], 0.62)}
"""Ours are better or worse by that: a root has its codes where a block has its elements, and few at tiny shares."""


@pytest.mark.parametrize("dtype", MAPS)
def test_errors_beside_the_published_map(dtype: torch.dtype) -> None:
    share = torch.logspace(-6, 0, 400_001, dtype=torch.float64).float().clamp(max=1)
    relative = (shares(dtype)[encoded(dtype, share)] - share.double()).abs() / share
    for least, published in PUBLISHED[dtype].items():
        assert relative[share >= least].max() <= FACTOR[dtype][least] * published, least
    half_a_gap = shares(dtype).diff().max().item() / 2
    assert half_a_gap == 1 / 128
    assert half_a_gap <= {SIGNED: 1.13 * 0.00703125, UNSIGNED: 2.24 * 0.003515625}[dtype]  # the published ones


def test_mean_error_of_normal_numbers() -> None:
    """In blocks of 256 the published map has a mean error of 0.00854, a linear one 0.00598."""
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).view(-1, BLOCK)
    absmax = x.abs().amax(1, keepdim=True)
    error = (MAPS[SIGNED].decode(encoded(SIGNED, x / absmax).float()) * absmax - x).abs().mean()
    assert error < 0.00598


# --- what is stored how -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_small_and_complex_tensors_keep_their_values(backend: str) -> None:
    params = [torch.nn.Parameter(randn(n, dtype=dtype)) for n, dtype in (
        (4095, torch.float32), (4096, torch.float32), (4095, torch.bfloat16), (5000, torch.complex64),
        (5000, torch.float64), (0, torch.float32),
    )]  # fmt: skip
    optimizer = optim.AdamW(params, state_dtype="int8", backend=backend)
    for p in params:
        p.grad = gradient(p, 1)
    optimizer.step()
    found = [states(optimizer, p)["exp_avg"].storage.dtype for p in params]
    assert found == [torch.float32, torch.int8, torch.float32, torch.complex64, torch.int8, torch.float32]
    assert states(optimizer, params[1])["exp_avg_sq"].storage.dtype == torch.uint8
    assert set(optimizer.state[params[1]]) == {
        "step", "exp_avg_codes", "exp_avg_absmax", "exp_avg_sq_codes", "exp_avg_sq_absmax",
    }  # fmt: skip
    assert optimizer.state[params[1]]["exp_avg_absmax"].shape == (16,)


def test_a_subclass_keeps_its_values() -> None:
    class Sub(torch.Tensor):
        pass

    p = torch.randn(5000).as_subclass(Sub)
    optimizer = optim.AdamW([p], state_dtype="int8")
    p.grad = torch.randn(5000)
    optimizer.step()
    assert states(optimizer, p)["exp_avg"].storage.dtype == torch.float32
    assert "tensor subclass Sub" in str(optimizer.plan())


@stored(RICH)
def test_bytes(case: Case, storage: str) -> None:
    """What the plan says before the first step is what the tensors take after it."""
    trial = Trial(case, storage, "numba")
    said = trial.optimizer.plan().state_bytes
    trial.step(0)
    tensors = [c for p in trial.params for s in states(trial.optimizer, p).values() for c in s.tensors]
    assert said == sum(t.nbytes for t in tensors) == trial.optimizer.plan().state_bytes


def test_bytes_of_adamw() -> None:
    """2 x (1 + 4 / 256) bytes per element, where float32 takes 8; Kahan's rounding adds one more of the parameter's."""
    p = torch.nn.Parameter(torch.zeros(100 * BLOCK))
    assert optim.AdamW([p], state_dtype="int8").plan().state_bytes == 100 * BLOCK * 2 * (1 + 4 / 256)
    assert optim.AdamW([p], state_dtype="bfloat16").plan().state_bytes == 100 * BLOCK * 2 * 2
    assert optim.AdamW([p]).plan().state_bytes == 100 * BLOCK * 2 * 4
    half = torch.nn.Parameter(p.detach().bfloat16())
    assert optim.AdamW([half], rounding="kahan").plan().state_bytes == 100 * BLOCK * 3 * 2


def test_plan_says_what_is_stored_and_why() -> None:
    params = [("wide", torch.nn.Parameter(torch.zeros(64, 64))), ("bias", torch.nn.Parameter(torch.zeros(64)))]
    complex_one = ("phase", torch.nn.Parameter(torch.zeros(64, 64, dtype=torch.complex64)))
    text = str(optim.AdamW([*params, complex_one], state_dtype="int8").plan())
    assert re.search(r"wide +64x64 +float32 +int8 +numba", text)
    assert re.search(r"bias +64 +float32 +float32 \(under 4,096 elements\) +numba", text)
    assert re.search(r"phase +64x64 +complex64 +complex64 \(complex\) +numba", text)
    text = str(optim.AdamW(params, state_dtype={"exp_avg": "bfloat16"}).plan())
    assert re.search(r"wide +64x64 +float32 +exp_avg bfloat16, exp_avg_sq float32 +numba", text)
    assert "state" not in str(optim.AdamW(params).plan()).splitlines()[4].split()


def test_states_by_name() -> None:
    p = torch.nn.Parameter(torch.randn(SIZE))
    p.grad = torch.randn(SIZE)
    optimizer = optim.AdamW([p], amsgrad=True, state_dtype={"exp_avg": torch.bfloat16, "exp_avg_sq": "int8"})
    optimizer.step()
    found = {name: c.storage.dtype for name, c in states(optimizer, p).items()}
    assert found == {"exp_avg": torch.bfloat16, "exp_avg_sq": torch.uint8, "max_exp_avg_sq": torch.float32}


def test_sparse_gradients() -> None:
    """Of 8-bit states, blocks without a gradient stay as they are."""
    table = torch.nn.Parameter(torch.randn(64, BLOCK))
    optimizer = optim.Adagrad([table], state_dtype="int8", lr=0.1)
    for rows in ([3, 5], [5, 60]):
        before = copy.deepcopy(optimizer.state[table])
        table.grad = torch.sparse_coo_tensor(
            torch.tensor([rows]), torch.randn(2, BLOCK), table.shape, check_invariants=True
        )
        optimizer.step()
        for key, value in before.items():
            if key.endswith("_codes"):
                changed = (value != optimizer.state[table][key]).any(1).nonzero().flatten().tolist()
                assert set(changed) <= set(rows)
                assert changed
    assert optimizer.plan().entries[0].route.backend == "reference"


# --- checkpoints ------------------------------------------------------------------------------------------------------


def resaved(state_dict: Any) -> Any:
    """Through a file, without pickled code."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def trained(case: Case, storage: str | None, steps: int = 3, **more: Any) -> Trial:
    """After some steps."""
    trial = Trial(case, storage, "numba", **more)
    for step in range(steps):
        trial.step(step)
    return trial


def successor(trial: Trial, case: Case, storage: str | None, state_dict: Any = None, **more: Any) -> Trial:
    """The same parameters, another optimizer, which has loaded the first one's state."""
    other = Trial(case, storage, "numba", **more)
    with torch.no_grad():
        for p, q in zip(other.params, trial.params, strict=True):
            p.copy_(q)
    other.optimizer.load_state_dict(resaved(trial.optimizer.state_dict() if state_dict is None else state_dict))
    return other


@stored(RICH)
def test_resuming_is_not_stopping(case: Case, storage: str) -> None:
    trial = trained(case, storage)
    other = successor(trial, case, storage)
    assert_same(trial.optimizer, other.optimizer)
    for step in (3, 4):
        trial.step(step)
        other.step(step)
    assert_same(trial.optimizer, other.optimizer)


@pytest.mark.parametrize(
    "make", [copy.deepcopy, lambda trial: pickle.loads(pickle.dumps(trial))], ids=["copy", "pickle"]
)
@pytest.mark.parametrize("storage", STORAGES)
def test_copies_continue(storage: str, make: Callable[[Trial], Trial]) -> None:
    trial = trained(ADAMW, storage)
    other = make(trial)
    for each_one in (trial, other):
        each_one.step(3)
    assert_same(trial.optimizer, other.optimizer)
    assert other.optimizer._options == trial.optimizer._options


@pytest.mark.parametrize("before", [None, *STORAGES])
@pytest.mark.parametrize("after", [None, *STORAGES])
def test_states_are_stored_as_the_loading_optimizer_says(before: str | None, after: str | None) -> None:
    """Without a wish as they were saved; else rounded once, which floats do not lose by going to float32."""
    trial = trained(ADAMW, before)
    other = successor(trial, ADAMW, after)
    for p, q in zip(trial.params, other.params, strict=True):
        for name, old in states(trial.optimizer, p).items():
            new = cell(other.optimizer, q, name)
            wanted = DTYPES[after] if after else None
            if wanted == torch.int8:
                wanted = torch.float32 if p.numel() < 4096 else UNSIGNED if name == "exp_avg_sq" else SIGNED
            assert new.storage.dtype == (wanted or old.storage.dtype)
            x, y = old.read(torch.float32), new.read(torch.float32)
            if new.storage.dtype in (old.storage.dtype, torch.float32):
                assert torch.equal(bits(x), bits(y))
            elif new.storage.blockwise:
                absmax = by_blocks(x).abs().amax(1, keepdim=True)
                bound = map_error(new.storage.dtype, by_blocks(x) / absmax) * absmax
                assert ((by_blocks(x) - by_blocks(y)).abs() <= bound).all()
            else:
                assert torch.equal(y, x.bfloat16().float())
    other.step(3)
    trial.step(3)
    assert all((p - q).abs().max() < 2 * 0.01 for p, q in zip(trial.params, other.params, strict=True))


def torch_pair(case: Case, trial: Trial) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """The same parameters under torch's optimizer."""
    params = [torch.nn.Parameter(p.detach().clone()) for p in trial.params]
    return params, case.theirs(params)


@each([Case(c.name, c.kwargs) for c in [*PLAIN, MOMENTUM] if allowed(c, "int8")], torch_has=True)
def test_to_torch_and_back(case: Case) -> None:
    """torch goes on from the values of portable codes; schuss from torch's values, each rounded once."""
    trial = trained(case, "int8")
    params, theirs = torch_pair(case, trial)
    theirs.load_state_dict(resaved(trial.optimizer.state_dict(portable=True)))
    for i, p in enumerate(params):
        p.grad = gradient(trial.params[i], 3, i)
    theirs.step()
    trial.step(3)
    for p, q in zip(params, trial.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    back = successor(trial, case, "int8", theirs.state_dict())
    for p, q in zip(params, back.params, strict=True):
        for name, c in states(back.optimizer, q).items():
            assert bool(c.storage.blockwise) == (c.values.numel() >= 4096)
            x, y = by_blocks(theirs.state[p][name]), by_blocks(c.read(torch.float32))
            absmax = x.abs().amax(1, keepdim=True)
            bound = map_error(UNSIGNED if c.storage.dtype == UNSIGNED else SIGNED, x / absmax) * absmax
            assert ((x - y).abs() <= bound).all()
    back.step(4)


@each([c for c in PLAIN if allowed(c, "int8") and c.name not in ("SGD", "Muon")], torch_has=True)
def test_torch_does_not_take_codes_for_values(case: Case) -> None:
    """Its SGD and Muon make a buffer that they miss."""
    trial = trained(case, "int8")
    params, theirs = torch_pair(case, trial)
    theirs.load_state_dict(trial.optimizer.state_dict())
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad = torch.ones_like(p)
    with pytest.raises(AssertionError if case.name == "Adafactor" else KeyError):
        theirs.step()
    assert all(map(torch.equal, params, before))


def test_torch_sgd_gathers_anew() -> None:
    """Its buffer may be missing; it, too, does not take codes for values."""
    trial = trained(MOMENTUM, "int8")
    params, theirs = torch_pair(MOMENTUM, trial)
    theirs.load_state_dict(trial.optimizer.state_dict())
    for p in params:
        p.grad = torch.ones_like(p)
    theirs.step()
    assert all((theirs.state[p]["momentum_buffer"] == 1).all() for p in params if p.numel() >= 4096)


@pytest.mark.parametrize("order", ORDERS)
def test_into_another_order_of_memory(order: str) -> None:
    """Blocks are made anew where other elements are neighbours; values move by one rounding, and none elsewhere."""
    here = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    there = ORDERS[order](here)
    p, optimizer = kept("numba", there.contiguous())
    q = torch.nn.Parameter(torch.empty_like(there))
    assert q.stride() != p.stride()
    other = type(optimizer)([q], state_dtype="int8")
    other.load_state_dict(resaved(optimizer.state_dict()))
    for name, dtype in NAMES.items():
        x, y = (cell(o, t, name).read(torch.float32) for o, t in ((optimizer, p), (other, q)))
        c = cell(other, q, name)
        assert c.values.stride() == q.stride()
        x = by_blocks(torch.empty_like(q).copy_(x))
        absmax = x.abs().amax(1, keepdim=True)
        assert torch.equal(c.beside, absmax.flatten())
        assert ((by_blocks(y) - x).abs() <= map_error(dtype, x / absmax) * absmax).all()
    q.grad = torch.empty_like(q).copy_(there)
    other.step()
    assert other.plan().entries[0].route.backend == "numba"


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no absmax": (lambda kept: kept.pop("exp_avg_absmax"), "has 'exp_avg_codes' of .*, but no 'exp_avg_absmax'"),
    "no codes": (lambda kept: kept.pop("exp_avg_codes"), "has 'exp_avg_absmax' of .*, but no 'exp_avg_codes'"),
    "short absmax": (
        lambda kept: kept.update(exp_avg_sq_absmax=torch.ones(16)),
        r"'exp_avg_sq_absmax' of parameter 0 of group 0 has the shape \(16,\) .* needs \(17,\)",
    ),
    "short codes": (
        lambda kept: kept.update(exp_avg_codes=torch.zeros(9, dtype=torch.int8)),
        r"'exp_avg_codes' of parameter 0 of group 0 has the shape \(9,\) .* needs \(4100,\)",
    ),
    "values": (lambda kept: kept.update(exp_avg_codes=torch.zeros(SIZE)), "exp_avg_codes.*float32"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(damage: str) -> None:
    """An error, and nothing changed."""
    make, message = DAMAGES[damage]
    trial, other = trained(ADAMW, "int8"), trained(ADAMW, "int8", 2)
    state_dict = trial.optimizer.state_dict()
    state_dict["state"] = {i: dict(kept) for i, kept in state_dict["state"].items()}
    make(state_dict["state"][0])
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match=f"AdamW: .*{message}"):
        other.optimizer.load_state_dict(state_dict)
    assert_same(other.optimizer, before.optimizer)
    other.step(2)
    before.step(2)
    assert_same(other.optimizer, before.optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_absmax_of_another_dtype(dtype: torch.dtype) -> None:
    """Who casts a checkpoint casts absmax, too: kernels must not take its memory for float32."""
    trial = trained(ADAMW, "int8")
    state_dict = trial.optimizer.state_dict()
    state_dict["state"] = {
        i: {k: v.to(dtype) if k.endswith("_absmax") else v for k, v in kept.items()}
        for i, kept in state_dict["state"].items()
    }
    try:
        other = successor(trial, ADAMW, "int8", state_dict)
    except ValueError:
        return
    for p, q in zip(trial.params[:2], other.params, strict=False):
        for name in ("exp_avg", "exp_avg_sq"):
            a, b = cell(trial.optimizer, p, name), cell(other.optimizer, q, name)
            assert b.beside is not None
            assert b.beside.dtype == torch.float32
            torch.testing.assert_close(a.beside, b.beside, rtol=2.0**-8, atol=0)


@pytest.mark.parametrize("storage", STORAGES)
def test_distributed_checkpoints(storage: str) -> None:
    """torch.distributed.checkpoint's functions, which work without a process group."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def model() -> tuple[torch.nn.Module, Any]:
        torch.manual_seed(0)
        layers = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.Linear(70, 3))
        return layers, optim.AdamW(layers.parameters(), state_dtype=storage)

    def step(layers: torch.nn.Module, optimizer: Any, seed: int) -> None:
        for i, p in enumerate(layers.parameters()):
            p.grad = gradient(p, seed, i)
        optimizer.step()

    (ours, our_optimizer), (other, other_optimizer) = model(), model()
    step(ours, our_optimizer, 0)
    saved = resaved(get_optimizer_state_dict(ours, our_optimizer))
    assert ("exp_avg_codes" in saved["state"]["0.weight"]) == (storage == "int8")
    other.load_state_dict(ours.state_dict())
    set_optimizer_state_dict(other, other_optimizer, saved)
    assert_same(our_optimizer, other_optimizer)
    step(ours, our_optimizer, 1)
    step(other, other_optimizer, 1)
    assert_same(our_optimizer, other_optimizer)


def test_add_param_group() -> None:
    """A later group is stored like the others, and an exact rule's is refused."""
    p, q = (torch.nn.Parameter(torch.randn(SIZE)) for _ in range(2))
    optimizer = optim.RMSprop([p], state_dtype="int8")
    optimizer.add_param_group({"params": [q], "momentum": 0.9})
    for t in (p, q):
        t.grad = torch.randn(SIZE)
    optimizer.step()
    assert {n: c.storage.dtype for n, c in states(optimizer, q).items()} == {
        "square_avg": UNSIGNED, "momentum_buffer": SIGNED,
    }  # fmt: skip
    with pytest.raises(ValueError, match="RMSprop: state_dtype of 'square_avg' must be float32 or bfloat16"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))], "centered": True})
    assert len(optimizer.param_groups) == 2


def test_loading_a_form_that_must_be_exact() -> None:
    """The saved groups' hyperparameters are taken over: they may ask for what cannot be in 8 bits."""
    centered = Case("RMSprop", {"centered": True})
    trial, other = trained(centered, None), trained(Case("RMSprop", {}), "int8")
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match="RMSprop: state_dtype of 'square_avg' must be float32 or bfloat16"):
        other.optimizer.load_state_dict(trial.optimizer.state_dict())
    assert_same(other.optimizer, before.optimizer)


def test_strict_false_keeps_codes() -> None:
    """Parameters without a namesake keep their codes; the others get the saved ones."""

    def named(names: str, seed: int) -> tuple[list[torch.Tensor], Any]:
        params = [torch.nn.Parameter(torch.zeros(SIZE)) for _ in names]
        optimizer = optim.AdamW(list(zip(names, params, strict=True)), state_dtype="int8")
        for i, p in enumerate(params):
            p.grad = gradient(p, seed, i)
        optimizer.step()
        return params, optimizer

    (_, there), (params, here) = named("ab", 1), named("bc", 2)
    kept_c = copy.deepcopy(here.state[params[1]])
    with pytest.warns(UserWarning, match="loaded only what has the same name"):
        here.load_state_dict(there.state_dict(), strict=False)
    theirs = there.state[there.param_groups[0]["params"][1]]
    for key in theirs:
        assert torch.equal(here.state[params[0]][key], theirs[key])
        assert torch.equal(here.state[params[1]][key], kept_c[key])


# --- errors -----------------------------------------------------------------------------------------------------------

ONE_OF = "one of float32, bfloat16, int8, got"
ERRORS: list[tuple[str, dict[str, Any], str]] = [
    *(
        ("AdamW", {"state_dtype": wrong}, rf"^AdamW: state_dtype must be {ONE_OF} {told}$")
        for wrong, told in (
            ("float16", "'float16'"), ("fp8", "'fp8'"), (torch.float16, r"torch\.float16"), (8, "8"), (True, "True"),
            (torch.uint8, r"torch\.uint8"), ("torch.int8", r"'torch\.int8'"), (["int8"], r"\['int8'\]"),
        )
    ),
    ("Lion", {"state_dtype": {"exp_avg": "int4"}}, rf"^Lion: state_dtype\['exp_avg'\] must be {ONE_OF} 'int4'$"),
    ("Lion", {"state_dtype": {"exp_avg": None}}, rf"^Lion: state_dtype\['exp_avg'\] must be {ONE_OF} None$"),
    ("AdamW", {"state_dtype": {"exp_avg_squ": "int8"}}, "^AdamW: state_dtype names 'exp_avg_squ', .*exp_avg_sq"),
    ("AdamW", {"state_dtype": {"step": "int8"}}, "^AdamW: state_dtype names 'step', which is no state that can be"),
    ("Rprop", {"state_dtype": "int8"}, "^Rprop: state_dtype of 'prev' must be float32 or bfloat16, .*; got int8$"),
    ("Rprop", {"state_dtype": {"step_size": "int8"}}, "^Rprop: state_dtype of 'step_size' must be .*; got int8$"),
    ("ASGD", {"state_dtype": torch.int8}, "^ASGD: state_dtype of 'ax' must be float32 or bfloat16, .*; got int8$"),
    ("RMSprop", {"centered": True, "state_dtype": "int8"}, "^RMSprop: state_dtype of 'square_avg' must be .* int8$"),
    (
        "RMSprop",
        {"centered": True, "state_dtype": {"grad_avg": "int8"}},
        "^RMSprop: state_dtype of 'grad_avg' must be .* int8$",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("name", "kwargs", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors(name: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Case(name, kwargs).ours([torch.zeros(3)])


def test_what_need_not_be_exact_may_be_in_eight_bits() -> None:
    """Of a centered RMSprop the buffer may; and a group that is not centered beside one that is not in 8 bits."""
    optim.RMSprop([torch.zeros(3)], centered=True, momentum=0.9, state_dtype={"momentum_buffer": "int8"})
    optim.RMSprop([torch.zeros(3)], state_dtype="int8")
    optim.SGD([torch.zeros(3)], state_dtype="int8")  # no momentum: no state, and nothing to store


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits() -> tuple[torch.Tensor, ...]:
    """Training images and labels, then test images and labels."""
    from sklearn.datasets import load_digits

    x, y = load_digits(return_X_y=True)
    x, y = torch.tensor(x / 16, dtype=torch.float32), torch.tensor(y)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return x[order[:1400]], y[order[:1400]], x[order[1400:]], y[order[1400:]]


def final(digits: tuple[torch.Tensor, ...], seed: int, storage: str | None) -> tuple[float, float]:
    """Test accuracy and loss of a small network after 12 epochs."""
    x, y, test_x, test_y = digits
    torch.manual_seed(seed)
    layers = [torch.nn.Linear(*sizes) for sizes in ((64, 128), (128, 64), (64, 10))]
    model = torch.nn.Sequential(layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2])
    optimizer = optim.AdamW(model.parameters(), lr=1e-3, state_dtype=storage)
    for _ in range(12):
        for batch in torch.randperm(len(x)).split(50):
            loss = torch.nn.functional.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert (storage == "int8") == any("exp_avg_codes" in kept for kept in optimizer.state.values())
    with torch.no_grad():
        out = model(test_x)
        accuracy = (out.argmax(1) == test_y).float().mean()
        return accuracy.item(), torch.nn.functional.cross_entropy(out, test_y).item()


def test_training_in_eight_bits(digits: tuple[torch.Tensor, ...]) -> None:
    """Means over the same five seeds differ by less than the standard error of float32's."""
    wide, narrow = (np.array([final(digits, seed, s) for seed in range(5)]) for s in (None, "int8"))
    assert wide[:, 0].mean() > 0.95
    assert (np.abs(narrow.mean(0) - wide.mean(0)) <= wide.std(0, ddof=1) / np.sqrt(5)).all(), (wide, narrow)
    assert not np.array_equal(wide, narrow)
