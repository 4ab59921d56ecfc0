"""What tests of stored states and of rounding share, in this process and in Triton's interpreter."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from cases import Case, gradient
from schuss import Optimizer
from schuss.engine.state import COMPENSATION, Cell, find, flat
from schuss.engine.storage import BLOCK, MAPS, keys, random_bits, stream
from schuss.formula import absolute, where
from schuss.rule import State
from schuss.testing import has_sums

STORAGES = ("float32", "bfloat16", "int8")
SIGNED, UNSIGNED = torch.int8, torch.uint8
SIZE = 16 * BLOCK + 4
"""Of a parameter that is stored in blocks, the last one not full."""


class Keep(Optimizer):
    """Stores a gradient, and its size, and hands out what was stored before as the parameter."""

    states = {"m": "signed", "v": State("unsigned", nonnegative=True)}
    has_step = False

    def __init__(self, params: Any, unsigned: bool = False, **options: Any) -> None:
        super().__init__(params, {"unsigned": unsigned}, **options)

    @staticmethod
    def rule(p, g, m, v, unsigned):
        return (v if unsigned else m), g, absolute(g)


class Move(Optimizer):
    """p + lr * g, computed in float32: all that happens is rounding."""

    def __init__(self, params: Any, lr: float = 1.0, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)

    @staticmethod
    def rule(p, g, lr):
        return p + lr * g


class First(Optimizer):
    """Gathers gradients, the first one twice; keeps no count, and can be captured."""

    states = {"b": "buffer"}
    has_step = False

    def __init__(self, params: Any, lr: float = 0.1, capturable: bool = False, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "capturable": capturable}, **options)

    @staticmethod
    def scalars(first):
        return {"gather": where(first, 2.0, 1.0)}

    @staticmethod
    def rule(p, g, b, lr, gather):
        b = 0.5 * b + gather * g
        return p - lr * b, b


def allowed(case: Case, storage: str) -> bool:
    """Whether a rule's states may be stored so: small differences decide in those that may not."""
    exact = case.name in ("Rprop", "ASGD", "AdEMAMix", "Prodigy") or case.kwargs.get("centered")
    wide = case.name.startswith("ScheduleFree")  # z is a place, as the parameter is
    # Kernels that go by rows do not load blocks of 8-bit codes.
    return not (storage == "int8" and (exact or case.name == "NorMuon")) and not (storage != "float32" and wide)


def cell(optimizer: torch.optim.Optimizer, p: torch.Tensor, name: str) -> Cell:
    """What holds a state."""
    found = find(optimizer.state[p], name)
    assert found is not None, f"no {name} among {list(optimizer.state[p])}"
    return found


def states(optimizer: Any, p: torch.Tensor) -> dict[str, Cell]:
    """The cells of a parameter's states by name."""
    found = {s.name: find(optimizer.state[p], s.name) for s in optimizer._rule.states.values()}
    return {name: c for name, c in found.items() if c is not None}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's bits, all NaN alike, in the order of memory."""
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    if not real.is_floating_point():
        return real.clone()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[real.element_size()]
    return torch.where(real.isnan(), torch.full_like(real, torch.nan), real).view(integer)


def assert_same(ours: Any, theirs: Any, *, to_rounding: bool = False) -> None:
    """Parameters and states of two optimizers are equal bit for bit, on whatever device their numbers are.

    Numbers that are made of sums, to rounding: kernels add in an order of their own. With `to_rounding`, all that is
    made of sums, too.
    """
    if to_rounding and has_sums(ours):
        _assert_near(ours, theirs)
        return
    sums = set(ours._rule.number_states.values())
    pairs = zip(_params(ours), _params(theirs), strict=True)
    for i, (p, q) in enumerate(pairs):
        assert torch.equal(bits(p), bits(q)), f"parameter {i}: {_difference(p, q)}"
        a, b = ours.state.get(p, {}), theirs.state.get(q, {})
        assert list(a) == list(b), f"state of {i}: {list(a)} {list(b)}"
        for key in a:
            assert a[key].dtype == b[key].dtype, f"{key} of {i}"
            if key in sums:
                torch.testing.assert_close(a[key].cpu(), b[key].cpu(), rtol=1e-12, atol=1e-14)
                continue
            assert torch.equal(bits(a[key]), bits(b[key])), f"{key} of {i}: {_difference(a[key], b[key])}"


def _assert_near(ours: Any, theirs: Any) -> None:
    """Equal to rounding: codes to the next one, bfloat16 and float16 to the next number."""
    for i, (p, q) in enumerate(zip(_params(ours), _params(theirs), strict=True)):
        a, b = {"p": p} | ours.state.get(p, {}), {"p": q} | theirs.state.get(q, {})
        assert list(a) == list(b), f"state of {i}: {list(a)} {list(b)}"
        for key in a:
            x, y = a[key].detach().cpu(), b[key].detach().cpu()
            assert x.dtype == y.dtype, f"{key} of {i}"
            if not x.is_floating_point() and not x.is_complex():
                assert (x.int() - y.int()).abs().max() <= 1, f"{key} of {i}"
                continue
            eps = max(4 * torch.finfo(x.dtype).eps, 1e-5)
            like = p.detach().cpu() if key == COMPENSATION else y
            largest = float(like.abs().max()) if like.numel() else 0.0
            torch.testing.assert_close(x, y, rtol=eps, atol=eps * largest, equal_nan=True, msg=f"{key} of {i}")


def _params(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _difference(a: torch.Tensor, b: torch.Tensor) -> str:
    differ = bits(a) != bits(b)
    where = differ.nonzero()[0].tolist()
    return f"{int(differ.sum())} of {differ.numel()} bits differ, first at {where}: {a.detach()} {b.detach()}"


# --- how far a stored value may be from the exact one -----------------------------------------------------------------


@cache
def shares(dtype: torch.dtype) -> torch.Tensor:
    """What the codes from 0 on stand for, in float64."""
    codes = torch.arange(MAPS[dtype].top + 1, dtype=torch.float32)
    return MAPS[dtype].decode(codes).double()


def map_error(dtype: torch.dtype, share: torch.Tensor) -> torch.Tensor:
    """The most by which the code of a share can be off.

    Two thirds of the gap between neighbouring codes, the wider one where a share lies near a code: half of it, were it
    not for gaps with a corner of the map inside. Of the smallest signed codes a whole gap: those are rounded down. Of
    the unsigned map all of its smallest code, since nothing but zero becomes zero.
    """
    table, share = shares(dtype), share.abs().double()
    gaps = torch.cat([table.diff(), table[-1:] - table[-2:-1]])
    below = (torch.searchsorted(table, share, right=True) - 1).clamp(0, len(gaps) - 1)
    error = torch.maximum(gaps[below], gaps[(below + 1).clamp(max=len(gaps) - 1)]) * (2 / 3)
    whole = (below <= 14) if dtype == SIGNED else (below == 0)
    # 1e-6: shares are float32, and multiplied by a rounded reciprocal.
    return torch.where(share == 0, 0.0, torch.where(whole, gaps[below], error)) + 1e-6 * share


def by_blocks(tensor: torch.Tensor) -> torch.Tensor:
    """[block, element] in the order of memory, the last one filled with zeros."""
    values = flat(tensor.detach())
    return torch.nn.functional.pad(values, (0, -values.numel() % BLOCK)).view(-1, BLOCK)


def storage_error(c: Cell, exact: torch.Tensor) -> torch.Tensor:
    """The most by which storing can change exact values, element by element in the order of memory."""
    if c.storage.blockwise:
        rows = by_blocks(exact)
        largest = rows.abs().amax(1, keepdim=True).clamp(min=1e-300)
        return (map_error(c.storage.dtype, rows / largest) * largest).reshape(-1)[: exact.numel()]
    return flat(exact).abs() * (2.0**-8 if c.storage.dtype == torch.bfloat16 else 2.0**-24)


ARITHMETIC = 2e-6
"""Of the largest element: what a step in float32 may differ from one in float64, as `schuss.testing` has it."""


class Trial:
    """Parameters in blocks, in another order of dimensions, and too small for blocks; and an optimizer of them."""

    def __init__(self, case: Case, storage: str | None, backend: str, **more: Any) -> None:
        generator = torch.Generator().manual_seed(0)

        def uniform(*shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.rand(shape, generator=generator) * 2 - 1)

        self.params = [uniform(SIZE), uniform(70, 60), uniform(30)]
        if not case.needs:  # else kernels want rows one after the other
            self.params[1].data = self.params[1].data.t()
        self.params = [torch.nn.Parameter(case.fit(p.detach())) for p in self.params]
        self.optimizer = case.ours(self.params, backend=backend, state_dtype=storage, **more)

    def step(self, seed: int) -> None:
        """One step with normal gradients."""
        for i, p in enumerate(self.params):
            p.grad = gradient(p, seed, i)
        self.optimizer.step()

    def follow(self, other: "Trial") -> None:
        """Take over parameters and state."""
        with torch.no_grad():
            for p, q in zip(self.params, other.params, strict=True):
                p.copy_(q)
        self.optimizer.load_state_dict(other.optimizer.state_dict())


def exact_copy(case: Case, trial: Trial) -> tuple[list[torch.Tensor], Any]:
    """The same parameters in float64, and an optimizer of them that goes on from what was stored, exactly."""
    params = [torch.nn.Parameter(p.detach().double()) for p in trial.params]
    exact = case.ours(params, backend="reference")
    for p, q in zip(params, trial.params, strict=True):
        numbers = {k: v.clone() for k, v in trial.optimizer.state.get(q, {}).items() if v.dim() == 0}
        values = {n: c.read(torch.float64).clone() for n, c in states(trial.optimizer, q).items()}
        if kept := numbers | values:
            exact.state[p].update(kept)
    return params, exact


def check_steps(case: Case, storage: str, backend: str, steps: int = 4) -> None:
    """Each step computes what exact arithmetic computes from what is stored; new states are off by one rounding."""
    if case.name == "Rprop":  # its rate is the first value of a state, and exact in every storage then
        case = Case(case.name, case.kwargs | {"lr": 2.0**-7})
    if case.accepts("precondition_frequency"):  # eigenvectors in float32 and in float64 are others; none are looked for
        case = Case(case.name, case.kwargs | {"precondition_frequency": 100})
    trial = Trial(case, storage, backend)
    for step in range(steps):
        params, exact = exact_copy(case, trial)
        for i, p in enumerate(params):
            p.grad = gradient(trial.params[i], step, i).double()
        exact.step()
        trial.step(step)
        for i, (p, q) in enumerate(zip(params, trial.params, strict=True)):
            assert (q - p).abs().max() <= ARITHMETIC * p.abs().max(), f"parameter {i} after step {step}"
            for name, c in states(trial.optimizer, q).items():
                if step == 0 and name in ("left_basis", "right_basis"):  # but for those that SOAP begins with
                    continue
                wanted = exact.state[p][name]
                error = flat(c.read(torch.float64) - wanted).abs()
                bound = storage_error(c, wanted) + ARITHMETIC * wanted.abs().max()
                assert (error <= bound).all(), f"{name} of {i} after step {step}: {(error / bound).max():.3f} bounds"


def relative_error(storage: str, least: float) -> float:
    """The largest relative error of values of at least that share of their block's largest."""
    if storage != "int8":
        return 2.0**-8 if storage == "bfloat16" else 2.0**-24
    share = torch.linspace(least, 1, 100_001, dtype=torch.float64)
    return max((map_error(dtype, share) / share).max().item() for dtype in (SIGNED, UNSIGNED))


def check_run(case: Case, storage: str, backend: str) -> None:
    """How far a few steps lead away from exact state.

    Gradients keep their signs and lie in [1, 2] in size, so that the states of a block are of one size (`LEAST`) and
    no sum cancels: then a mean of old state and gradient has at most the relative error of the old state, and storing
    adds d to it, (1 + d)^k - 1 after k steps. A step is a product of powers of states. Of all rules the largest powers
    are Adamax's m / u, two errors of k; Adadelta's delta has half an error of its v and half of its u, to which deltas
    added theirs: (1 + 2 + ... + k) / 2 + k / 2. Both are 10 for the 5 times that a state is read in 6 steps.
    """
    least, steps, powers = 0.1, 6, 10
    trial = Trial(case, storage, backend, **({"lr": 0.01} if "lr" in case.kwargs else {}))
    start = [p.detach().double() for p in trial.params]
    params = [torch.nn.Parameter(p.clone()) for p in start]
    exact = case.ours(params, backend="reference", **({"lr": 0.01} if "lr" in case.kwargs else {}))
    path = [torch.zeros_like(p) for p in start]
    generator = torch.Generator().manual_seed(1)
    signs = [torch.empty_like(p).copy_(torch.randint(2, p.shape, generator=generator) * 2 - 1) for p in start]
    for _ in range(steps):
        if case.name == "Adan":  # which keeps differences of gradients: of different ones they are of all sizes
            generator.manual_seed(1)
        for p, q, sign in zip(params, trial.params, signs, strict=True):
            g = torch.empty_like(q).copy_(sign * (1 + torch.rand(sign.shape, generator=generator)))
            p.grad, q.grad = g.double(), g.detach()
        before = [p.detach().clone() for p in params]
        exact.step()
        trial.optimizer.step()
        for total, p, b in zip(path, params, before, strict=True):
            total += (p.detach() - b).abs()
    bound = (1 + relative_error(storage, least)) ** powers - 1
    for p, q, total in zip(params, trial.params, path, strict=True):
        for name, c in states(trial.optimizer, q).items():
            if c.storage.blockwise:
                rows = [flat(exact.state[p][name])[i : i + BLOCK].abs() for i in range(0, p.numel(), BLOCK)]
                assert all(row.min() >= least * row.max() for row in rows), "not of one size"
        error = (q.double() - p).abs()
        assert (error <= bound * total + steps * ARITHMETIC).all(), f"{(error / total).max():.3f} > {bound:.3f}"


def has_roots(case: Case) -> bool:
    """Whether a root goes into a state. Torch may be an ulp off there, and other operations make more of it.

    So may it where a state is multiplied by what is made of sums: eager torch rounds the numbers in it before.
    """
    names = ("Adadelta", "ADOPT", "LaProp", "ScheduleFreeAdamW", "ScheduleFreeRAdam", "LARS", "MARS", "Prodigy")
    roots = case.name in names or (case.name in ("RMSprop", "Shampoo") and "momentum" in case.kwargs)
    return roots or "vectors" in case.needs  # the means of rows and columns are sums


def check_codes(case: Case, storage: str, backends: Sequence[str], steps: int = 4) -> None:
    """From the same state, back ends store the same bits; a neighbouring code where roots are a bit off."""
    trials = [Trial(case, storage, backend) for backend in backends]
    for step in range(steps):
        for trial in trials:
            if step and trial is not trials[0]:
                trial.follow(trials[0])
        for trial in trials:
            trial.step(step)
        for other in trials[1:]:
            for i, (p, q) in enumerate(zip(trials[0].params, other.params, strict=True)):
                for name, b in states(other.optimizer, q).items():
                    a, what = cell(trials[0].optimizer, p, name), f"{name} of {i} after step {step}"
                    assert a.storage == b.storage, what
                    if not has_roots(case):
                        for x, y in zip(a.tensors, b.tensors, strict=True):
                            assert torch.equal(bits(x), bits(y)), f"{what}: {_difference(x, y)}"
                    elif a.storage.blockwise:
                        assert (a.values.int() - b.values.int()).abs().max() <= 1, what
                    else:
                        x, y = a.read(torch.float64), b.read(torch.float64)
                        ulp = 2.0**-7 * x.abs() if storage == "bfloat16" else 0
                        assert ((x - y).abs() <= ulp + ARITHMETIC * x.abs().max()).all(), what


# --- blocks, by each back end -----------------------------------------------------------------------------------------


def kept(backend: str, *gradients: torch.Tensor, unsigned: bool = False) -> tuple[torch.Tensor, Keep]:
    """A parameter after steps of `Keep` with these gradients, and the optimizer."""
    p = torch.nn.Parameter(torch.empty_like(gradients[0]))
    optimizer = Keep([p], unsigned=unsigned, state_dtype="int8", backend=backend)
    for g in gradients:
        p.grad = g
        optimizer.step()
    return p, optimizer


ABSMAX = (2.0**-126, 2.0**-100, 1e-30, 1e-10, 0.1, 1 / 3, 1.0, 1.5, 3.0, 255.0, 1e10, 1e30, 2.0**126, 2.0**127, 3.4e38)
NAMES = {"signed": SIGNED, "unsigned": UNSIGNED}


def check_every_code(backend: str) -> None:
    """What a code stands for has that code, the absmax itself is exact, and reading returns the same again."""
    for name, dtype in NAMES.items():
        share = shares(dtype).float()
        codes = torch.arange(len(share))
        if dtype == SIGNED:
            share, codes = torch.cat([-share[1:].flip(0), share]), torch.cat([-codes[1:].flip(0), codes])
        block = torch.nn.functional.pad(share, (0, BLOCK - len(share)))
        codes = torch.nn.functional.pad(codes, (0, BLOCK - len(codes))).to(dtype)
        absmax = torch.tensor([*ABSMAX, 1.0, 0.7])
        g = (block * absmax[:, None]).reshape(-1)[: 16 * BLOCK + 4]
        absmax[16] = g[16 * BLOCK :].abs().max()
        p, optimizer = kept(backend, g, g, unsigned=dtype == UNSIGNED)
        c = cell(optimizer, p, name)
        assert c.storage.dtype == dtype
        assert c.beside is not None
        # of the tail a few codes are there, with an absmax of their own; shares of an absmax so small are subnormal
        got, normal = by_blocks(c.values)[:16], (g.abs() >= 2.0**-126).view(-1)[: 16 * BLOCK].view(16, BLOCK)
        assert torch.equal(c.beside, absmax)
        wrong = (got != codes) & (normal | (codes == 0) | (dtype == SIGNED))
        assert not wrong.any(), f"{name}: {wrong.nonzero()[0]} {got[wrong][0]}"
        assert torch.equal(bits(p), bits(c.read(torch.float32))), name
        assert (c.values != 0).equal(g != 0), name


def check_blocks_are_separate(backend: str) -> None:
    """An outlier changes the codes of its block, the last and shorter one included, and no others."""
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))
    for place in (0, 5 * BLOCK + 7, SIZE - 1):
        other = g.clone()
        other[place] = 1e6
        (p, plain), (q, with_outlier) = kept(backend, g), kept(backend, other)
        for name in NAMES:
            a, b = (by_blocks(cell(o, x, name).values) for o, x in ((plain, p), (with_outlier, q)))
            assert (a != b).any(1).nonzero().flatten().tolist() == [place // BLOCK]


def check_zero_and_tiny(backend: str) -> None:
    """Zero stays zero, nothing else becomes zero where it is divided by, and subnormal blocks are zeros."""
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(1))
    g[::3] = 0
    g[1], g[2], g[4] = 1e-30, -1e-30, 2.0**-149
    g[BLOCK : 2 * BLOCK] = 0
    g[2 * BLOCK : 3 * BLOCK] = 2.0**-127
    for name, dtype in NAMES.items():
        p, optimizer = kept(backend, g, unsigned=dtype == UNSIGNED)
        c = cell(optimizer, p, name)
        assert c.beside is not None
        assert not c.values[g == 0].any()
        assert not c.read(torch.float32)[g == 0].any()
        assert c.beside[1:3].tolist() == [0, 0]
        assert not c.values[BLOCK : 3 * BLOCK].any()
        if dtype == UNSIGNED:
            there = (g != 0) & (g.abs() >= 2.0**-126)
            assert (c.values[there] >= 1).all()
            assert (c.read(torch.float32)[there] > 0).all()


def check_not_finite(backend: str) -> None:
    """A NaN or an infinity shows in its block, in that one alone, and for good."""
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(2))
    bad = g.clone()
    bad[BLOCK + 3], bad[3 * BLOCK], bad[SIZE - 1] = torch.nan, torch.inf, -torch.inf
    p = torch.nn.Parameter(torch.zeros(SIZE))
    optimizer = Case("AdamW", {}).ours([p], state_dtype="int8", backend=backend)
    blocks, size = [1, 3, 16], [0] * 17
    for step, p.grad in enumerate((g, bad, g, g)):
        optimizer.step()
        for name in ("exp_avg", "exp_avg_sq"):
            c = cell(optimizer, p, name)
            assert c.beside is not None
            size = [int(row.isfinite().sum()) for row in c.read(torch.float32).split(BLOCK)]
            broken = [i for i, n in enumerate(size) if n == 0]
            assert broken == (blocks if step else []), f"{name} after step {step}"
            assert (~c.beside.isfinite()).nonzero().flatten().tolist() == broken
            assert all(n == min(BLOCK, SIZE - i * BLOCK) for i, n in enumerate(size) if n)
    finite = [bool(row.isfinite().any()) for row in p.detach().split(BLOCK)]
    assert [i for i, there in enumerate(finite) if not there] == blocks


ORDERS: dict[str, Any] = {
    "transposed": lambda t: t.view(50, 82).t(),
    "channels last": lambda t: t.view(4, 5, 41, 5).permute(0, 3, 1, 2),
    "permuted": lambda t: t.view(10, 10, 41).permute(2, 0, 1),
}


def check_blocks_are_of_neighbours(backend: str) -> None:
    """Blocks are of neighbours in memory, whatever the order of dimensions: the codes are those of a flat tensor."""
    g = torch.randn(SIZE, generator=torch.Generator().manual_seed(3))
    p, optimizer = kept(backend, g, g)
    for order in ORDERS.values():
        q, other = kept(backend, order(g), order(g))
        for name in NAMES:
            a, b = cell(optimizer, p, name), cell(other, q, name)
            assert b.values.stride() == q.stride()
            assert torch.equal(flat(b.values), a.values)
            assert a.beside is not None
            assert b.beside is not None
            assert torch.equal(a.beside, b.beside)
        assert torch.equal(flat(q.detach()), p.detach())


BLOCK_CHECKS = (
    check_every_code,
    check_blocks_are_separate,
    check_zero_and_tiny,
    check_not_finite,
    check_blocks_are_of_neighbours,
)


# --- rounding, by each back end ---------------------------------------------------------------------------------------

HALVES = (torch.bfloat16, torch.float16)
DRAWN = {torch.bfloat16: 16, torch.float16: 13}
"""How many of 32 random bits count. A float32 has as many more than the type has, so that each weighs as it should."""


def ulp(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """One unit in the last place of a half type, at float64 values."""
    digits, least = (8, -126) if dtype == torch.bfloat16 else (11, -14)
    exponent = (torch.frexp(x.abs())[1] - 1).clamp(min=least)
    return torch.ldexp(torch.ones_like(x), exponent - digits + 1)


def rounded(x: torch.Tensor, random: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Stochastic rounding, in float64, where all of it is exact."""
    unit = ulp(x.double(), dtype)
    whole = (x.double().abs() / unit + (random >> 32 - DRAWN[dtype]) * 2.0 ** -DRAWN[dtype]).floor()
    return (whole * unit).copysign(x.double()).to(dtype)


def move(
    backend: str, p: Sequence[torch.Tensor], g: Sequence[torch.Tensor], steps: int = 1, **options: Any
) -> tuple[list[torch.Tensor], Move]:
    """Copies of the parameters after steps by g."""
    params = [torch.nn.Parameter(t.clone()) for t in p]
    optimizer = Move(params, backend=backend, **({"rounding": "stochastic"} | options))
    for parameter, its in zip(params, g, strict=True):
        parameter.grad = its
    for _ in range(steps):
        optimizer.step()
    return [t.detach() for t in params], optimizer


UP = {torch.bfloat16: (0x3F80, 0x3F81), torch.float16: (0x3C00, 0x3C01)}
"""The bits of 1 and of the number above it."""
MIDDLE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Half of what lies between them."""
GOLDEN = {
    (torch.bfloat16, 1): "1011111101000100",
    (torch.bfloat16, 2): "0011011001110101",
    (torch.float16, 1): "0011011001000101",
    (torch.float16, 2): "0011001010111100",
}
"""Which elements go up from halfway at a step: those whose random number has the upper bit. Seed 7; the bfloat16
parameter is the optimizer's second, the float16 one its third."""


def check_golden(backend: str) -> None:
    """The bits of parameters are what they were when this was written, and what the definition says."""
    ones = [torch.ones(5), *(torch.ones(16, dtype=dtype) for dtype in HALVES)]
    halfway = [torch.ones(5), *(torch.full((16,), MIDDLE[dtype], dtype=dtype) for dtype in HALVES)]
    for step in (1, 2):
        params = [torch.nn.Parameter(t.clone()) for t in ones]
        optimizer = Move(params, backend=backend, rounding="stochastic", seed=7)
        for p, g in zip(params, halfway, strict=True):
            p.grad = torch.zeros_like(g)
        for _ in range(step - 1):
            optimizer.step()  # exact, and so nothing is rounded
        for p, g in zip(params, halfway, strict=True):
            p.grad = g
        optimizer.step()
        for p in params[1:]:
            low, high = UP[p.dtype]
            assert set(p.detach().view(torch.int16).tolist()) <= {low, high}
            went = "".join("01"[b == high] for b in p.detach().view(torch.int16).tolist())
            assert went == GOLDEN[p.dtype, step], f"{p.dtype} step {step}: {went}"


def check_every_bit(backend: str) -> None:
    """Values of all sizes become what the definition makes of them, from all random bits that count."""
    generator = torch.Generator().manual_seed(0)

    def wide(dtype: torch.dtype) -> torch.Tensor:
        size = torch.rand(3000, generator=generator) * 16 - 14
        return (torch.randn(3000, generator=generator) * torch.exp2(size)).to(dtype)

    p, g = [[torch.ones(5), *map(wide, HALVES)] for _ in range(2)]
    index, before = torch.arange(3000), p
    for step in (1, 2):
        after, _ = move(backend, p, g, step, seed=12345)
        assert torch.equal(after[0], before[0] + g[0]), "a float32 is rounded to the nearest"
        for position in (1, 2):
            random = random_bits(index, keys(stream(12345, position), step))
            x = before[position].float() + g[position].float()
            wanted = rounded(x, random, p[position].dtype)
            assert torch.equal(bits(after[position]), bits(wanted)), f"{p[position].dtype} step {step}"
        before = after


def check_what_needs_no_rounding(backend: str) -> None:
    """Exact values stay, and so do infinities and NaN, with both roundings."""
    for dtype in HALVES:
        exact = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
        exact = torch.where(exact == 0, 0, exact)  # Kahan's rounding adds +0 to -0
        for rounding in ("stochastic", "kahan"):
            [after], _ = move(backend, [exact], [torch.full_like(exact, -0.0)], rounding=rounding)
            assert torch.equal(bits(after), bits(exact)), f"{dtype} {rounding}"


def check_unbiased(backend: str) -> None:
    """The result is one of the two neighbours, the nearer the likelier: means are exact within 4 standard errors."""
    n, starts = 2048, (1.0, -1.0, 3.0, -200.0, 2.0**-13, 0.0)
    subnormal = {torch.bfloat16: 5 * 2.0**-133, torch.float16: 5 * 2.0**-24}
    for share in (1 / 64, 0.375, 0.5, 0.875):
        p = [torch.full((n,), x, dtype=d) for d in HALVES for x in (*starts, subnormal[d], -subnormal[d])]
        g = [ulp(t.double(), t.dtype).copysign(t) if t.any() else torch.full_like(t, 2.0**-24) for t in p]
        moved, _ = move(backend, p, [unit.to(t.dtype) for unit, t in zip(g, p, strict=True)], lr=share)
        for before, unit, after in zip(p, g, moved, strict=True):
            if before.dtype == torch.bfloat16 and not before.any():
                continue  # share * 2^-24 is a bfloat16
            ups = (after.double() - before.double()) / unit.double()
            assert set(ups.unique().tolist()) == {0.0, 1.0}, f"{before.dtype} {before[0]}"
            error = ups.mean().item() - share
            assert abs(error) <= 4 * (share * (1 - share) / n) ** 0.5, f"{before.dtype} {before[0]} {share}: {error}"


ROUNDING_CHECKS = (check_golden, check_every_bit, check_what_needs_no_rounding, check_unbiased)
