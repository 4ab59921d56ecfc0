"""Optimizers on Triton's interpreter, against those on Numba, bit for bit: a script that prints a JSON of what failed.

Triton reads TRITON_INTERPRET when it is imported, for the whole process. So these cases have one of their own, which
`test_storage.py` starts; imported from there, this module only says which cases there are.
"""

import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from cases import GROUPS, PLAIN, RICH, Case, gradient
from schuss import optim
from schuss.engine.gpu import GpuBucket
from stored import (
    BLOCK_CHECKS,
    HALVES,
    ROUNDING_CHECKS,
    STORAGES,
    First,
    Trial,
    allowed,
    assert_same,
    check_steps,
)

BACKENDS = ("triton", "numba")
MIXED = (
    (700, torch.float32),
    (33, torch.bfloat16),
    (5, torch.float16),
    (17, torch.float64),
    (6, torch.complex64),
    (300, torch.float32),
    (1, torch.bfloat16),
    (0, torch.float32),
)
"""Sizes and dtypes of the parameters of one optimizer, which take a launch for each dtype."""


class Pair:
    """The same optimizer on both back ends.

    Args:
        case: which one.
        groups: hyperparameters of groups; the parameters are dealt out to them.
        shapes: elements of the parameters, or rows of matrices if the optimizer takes no vectors, with their dtypes.
        capturable: whether the numbers of the one on Triton are computed on the device.
        more: further arguments of both.
    """

    def __init__(
        self,
        case: Case,
        *,
        groups: Sequence[dict[str, Any]] = ({},),
        shapes: Sequence[tuple[int, torch.dtype]] = MIXED,
        capturable: bool = False,
        **more: Any,
    ) -> None:
        self.params, self.both = [], []
        columns = [] if case.cls.takes(torch.empty(1)) else [3]
        taken = [(n, dtype) for n, dtype in shapes if case.cls.takes_complex or not dtype.is_complex]
        for backend in BACKENDS:
            generator = torch.Generator().manual_seed(0)
            params = [
                torch.nn.Parameter(torch.randn(n, *columns, dtype=torch.complex128, generator=generator).to(dtype))
                if dtype.is_complex
                else torch.nn.Parameter(torch.randn(n, *columns, dtype=torch.float64, generator=generator).to(dtype))
                for n, dtype in taken
            ]
            parts = [{"params": params[i :: len(groups)], **group} for i, group in enumerate(groups)]
            on_device = {"capturable": True} if capturable and backend == "triton" else {}
            self.params.append(params)
            self.both.append(case.ours(parts, backend=backend, **more, **on_device))

    def step(self, seed: int, *, missing: bool = False, scale: float = 1.0, bad: bool = False) -> None:
        """One step of both; some gradients missing, all multiplied by a scale, one infinite."""
        for params, optimizer in zip(self.params, self.both, strict=True):
            for i, p in enumerate(params):
                g = gradient(p, seed, i) * scale
                if bad and i == 0:
                    g[0] = torch.inf
                p.grad = None if missing and (seed + i) % 3 == 1 else g
            optimizer.step()

    def compare(self) -> None:
        """Parameters and states are equal, and each back end did what it was to do."""
        assert_same(*self.both, to_rounding=True)
        for optimizer, backend in zip(self.both, BACKENDS, strict=True):
            assert {e.route.backend for e in optimizer.plan().entries} == {backend}

    @property
    def on_device(self) -> set[bool]:
        """Whether numbers are computed on the device, of all launches on Triton."""
        buckets = self.both[0].plan()._buckets
        assert all(isinstance(bucket, GpuBucket) for bucket in buckets)
        return {bucket.on_device for bucket in buckets}


def check_storage(case: Case, storage: str) -> None:
    """All that is stored, in blocks and not, in float32 parameters of several orders of dimensions."""
    ours, theirs = (Trial(case, storage, backend) for backend in BACKENDS)
    for step in range(2):
        ours.step(step)
        theirs.step(step)
        assert_same(ours.optimizer, theirs.optimizer, to_rounding=True)


def check_rounding(
    case: Case, rounding: str, storage: str | None = None, dtypes: Sequence[torch.dtype] = HALVES, **more: Any
) -> None:
    """Half types; with 8-bit states, of which one parameter has blocks."""
    sizes = (4100, 30) if storage == "int8" else (700, 30)
    pair = Pair(
        case, shapes=[(n, d) for n in sizes for d in dtypes], rounding=rounding, seed=3, state_dtype=storage, **more
    )
    for step in range(2):
        pair.step(step)
        pair.compare()


def check_capturable(case: Case, live: bool = False, **more: Any) -> None:
    """Numbers on the device are the host's; with `live`, the rate lies there too, and changes."""
    pair = Pair(case, shapes=[(700, torch.float32), (33, torch.float32)], capturable=True, **more)
    for step in range(3 if live else 7):  # RAdam changes its form at the sixth
        if live:
            for optimizer in pair.both:
                [group] = optimizer.param_groups
                group["lr"] = torch.tensor(0.01 / 2**step) if step == 0 else group["lr"].mul_(0.5)
        pair.step(step, missing=step > 1)
        pair.compare()
    assert pair.on_device == {True}


def check_tensor_rate(case: Case) -> None:
    """A rate that is a tensor counts with what it holds at each step."""
    pair = Pair(case, shapes=MIXED[:2], lr=torch.tensor(0.5))
    for step in range(3):
        pair.step(step)
        pair.compare()
        for optimizer in pair.both:
            optimizer.param_groups[0]["lr"].mul_(0.5)


def check_groups(case: Case, **more: Any) -> None:
    """Groups of other hyperparameters and forms, and gradients that come and go."""
    pair = Pair(case, groups=GROUPS[case.name], **more)
    for step in range(4):
        pair.step(step, missing=True)
        pair.compare()


def check_scaler(case: Case, capturable: bool) -> None:
    """What torch.amp.GradScaler sets: gradients are unscaled, and a bad step changes nothing, not even the count."""
    pair = Pair(case, shapes=[(700, torch.float32), (33, torch.float32)], capturable=capturable)
    plain = Pair(case, shapes=[(700, torch.float32), (33, torch.float32)])
    for step, bad in enumerate((True, False, False, True, False)):
        for optimizer in pair.both:
            optimizer.grad_scale, optimizer.found_inf = torch.tensor(1024.0), torch.tensor(float(bad))
        pair.step(step, scale=1024.0, bad=bad)
        for optimizer in pair.both:
            del optimizer.grad_scale, optimizer.found_inf
        if not bad:
            plain.step(step)
        if capturable and not plain.both[1].state:
            # The host does not know that the step is skipped: states are there, as they begin, with a count of 0.
            assert all(not kept["step"] for kept in pair.both[0].state.values() if "step" in kept)
            continue
        pair.compare()
        assert_same(pair.both[0], plain.both[1])


def check_first_after_a_bad_one() -> None:
    """A skipped step was not the first."""
    runs = []
    for backend, capturable in (("triton", True), ("numba", False)):
        p = torch.nn.Parameter(torch.ones(10))
        optimizer = First([p], backend=backend, capturable=capturable)
        for bad in (1.0, 0.0, 0.0):
            p.grad, optimizer.found_inf = torch.full((10,), 1.0 + bad), torch.tensor(bad)
            optimizer.step()
        runs.append(p.detach())
    assert torch.equal(*runs), f"{runs[0][0]} on the device, {runs[1][0]} on the host"


OPTIONS: dict[str, tuple[torch.dtype, dict[str, object]]] = {
    "max_norm": (torch.float32, {"max_norm": 1.0}),
    "ema": (torch.float32, {"ema_decay": 0.9, "ema_warmup": True}),
    "both-int8": (torch.float32, {"max_norm": 1.0, "clip_value": 0.01, "ema_decay": 0.9, "state_dtype": "int8"}),
    "both-bfloat16": (torch.bfloat16, {"max_norm": 0.5, "ema_decay": 0.9, "rounding": "stochastic"}),
}


def check_options(name: str, capturable: bool) -> None:
    """Clipping and averaging: the bits, and the norm, of the CPU's kernels."""
    dtype, options = OPTIONS[name]
    runs = []
    for more in ({"backend": "numba"}, {"backend": "triton", "capturable": capturable}):
        generator = torch.Generator().manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(n, generator=generator).to(dtype)) for n in (5000, 3)]
        optimizer = optim.AdamW(params, **options, **more)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
            optimizer.step()
        runs.append([*params, *(v for p in params for v in optimizer.state[p].values())])
        runs[-1].append(torch.zeros(()) if optimizer.last_grad_norm is None else optimizer.last_grad_norm)
    assert all(map(torch.equal, *runs))


def check_skips_on_the_device() -> None:
    """With capturable=True nobody waits for a norm that is no number: the device leaves the step out, and counts it."""
    p = torch.nn.Parameter(torch.ones(5000))
    optimizer = optim.AdamW([p], max_norm=1.0, nonfinite="skip", ema_decay=0.5, capturable=True, backend="triton")
    for value in (1.0, math.nan, math.inf):
        before = [t.detach().clone() for t in (p, *optimizer.state.get(p, {}).values())]
        p.grad = torch.full_like(p, value)
        optimizer.step()
    assert optimizer.skipped_steps == 2
    assert all(map(torch.equal, before, [p, *optimizer.state[p].values()]))


def cases() -> dict[str, Callable[[], None]]:
    """Every case by its name."""
    adamw, sgd = (Case(name, kwargs) for name, kwargs in (("AdamW", {}), ("SGD", {"momentum": 0.9})))
    found: dict[str, Callable[[], None]] = {}
    # There are no kernels for means of rows and columns.
    of_vectors = [case for case in RICH if "vectors" not in case.needs or case.cls.takes(torch.empty(1))]
    for case in of_vectors:
        for storage in STORAGES:
            if allowed(case, storage) and "vectors" not in case.needs:
                found[f"storage-{case.name}-{storage}"] = partial(check_storage, case, storage)
        for rounding in ("stochastic", "kahan"):  # float16 below: it is the same around the formula, whatever the rule
            found[f"rounding-{case.name}-{rounding}"] = partial(check_rounding, case, rounding, dtypes=HALVES[:1])
        if case.accepts("capturable"):
            found[f"capturable-{case.name}"] = partial(check_capturable, case)
        alike = [(n, torch.float32) for n, _ in MIXED]
        found[f"groups-{case.name}"] = partial(check_groups, PLAIN[RICH.index(case)], shapes=alike)
    for case in (PLAIN[RICH.index(case)] for case in of_vectors):
        if case.accepts("capturable"):
            found[f"capturable-rate-{case.name}"] = partial(check_capturable, case, live=True)
        found[f"tensor-rate-{case.name}"] = partial(check_tensor_rate, case)
    for case in (adamw, sgd):
        for rounding in ("stochastic", "kahan"):
            for storage in ("int8", "float32"):
                found[f"rounding-{case.name}-{rounding}-{storage}"] = partial(check_rounding, case, rounding, storage)
        for capturable in (False, True):
            if not capturable or case.accepts("capturable"):
                found[f"scaler-{case.name}{'-capturable' * capturable}"] = partial(check_scaler, case, capturable)
    found["scaler-NAdam-capturable"] = partial(check_scaler, Case("NAdam", {}), True)
    found["scaler-Lion-capturable"] = partial(check_scaler, Case("Lion", {}), True)
    for name in OPTIONS:
        for capturable in (False, True):
            found[f"options-{name}{'-capturable' * capturable}"] = partial(check_options, name, capturable)
    found["skips-on-the-device"] = check_skips_on_the_device
    found["first-after-a-bad-one"] = check_first_after_a_bad_one
    found["exact-AdamW-int8"] = partial(check_steps, adamw, "int8", "triton", 2)
    found["all-dtypes-AdamW"] = partial(check_groups, adamw)
    found["all-dtypes-AdamW-bfloat16"] = partial(check_groups, adamw, state_dtype="bfloat16")
    found["capturable-AdamW-stochastic"] = partial(check_rounding, adamw, "stochastic", capturable=True)
    found["capturable-AdamW-int8"] = partial(check_rounding, adamw, "nearest", "int8", capturable=True)
    for check in (*BLOCK_CHECKS, *ROUNDING_CHECKS):
        found[check.__name__.removeprefix("check_").replace("_", "-")] = partial(check, "triton")
    return found


def main() -> None:
    """Run all cases, or those named."""
    from schuss.engine import triton

    assert triton.interpreted(), "set TRITON_INTERPRET=1"
    failed = {}
    for name, case in cases().items():
        if sys.argv[1:] and name not in sys.argv[1:]:
            continue
        try:
            case()
        except Exception:
            failed[name] = traceback.format_exc()
    json.dump(failed, sys.stdout)


if __name__ == "__main__":
    main()
