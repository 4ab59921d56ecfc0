"""How bfloat16 and float16 parameters are rounded: random bits, their mean, what small steps become, and checkpoints.

The checks of one back end are in `stored.py`; Triton's are run by `test_storage.py`.
"""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch

from cases import PLAIN, RICH, Case, each, gradient, randn
from schuss import optim
from schuss.engine.storage import keys, random_bits, stream
from stored import HALVES, ROUNDING_CHECKS, Move, assert_same, bits, move, rounded, ulp

BACKENDS = ("numba", "foreach", "reference")
halves = pytest.mark.parametrize("dtype", HALVES, ids=lambda dtype: str(dtype).removeprefix("torch."))
backends = pytest.mark.parametrize("backend", BACKENDS)
roundings = pytest.mark.parametrize("rounding", ["stochastic", "kahan"])


@backends
@pytest.mark.parametrize("check", ROUNDING_CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_rounding(check: Callable[[str], None], backend: str) -> None:
    check(backend)


# --- random bits ------------------------------------------------------------------------------------------------------

GOLDEN = {
    (0, 0, 1, 0): 0x74AD436F,
    (0, 0, 1, 1): 0xE0819A1B,
    (0, 0, 2, 0): 0xF990F03D,
    (0, 1, 1, 0): 0x7C747395,
    (1, 0, 1, 0): 0xB619E226,
    (-1, 0, 1, 0): 0x40CAFE83,
    (2**64, 0, 1, 0): 0x74AD436F,
    (2**70 + 3, 5, 1000, 77): 0xC9AE199D,
    (7, 2, 2**24, 4095): 0xE6B618D9,
    (0, 0, 1, 2**32): 0xB73FBC06,
    (12345, 678, 90, 2**40 + 12345): 0xB6067186,
}
"""Seed, position of the parameter, step and element: the bits. Runs that are resumed with another version need them."""


def test_golden_bits() -> None:
    for (seed, position, step, index), expected in GOLDEN.items():
        key = keys(stream(seed, position), step)
        assert random_bits(index, key) == expected
        assert random_bits(torch.tensor([index]), key).tolist() == [expected]
    assert stream(0, 0) == 0x5692161D100B05E5
    assert keys(stream(7, 1), 1) == (0xD4D96D6E, 0xFD1E709C)


def draws(seed: int = 0, position: int = 0, step: int = 1, n: int = 1 << 16) -> torch.Tensor:
    """Random numbers of a tensor, with mean 0 and variance 1."""
    random = random_bits(torch.arange(n), keys(stream(seed, position), step))
    return (random.double() / 2**32 - 0.5) * 12**0.5


def test_draws_are_uniform() -> None:
    """In 256 and in 4096 classes, by chi square: of k classes its mean is k - 1, its variance 2 (k - 1)."""
    random = random_bits(torch.arange(1 << 20), keys(stream(3, 4), 5))
    for shift in (0, 8, 16, 20):
        for classes in (256, 4096):
            counts = torch.bincount((random >> shift) % classes, minlength=classes).double()
            chi = ((counts - counts.mean()) ** 2 / counts.mean()).sum().item()
            assert abs(chi - (classes - 1)) < 4.5 * (2 * (classes - 1)) ** 0.5, f"bits from {shift} on"
    assert len(random.unique()) == len(random), "no number twice: the hash is a bijection"


def test_draws_are_uncorrelated() -> None:
    """Of neighbours, of steps, of parameters and of seeds: products have mean 0, with a standard error of 1/sqrt(n)."""
    n = 1 << 16
    several = [draws(s, p, t) for s in (0, 1) for p in range(5) for t in range(1, 6)]
    table = torch.stack(several)
    z = (table @ table.T).fill_diagonal_(0) / n**0.5
    assert z.abs().max() < 5  # 1225 pairs: beyond 5 by chance once in 1400 draws of all
    assert z[z != 0].std() == pytest.approx(1, abs=0.08)
    for lag in (1, 2, 3, 8, 255, 256, 257, 16384):
        z = (table[:, lag:] * table[:, :-lag]).sum(1) / (n - lag) ** 0.5
        assert z.abs().max() < 4.5, f"elements {lag} apart"
    assert table.mean(1).abs().max() < 4.5 / n**0.5


# --- what bits depend on ----------------------------------------------------------------------------------------------


def steps(optimizer: Any, params: list[torch.Tensor], seeds: range = range(3)) -> None:
    """Steps with normal gradients, the same ones whatever the layout."""
    for seed in seeds:
        for i, p in enumerate(params):
            p.grad = gradient(p, seed, i)
        optimizer.step()


def halves_of(*shapes: tuple[int, ...], dtype: torch.dtype = torch.bfloat16) -> list[torch.nn.Parameter]:
    """Parameters of half types."""
    return [torch.nn.Parameter(randn(*shape, dtype=dtype, seed=i)) for i, shape in enumerate(shapes)]


def equal(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Whether all are, bit for bit."""
    return all(torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True))


def test_seed() -> None:
    """The same seed, the same bits, whatever torch's generators have done; another one, others."""
    runs = []
    for seed in (0, 0, 1, -5, 2**63):
        params = halves_of((300,), (7, 11))
        torch.rand(len(runs))
        steps(optim.AdamW(params, lr=1e-2, rounding="stochastic", seed=seed), params)
        runs.append(params)
    assert equal(runs[0], runs[1])
    assert not any(equal(runs[0], other) for other in runs[2:])


def test_threads_and_chunks() -> None:
    """Not on how a tensor is cut up: the kernel's chunks of 16384, and threads, give the reference's bits."""
    before, runs = torch.get_num_threads(), []
    try:
        for threads, backend in ((1, "numba"), (2, "numba"), (3, "numba"), (1, "reference")):
            torch.set_num_threads(threads)
            params = halves_of((100_003,), (40_000,))
            steps(optim.SGD(params, lr=1e-2, rounding="stochastic", backend=backend), params)
            runs.append(params)
    finally:
        torch.set_num_threads(before)
    assert all(equal(runs[0], other) for other in runs[1:])


@backends
def test_groups(backend: str) -> None:
    """On a parameter's place among all: groups do not count, and a missing gradient moves nobody."""
    one, several = halves_of((40,), (30,), (20,)), halves_of((40,), (30,), (20,))
    a = optim.AdamW(one, lr=1e-2, rounding="stochastic", backend=backend)
    b = optim.AdamW([{"params": several[:1]}], lr=1e-2, rounding="stochastic", backend=backend)
    b.add_param_group({"params": several[1:]})
    for step in range(3):
        for params, optimizer in ((one, a), (several, b)):
            for i, p in enumerate(params):
                p.grad = None if i == step else gradient(p, step, i)
            optimizer.step()
    assert equal(one, several)


@backends
@pytest.mark.parametrize("order", ["transposed", "channels last", "slice"])
def test_layout(order: str, backend: str) -> None:
    """Elements are counted in the order of memory, gaps left out."""
    views: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "transposed": lambda t: t.view(60, 50).t(),
        "channels last": lambda t: t.view(3, 20, 10, 5).permute(0, 3, 1, 2),
        "slice": lambda t: torch.zeros(60, 70, dtype=t.dtype)[:, 10:60].copy_(t.view(60, 50)),
    }
    view, [p] = views[order], halves_of((3000,))
    q = torch.nn.Parameter(view(p.detach().clone()))
    ways = (backend, "auto" if (order, backend) == ("slice", "numba") else backend)
    a, b = (optim.SGD([t], lr=1e-2, rounding="stochastic", backend=way) for t, way in zip((p, q), ways, strict=True))
    for step in range(3):
        p.grad = gradient(p, step)
        q.grad = view(p.grad)
        a.step()
        b.step()
    assert q.stride() == view(p.detach()).stride()
    assert torch.equal(bits(view(p.detach()).contiguous()), bits(q.detach().contiguous()))


@roundings
@each(RICH)
def test_back_ends_agree(case: Case, rounding: str) -> None:
    """Eager torch has the bits of kernels, but where a root of its own is an ulp off and a float32 crosses a border.

    An ulp of a float32 is 2^-16 of a bfloat16's: so rare are other results, and so much less is left for the rest.
    """
    runs = []
    for backend in BACKENDS:
        params = [torch.nn.Parameter(case.fit(p.detach())) for p in halves_of((2000,), (30, 20))]
        optimizer = case.ours(params, rounding=rounding, backend=backend)
        steps(optimizer, params, range(1))
        runs.append(params)
    for other in runs[1:]:
        for p, q in zip(runs[0], other, strict=True):
            differ = p != q
            assert differ.float().mean() < 2e-3
            apart = (p.double() - q.double()).abs()
            assert (apart <= torch.maximum(ulp(p.double(), p.dtype), ulp(q.double(), q.dtype))).all()


@roundings
@pytest.mark.parametrize("case", [c for c in RICH if c.name in ("SGD", "AdamW", "NAdam", "Lion", "Rprop")], ids=str)
def test_resuming_is_not_stopping(case: Case, rounding: str) -> None:
    """Bit for bit, through a file without pickled code; and so for copies."""
    params = halves_of((300,), (7, 11))
    optimizer = case.ours(params, rounding=rounding, seed=5)
    steps(optimizer, params)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    resumed = case.ours(others, rounding=rounding, seed=5)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    copied_params, copied = copy.deepcopy((params, optimizer))
    for p, o in ((params, optimizer), (others, resumed), (copied_params, copied)):
        steps(o, p, range(3, 6))
    assert_same(optimizer, resumed)
    assert_same(optimizer, copied)


# --- what rounding does -----------------------------------------------------------------------------------------------


@halves
def test_mean_of_a_million(dtype: torch.dtype) -> None:
    """1.001, and its negative: exact on average, within four standard errors."""
    n = 1 << 20
    for sign in (1.0, -1.0):
        value = torch.tensor(sign * 1.001)
        random = random_bits(torch.arange(n), keys(stream(1, 0), 1))
        unit = ulp(value.double(), dtype).item()
        share = (0.001 / unit) % 1
        for got in (rounded(value, random, dtype), written(value.expand(n), dtype)):
            error = got.double().mean().item() - value.double().item()
            assert abs(error) < 4 * unit * (share * (1 - share) / n) ** 0.5


def written(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What a step makes of values, all the same, that starts at the number of the type nearest to them."""
    start = value.to(dtype)
    gradient = (value - start.float()).to(dtype)
    rate = ((value - start.float()).double() / gradient.double())[0].item()
    [after], _ = move("numba", [start], [gradient], lr=rate, seed=1)
    return after


STEPS, SIZE, EACH = 1000, 4096, 1e-3


def walked(rounding: str, dtype: torch.dtype = torch.bfloat16, each_step: float = EACH) -> tuple[torch.Tensor, Any]:
    """From 1, a thousand steps that are less than half of what lies between numbers there."""
    p = torch.nn.Parameter(torch.ones(SIZE, dtype=dtype))
    optimizer = optim.SGD([p], lr=each_step, rounding=rounding)
    p.grad = -torch.ones_like(p)
    for _ in range(STEPS):
        optimizer.step()
    return p.detach().double(), optimizer.state[p]


def test_nearest_stands_still() -> None:
    after, state = walked("nearest")
    assert (after == 1).all()
    assert not state


def test_kahan_arrives() -> None:
    """At 2, and with the compensation within a thousand roundings of that, of at most 2^-17 each."""
    after, state = walked("kahan")
    assert (after == 2).all()
    assert ((after + state["compensation"].double()) - 2).abs().max() <= STEPS * 2.0**-17
    assert state["compensation"].dtype == torch.bfloat16


def test_kahan_in_float16() -> None:
    """1.1 after steps of a fifth of what nearest would need; a rounding of the compensation is at most 2^-23."""
    after, state = walked("kahan", torch.float16, 1e-4)
    total = after + state["compensation"].double()
    assert (total - 1.1).abs().max() <= STEPS * 2.0**-23 + STEPS * 1e-4 * 2.0**-23
    assert (after - 1.1).abs().max() <= 2.0**-11 + (total - 1.1).abs().max()
    assert (walked("nearest", torch.float16, 1e-4)[0] == 1).all()


def test_stochastic_arrives_on_average() -> None:
    """At 2, with the standard deviation of a thousand draws of one or no unit: 0.084 measured, 0.083 on [1, 2)."""
    after, _ = walked("stochastic")
    share, unit = EACH * 2**7, 2.0**-7
    spread = unit * (STEPS * share * (1 - share)) ** 0.5
    assert after.std().item() == pytest.approx(0.084, rel=0.06)
    assert after.std().item() == pytest.approx(spread, rel=0.08)
    assert abs(after.mean().item() - 2) < 4 * 0.084 / SIZE**0.5


@halves
def test_nearest_is_torchs(dtype: torch.dtype) -> None:
    """Ties to even, as torch rounds; the default."""
    start, g = (randn(2000, dtype=dtype, seed=seed) for seed in (0, 1))
    [after], optimizer = move("numba", [start], [g], lr=2.0**-9, rounding="nearest")
    assert torch.equal(after, (start.float() + 2.0**-9 * g.float()).to(dtype))
    assert "step" in optimizer.state[optimizer.param_groups[0]["params"][0]]


@roundings
def test_infinite_steps(rounding: str) -> None:
    """They make infinities and NaN of parameters, and nothing of the compensation: the next step does not read NaN."""
    p = [torch.ones(5, dtype=dtype) for dtype in HALVES]
    g = [torch.tensor([1, torch.inf, -torch.inf, torch.nan, 2], dtype=dtype) for dtype in HALVES]
    after, optimizer = move("numba", p, g, rounding=rounding)
    for t in after:
        assert torch.equal(bits(t.float()), bits(torch.tensor([2, torch.inf, -torch.inf, torch.nan, 3])))
    if rounding == "kahan":
        assert all((kept["compensation"] == 0).all() for kept in optimizer.state.values())


# --- state and checkpoints --------------------------------------------------------------------------------------------


def test_random_bits_need_a_step() -> None:
    """SGD and Lion, which keep none, count for stochastic rounding; torch need not see it."""
    for case in (Case("SGD", {"lr": 0.1}), Case("SGD", {"lr": 0.1, "momentum": 0.9}), Case("Lion", {"lr": 0.1})):
        for rounding, counts in (("nearest", False), ("kahan", False), ("stochastic", True)):
            params = halves_of((30,))
            optimizer = case.ours(params, rounding=rounding)
            steps(optimizer, params)
            kept = optimizer.state.get(params[0], {})
            assert ("step" in kept) == counts
            assert ("compensation" in kept) == (rounding == "kahan")
            if counts:
                assert kept["step"].item() == 3
            portable = optimizer.state_dict(portable=True)["state"].get(0, {})
            assert not {"step", "compensation"} & set(portable)


def test_a_buffer_of_torchs_goes_on() -> None:
    """A momentum without a count is not new: its first step under schuss must not start it again."""
    case = Case("SGD", {"lr": 0.5, "momentum": 0.5, "dampening": 0.5})
    [p], [q], [r] = (halves_of((64,)) for _ in range(3))
    theirs, ours, nearest = case.theirs([p]), case.ours([q], rounding="stochastic"), case.ours([r])
    steps(theirs, [p])
    for optimizer in (ours, nearest):
        optimizer.load_state_dict(theirs.state_dict())
        steps(optimizer, optimizer.param_groups[0]["params"], range(3, 5))
    assert torch.equal(ours.state[q]["momentum_buffer"], nearest.state[r]["momentum_buffer"])
    assert ours.state[q]["step"].item() == 3  # nobody knows of more than one step before


@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_compensation_in_checkpoints(name: str) -> None:
    """It is kept where rounding is "kahan", begins at nothing where it was not saved, and is dropped otherwise."""
    case = Case(name, {"lr": 1e-2})
    [p], [q], [r], [s] = (halves_of((64,)) for _ in range(4))
    optimizer = case.ours([p], rounding="kahan")
    steps(optimizer, [p])
    assert optimizer.state[p]["compensation"].any()
    kahan, plain = case.ours([q], rounding="kahan"), case.ours([r])
    for other in (kahan, plain):
        other.load_state_dict(optimizer.state_dict())
    assert torch.equal(kahan.state[q]["compensation"], optimizer.state[p]["compensation"])
    assert "compensation" not in plain.state[r]
    steps(plain, [r])
    late = case.ours([s], rounding="kahan")
    late.load_state_dict(plain.state_dict())
    steps(late, [s], range(1))
    assert "compensation" in late.state[s]


@roundings
def test_with_eight_bit_states(rounding: str) -> None:
    """Storage of states and rounding of parameters go together, and through checkpoints."""
    [p], [q] = (halves_of((5000,)) for _ in range(2))
    optimizer, other = (optim.AdamW([t], rounding=rounding, state_dtype="int8") for t in (p, q))
    steps(optimizer, [p])
    with torch.no_grad():
        q.copy_(p)
    other.load_state_dict(optimizer.state_dict())
    assert_same(optimizer, other)
    for o, t in ((optimizer, p), (other, q)):
        steps(o, [t], range(3, 5))
    assert_same(optimizer, other)
    assert "exp_avg_codes" in optimizer.state[p]


# --- which parameters -------------------------------------------------------------------------------------------------


@roundings
def test_beside_float32(rounding: str) -> None:
    """Of parameters of both kinds, those in float32 are rounded to the nearest, as if alone."""
    half, wide, alone = halves_of((64,))[0], *(torch.nn.Parameter(randn(64, dtype=torch.float32)) for _ in range(2))
    mixed, plain = optim.AdamW([wide, half], lr=1e-2, rounding=rounding), optim.AdamW([alone], lr=1e-2)
    steps(mixed, [wide, half])
    steps(plain, [alone])
    assert torch.equal(wide, alone)
    assert "compensation" not in mixed.state[wide]
    assert ("compensation" in mixed.state[half]) == (rounding == "kahan")


@backends
def test_complex_parameters_are_not_rounded(backend: str) -> None:
    params = [torch.nn.Parameter(randn(40, dtype=dtype)) for dtype in (torch.complex64, torch.bfloat16)]
    optimizer = optim.AdamW(params, rounding="stochastic", backend=backend)
    steps(optimizer, params)
    plain = [torch.nn.Parameter(randn(40, dtype=torch.complex64))]
    steps(optim.AdamW(plain, backend=backend), plain)
    assert torch.equal(params[0], plain[0])


def test_plan() -> None:
    params = [("half", halves_of((64,))[0]), ("wide", torch.nn.Parameter(torch.zeros(64)))]
    plan = optim.SGD(params, rounding="kahan").plan()
    assert plan.state_bytes == 2 * 64  # the compensation


@pytest.mark.parametrize("case", [c for c in PLAIN if c.name in ("SGD", "AdamW")], ids=str)
def test_a_later_group(case: Case) -> None:
    """What is added is rounded like the rest; only the first parameters decide whether there is anything to round."""
    [p], [q] = halves_of((64,)), halves_of((64,))
    optimizer = case.ours([p], rounding="kahan")
    optimizer.add_param_group({"params": [q]})
    optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    steps(optimizer, [p, q])
    assert "compensation" in optimizer.state[q]


# --- errors -----------------------------------------------------------------------------------------------------------

HALF, WIDE = torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3)
ONE_OF = "one of nearest, stochastic, kahan, got"
ERRORS: list[tuple[dict[str, Any], torch.Tensor, type[Exception], str]] = [
    ({"rounding": "random"}, HALF, ValueError, f"^SGD: rounding must be {ONE_OF} 'random'$"),
    ({"rounding": None}, HALF, ValueError, f"^SGD: rounding must be {ONE_OF} None$"),
    ({"rounding": True}, HALF, ValueError, f"^SGD: rounding must be {ONE_OF} True$"),
    (
        {"rounding": "stochastic"},
        WIDE,
        ValueError,
        "^SGD: rounding='stochastic' is for bfloat16 and float16 parameters",
    ),
    ({"rounding": "kahan"}, WIDE, ValueError, "^SGD: rounding='kahan' is for .*, and there are none; use .*'nearest'$"),
    ({"rounding": "kahan"}, WIDE.to(torch.complex64), ValueError, "^SGD: rounding='kahan' is for bfloat16"),
    ({"seed": 0.5}, HALF, TypeError, r"^SGD: seed must be an integer, got 0\.5 \(float\)$"),
    ({"seed": True}, HALF, TypeError, r"^SGD: seed must be an integer, got True \(bool\)$"),
    ({"seed": "1"}, HALF, TypeError, r"^SGD: seed must be an integer, got '1' \(str\)$"),
    ({"seed": None}, HALF, TypeError, r"^SGD: seed must be an integer, got None \(NoneType\)$"),
    ({"roundings": "kahan"}, HALF, TypeError, "^SGD: unknown argument 'roundings'; .*rounding"),
]


@pytest.mark.parametrize(("kwargs", "p", "error", "message"), ERRORS, ids=lambda value: str(value)[:40])
def test_errors(kwargs: dict[str, Any], p: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        optim.SGD([p], **kwargs)


def test_a_rule_without_states() -> None:
    """Of `Move` only the count is kept, and only what rounding needs."""
    [p] = halves_of((8,))
    optimizer = Move([p], rounding="stochastic")
    steps(optimizer, [p])
    assert set(optimizer.state[p]) == {"step"}
