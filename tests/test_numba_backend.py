"""The CPU back end: the text of kernels, half types, determinism, and the index code of the compiled loops."""

import ast
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numba import carray, cfunc, int64, void

from schuss import optim
from schuss.engine import numba
from schuss.engine.native import pointer
from schuss.formula import exp, log
from schuss.optimizer import Optimizer
from schuss.testing import check_optimizer

DTYPES = [d for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16) if numba.supports(d)]
HALVES = [d for d in DTYPES if d.itemsize == 2]
LAUNCH = numba.launch

# --- text -------------------------------------------------------------------------------------------------------------


def kernel_text(cls: type[Optimizer], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, **options: Any) -> str:
    """The text of the kernel that updates, in one step of one tensor; one that finds sums may come before it."""
    texts = []
    with monkeypatch.context() as patch:  # nothing is compiled or run
        patch.setattr(numba, "kernel_address", lambda label, text: (texts.append(text), 0)[1])
        patch.setattr(numba, "launch", lambda *arguments: None)
        patch.setattr(numba, "sweep", lambda *arguments: None)
        p = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        p.grad = torch.ones(3, dtype=dtype)
        cls([p], backend="numba", **options).step()
    *sums, text = texts
    assert len(sums) <= 1
    return text


ADAMW = '''\
"""schuss.optim.adam.AdamW

One pass over p: float32, g: float32, m: float32, v: float32; computed in float32.
context: addresses of the table of data pointers [tensor, 4], of each tensor's row, and of
the rows of scalars (decay, w1, beta2, w2, step_size, c2, eps).
"""

import numpy as np
from numba import carray, cfunc, float32, float64, int32, int64, uint16, void

from schuss.engine.native import *  # digest ...


@cfunc(void(int64, int64, int64, int64), cache=True, error_model="numpy")
def kernel(context, tensor, start, count):
    tables = carray(pointer(context, int64), (3,))
    at = carray(pointer(tables[0] + tensor * 32, int64), (4,))
    row = int64(carray(pointer(tables[1] + tensor * 4, int32), (1,))[0])
    scalar = carray(pointer(tables[2] + row * 28, float32), (7,))
    decay = scalar[0]
    w1 = scalar[1]
    beta2 = scalar[2]
    w2 = scalar[3]
    step_size = scalar[4]
    c2 = scalar[5]
    eps = scalar[6]
    p_ = carray(pointer(at[0] + start * 4, float32), (count,))
    g_ = carray(pointer(at[1] + start * 4, float32), (count,))
    m_ = carray(pointer(at[2] + start * 4, float32), (count,))
    v_ = carray(pointer(at[3] + start * 4, float32), (count,))
    for i in range(count):
        p = p_[i]
        g = g_[i]
        m = m_[i]
        v = v_[i]
        m_new = lerp(m, g, w1)
        v_new = beta2 * v + w2 * (g * g)
        p_new = decay * p - step_size * m_new / (sqrt(v_new) * c2 + eps)
        p_[i] = p_new
        m_[i] = m_new
        v_[i] = v_new
'''


def test_the_kernel_of_adamw_reads_like_its_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    text = kernel_text(optim.AdamW, monkeypatch, torch.float32)
    assert re.sub(r"digest [0-9a-f]{16}", "digest ...", text) == ADAMW


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [cls for cls in optim.RULES if cls.takes(torch.empty(1))], ids=lambda cls: cls.__name__)
def test_every_kernel_is_one_pass_that_rounds_its_constants(
    cls: type[Optimizer], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [kernel_text(cls, monkeypatch, dtype, maximize=maximize) for maximize in (False, False, True)]
    assert texts[0] == texts[1] != texts[2]
    for text in texts:
        module = ast.parse(text)
        [kernel] = [n for n in module.body if isinstance(n, ast.FunctionDef)]
        assert kernel.name == "kernel"
        assert [n for n in ast.walk(kernel) if isinstance(n, (ast.For, ast.While, ast.If))] == [kernel.body[-1]]
        loop = kernel.body[-1]
        inputs = re.findall(r"(\w+): \w+(?:,\s|;)", ast.get_docstring(module) or "")
        assert inputs[:2] == ["p", "g"]
        elements = [n for n in ast.walk(loop) if isinstance(n, ast.Subscript)]
        loads = [ast.unparse(n.value) for n in elements if isinstance(n.ctx, ast.Load)]
        stores = [ast.unparse(n.value) for n in elements if isinstance(n.ctx, ast.Store)]
        assert sorted(loads) == sorted(f"{name}_" for name in inputs), "each input is read once"
        read_only = ("g", "p0")
        assert stores == [f"{name}_" for name in inputs if name not in read_only], "others are written, each once"
        rounded = {
            id(argument)
            for n in ast.walk(loop)
            if isinstance(n, ast.Call) and ast.unparse(n.func) in ("float32", "float64")
            for argument in ast.walk(n)
        }
        exponents = {id(n.right) for n in ast.walk(loop) if isinstance(n, ast.BinOp) and isinstance(n.op, ast.Pow)}
        bare = [n.value for n in ast.walk(loop) if isinstance(n, ast.Constant) and id(n) not in rounded | exponents]
        assert bare == [], "a bare number makes a float32 kernel compute in float64"


class ExpAndLog(Optimizer):
    """A formula with both words: steps fall off away from zero, and with the sum of squares; lr is a factor of both."""

    states: ClassVar = {"m": "m"}

    def __init__(self, params: Any, lr: float = 0.1, **options: Any) -> None:
        super().__init__(params, {"lr": lr}, **options)

    @staticmethod
    def rule(p, g, m, lr):
        m = m + g * g
        return p - lr * g * exp(-abs(p)) / (1 + log(1 + m)), m


class Words(Optimizer):
    """Not an optimizer: p becomes its exponential, m the logarithm of g."""

    states: ClassVar = {"m": "m"}
    has_step = False

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 1.0}, **options)

    @staticmethod
    def rule(p, g, m):
        return exp(p), log(g)


def test_a_rule_with_exp_and_log_passes_every_check() -> None:
    check_optimizer(ExpAndLog)


@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
@pytest.mark.parametrize(("dtype", "span"), [(torch.float32, 80), (torch.float64, 700)], ids=str)
def test_exp_and_log_are_off_by_less_than_an_ulp(dtype: torch.dtype, span: float, backend: str) -> None:
    x = torch.linspace(-span, span, 100_003, dtype=torch.float64)
    p = torch.nn.Parameter(x.to(dtype))
    y = p.grad = x.exp().to(dtype)
    before = p.detach().clone()
    optimizer = Words([p], backend=backend)
    optimizer.step()
    for got, function, of in ((p.detach(), np.exp, before), (optimizer.state[p]["m"], np.log, y)):
        right = function(of.numpy().astype(np.longdouble))
        error = np.abs(got.numpy() - right) / np.spacing(np.abs(right.astype(got.numpy().dtype)))
        assert error.max() < 1


@pytest.mark.parametrize("backend", ["numba", "foreach", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_exp_and_log_of_what_is_no_ordinary_number(dtype: torch.dtype, backend: str) -> None:
    x = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan], dtype=dtype)
    p = torch.nn.Parameter(x.clone())
    p.grad = x.clone()
    optimizer = Words([p], backend=backend)
    optimizer.step()
    for got, right in ((p.detach(), torch.exp(x)), (optimizer.state[p]["m"], torch.log(x))):
        torch.testing.assert_close(got, right, rtol=torch.finfo(dtype).eps, atol=0, equal_nan=True)


# --- half types -------------------------------------------------------------------------------------------------------


class Convert(Optimizer):
    """Not an optimizer: p becomes m rounded to p's dtype, m becomes g widened."""

    states: ClassVar = {"m": "m"}
    has_step = False

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, {"lr": 1.0}, **options)

    @staticmethod
    def rule(p, g, m, lr):
        return m, g


def convert(g: torch.Tensor, m: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`m` rounded to the dtype of `g`, and `g` widened to the dtype of `m`, by a kernel."""
    p = torch.nn.Parameter(torch.zeros_like(g))
    p.grad = g
    optimizer = Convert([p], backend="numba")
    optimizer.state[p]["m"] = m.clone()
    optimizer.step()
    return p.detach(), optimizer.state[p]["m"]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All 65536 values of a half type, in the order of their bits."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).roll(2**15).view(dtype)


def assert_same_bits(got: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bit for bit, but for the payload of a NaN."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.dtype.itemsize]
    assert got.dtype == expected.dtype
    assert torch.equal(got.isnan(), expected.isnan())
    differ = (got.view(kind) != expected.view(kind)) & ~expected.isnan()
    assert not differ.any(), (got[differ][:5], expected[differ][:5])


@pytest.mark.parametrize("wide", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_half_is_loaded_and_stored_exactly(dtype: torch.dtype, wide: torch.dtype) -> None:
    values = every_value(dtype)
    assert torch.equal(values.view(torch.int16).int() & 0xFFFF, torch.arange(65536, dtype=torch.int32))
    narrowed, widened = convert(values, values.to(wide))
    assert_same_bits(widened, values.to(wide))
    assert_same_bits(narrowed, values)


def test_a_bfloat16_is_the_upper_half_of_a_float32_nan_included() -> None:
    values = every_value(torch.bfloat16)
    widened = convert(values, torch.zeros(65536))[1]
    assert torch.equal(widened.view(torch.int32), values.view(torch.int16).int() << 16)


def boundaries(dtype: torch.dtype) -> torch.Tensor:
    """float32 numbers where rounding to a half type turns: its values, ties between them, and their neighbours."""
    values = every_value(dtype).double()
    values = values[values.isfinite()].sort().values
    last = values[-1] + (values[-1] - values[-2]) / 2  # from here on it is infinite
    points = torch.cat([values, (values[:-1] + values[1:]) / 2, torch.stack([last, -last, last * 1.01])]).float()
    assert torch.equal(points[: len(values)].double(), values)
    up, down = torch.tensor(float("inf")), torch.tensor(float("-inf"))
    return torch.cat([points, points.nextafter(up), points.nextafter(down)])


def random_bits(count: int) -> torch.Tensor:
    """float32 numbers of random bits: of every size, subnormal, infinite and NaN among them."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randint(-(2**31), 2**31, (count,), dtype=torch.int64, generator=generator)
        .to(torch.int32)
        .view(torch.float32)
    )


SPECIAL = [float("nan"), -float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, -1e-45, 1e-40, 3.4e38, -3.4e38]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    "values",
    [boundaries, lambda dtype: random_bits(2**20), lambda dtype: torch.tensor(SPECIAL)],
    ids=["ties", "random bits", "special"],
)
def test_rounding_to_halves_is_that_of_torch(values: Callable[[torch.dtype], torch.Tensor], dtype: torch.dtype) -> None:
    numbers = values(dtype)
    narrowed = convert(torch.zeros(len(numbers), dtype=dtype), numbers)[0]
    assert_same_bits(narrowed, numbers.to(dtype))


def test_random_bits_hold_every_kind_of_number() -> None:
    numbers = random_bits(2**20)
    assert numbers.isnan().sum() > 1000
    assert ((numbers.abs() < 2**-126) & (numbers != 0)).sum() > 1000
    assert ((numbers.abs() < 2**-14) & (numbers.abs() > 2**-25)).sum() > 1000, "subnormal as float16"


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_halves_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    start, grad = (torch.randn(5000, generator=generator).to(dtype) for _ in range(2))
    p = torch.nn.Parameter(start.clone())
    p.grad = grad
    optim.SGD([p], lr=0.5, weight_decay=0.25, backend="numba").step()
    exact = start.double() - 0.5 * (grad.double() + 0.25 * start.double())  # powers of two: few roundings before
    assert_same_bits(p.detach(), exact.float().to(dtype))


# --- determinism ------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


SHAPES = [(317, 331), (1,), (0,), (16384,), (16385,), (3, 5, 7), (65537,), (2, 0, 3), (40000,)]


def start_and_gradients(dtype: torch.dtype, steps: int) -> tuple[list[torch.Tensor], list[list[torch.Tensor]]]:
    generator = torch.Generator().manual_seed(2)
    start, *grads = ([torch.randn(s, generator=generator).to(dtype) for s in SHAPES] for _ in range(1 + steps))
    return start, grads


def trained(
    cls: type[Optimizer], start: Sequence[torch.Tensor], grads: Sequence[Sequence[torch.Tensor]], **options: Any
) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Parameters and states after a step with each list of gradients."""
    params = [torch.nn.Parameter(s.clone(memory_format=torch.preserve_format)) for s in start]
    optimizer = cls(params, backend="numba", **options)
    for step in grads:
        for p, g in zip(params, step, strict=True):
            p.grad = g
        optimizer.step()
    return [p.detach() for p in params], [dict(optimizer.state[p]) for p in params]


def assert_identical(one: Any, other: Any) -> None:
    for a, b in zip(one[0], other[0], strict=True):
        assert torch.equal(a, b)
    for a, b in zip(one[1], other[1], strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("cls", optim.RULES, ids=lambda cls: cls.__name__)
def test_bits_do_not_depend_on_threads_or_the_order_of_tensors(
    cls: type[Optimizer], threads: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    start, grads = start_and_gradients(torch.float32, steps=3)
    start, grads = list(filter(cls.takes, start)), [list(filter(cls.takes, step)) for step in grads]
    threads(1)
    alone = trained(cls, start, grads)
    assert all(p.isfinite().all() for p in alone[0])
    for count in (2, 3):
        threads(count)
        assert_identical(trained(cls, start, grads), alone)

    backwards = trained(cls, start[::-1], [step[::-1] for step in grads])
    assert_identical((backwards[0][::-1], backwards[1][::-1]), alone)

    loops = numba.driver()
    for parts in (2, 3, 7, 50):  # also more shares than this machine has threads
        monkeypatch.setattr(numba, "launch", lambda _, *arguments, n=parts: loops.launch_parallel(n, *arguments))
        assert_identical(trained(cls, start, grads), alone)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", [optim.AdamW, optim.RAdam, optim.Rprop, optim.Adadelta], ids=lambda c: c.__name__)
def test_bits_do_not_depend_on_where_in_memory_an_element_lies(cls: type[Optimizer], dtype: torch.dtype) -> None:
    """Pieces of odd lengths, at any alignment, move as the whole does: vector loop and remainder round alike."""
    generator = torch.Generator().manual_seed(3)
    start, *grads = (torch.randn(40_000, generator=generator).to(dtype) for _ in range(4))
    whole = trained(cls, [start], [[g] for g in grads])[0][0]
    lengths = [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 100, 1001, 16383, 16385]
    lengths.append(40_000 - sum(lengths))
    params = [torch.nn.Parameter(piece) for piece in start.clone().split(lengths)]
    optimizer = cls(params, backend="numba")
    for g in grads:
        for p, piece in zip(params, g.split(lengths), strict=True):
            p.grad = piece
        optimizer.step()
    assert_same_bits(torch.cat([p.detach() for p in params]), whole)


# --- index code -------------------------------------------------------------------------------------------------------

SIZES, TENSORS, TENSOR, END, CALLS, ELEMENTS, WRONG = range(7)


@pytest.fixture(scope="module")
def recorder() -> Any:
    """A kernel that updates nothing: it checks that each chunk is the successor of the one before."""
    chunk = numba.driver().CHUNK

    @cfunc(void(int64, int64, int64, int64))
    def record(context, tensor, start, count):
        log = carray(pointer(context, int64), (7,))
        size = carray(pointer(log[0], int64), (log[1],))
        while log[2] < tensor:  # tensors are left when they are done, and empty ones are passed by
            if log[3] != size[log[2]]:
                log[6] += 1
            log[2] += 1
            log[3] = 0
        if tensor != log[2] or start != log[3] or start % chunk or count != min(chunk, size[tensor] - start):
            log[6] += 1
        log[3] = start + count
        log[4] += 1
        log[5] += count

    return record


def prefix_sums(size: np.ndarray[Any, Any], active: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.concatenate([[0], np.cumsum((size + numba.driver().OVERHEAD) * active)]).astype(np.int64)


def record_walks(
    recorder: Any, numel: Sequence[int], active: Sequence[bool], parts: int
) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Walk all parts in turn; returns the recorder's log, and what each part did: elements + OVERHEAD a tensor."""
    loops = numba.driver()
    there = np.array(active, np.bool_)
    size = np.array(numel, np.int64) * there
    weight = prefix_sums(size, there)
    log = np.array([size.ctypes.data, len(size), 0, 0, 0, 0, 0], np.int64)
    loads = []
    for part in range(parts):
        before = log.copy()
        loops.walk(recorder.address, log.ctypes.data, size, weight, part, parts)
        started = there[before[TENSOR] : log[TENSOR] + 1].sum()
        loads.append(int(log[ELEMENTS] - before[ELEMENTS] + loops.OVERHEAD * started))
    assert log[WRONG] == 0
    assert log[ELEMENTS] == size.sum()
    assert log[CALLS] == sum(-(-int(n) // loops.CHUNK) for n in size)
    done = np.arange(len(size)) < log[TENSOR]
    assert size[log[TENSOR]] == log[END]
    assert not size[~done][1:].any(), "tensors after the last chunk are empty"
    return log, loads


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    tensors=st.lists(
        st.tuples(
            st.sampled_from([0, 1, 16383, 16384, 16385, 32768]) | st.integers(0, 2000) | st.integers(0, 10**6),
            st.integers(0, 3).map(bool),
        ),
        min_size=1,
        max_size=40,
    ),
    parts=st.integers(1, 70),
)
def test_parts_cover_every_element_exactly_once(recorder: Any, tensors: list[tuple[int, bool]], parts: int) -> None:
    numel, active = zip(*tensors, strict=True)
    record_walks(recorder, numel, active, parts)


HUGE = [
    [2**38],
    [2**31 - 1, 0, 2**31, 2**31 + 1, 1, 2**33 + 5],
    [0, 5, 2**37 + 16383, 0, 0, 3 * 2**34 + 1, 16384, 0],
    [7] * 1000 + [2**36 + 7] + [16385] * 1000,
]


@pytest.mark.parametrize("parts", [1, 2, 3, 16, 255])
@pytest.mark.parametrize("numel", HUGE, ids=["one", "around 2^31", "with empty", "among small"])
def test_parts_of_tensors_beyond_32_bits_cover_every_element_once_and_are_equal(
    recorder: Any, numel: list[int], parts: int
) -> None:
    loops = numba.driver()
    active = [True] * len(numel)
    log, loads = record_walks(recorder, numel, active, parts)
    assert log[ELEMENTS] == sum(numel) > 2**33
    fair = (sum(numel) + loops.OVERHEAD * len(numel)) / parts
    assert max(loads) <= fair + loops.CHUNK + 2 * loops.OVERHEAD


def test_tensors_without_a_gradient_are_passed_by_however_large(recorder: Any) -> None:
    log, _ = record_walks(recorder, [2**40, 5, 2**40, 2**31 + 1, 2**40], [False, True, False, True, False], 7)
    assert log[ELEMENTS] == 2**31 + 6


@pytest.mark.parametrize("scale", [1, 2**20, 2**40, 2**51], ids=["1", "2^20", "2^40", "2^51"])
def test_locate_is_monotonic_and_finds_chunk_starts_up_to_2_to_the_60(scale: int) -> None:
    loops = numba.driver()
    generator = np.random.default_rng(0)
    active = generator.random(30) < 0.8
    size = generator.integers(0, 40, 30) * scale * active
    weight = prefix_sums(size, active)
    total = int(weight[-1])
    assert total > 300 * scale
    assert loops.locate(weight, size, 0)[1] == 0
    assert loops.locate(weight, size, total) == (30, 0)
    edges = [int(w) + d for w in weight for d in (-1, 0, 1, 511, 512, 513)]
    targets = sorted({t for t in edges if 0 <= t <= total} | {int(t) for t in generator.integers(0, total, 2000)})
    before = (0, 0)
    for target in targets:
        tensor, chunk = loops.locate(weight, size, target)
        assert (tensor, chunk) >= before
        assert chunk == 0 or chunk * loops.CHUNK < size[tensor]
        position = int(weight[tensor]) + chunk * loops.CHUNK
        assert position >= target, "a chunk belongs to the part in which it starts"
        if chunk:
            assert position - target < loops.CHUNK
        before = (tensor, chunk)


def test_a_step_hands_the_loops_the_sizes_of_active_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[tuple[Any, ...]] = []
    monkeypatch.setattr(numba, "launch", lambda *arguments: (launches.append(arguments), LAUNCH(*arguments)))
    params = [torch.nn.Parameter(torch.zeros(shape, dtype=torch.complex64)) for shape in [(3, 5), (0,), (), (7,)]]
    optimizer = optim.SGD(params, lr=1.0, momentum=0.5)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    params[0].grad = None
    optimizer.step()
    overhead = numba.driver().OVERHEAD
    for launch, sizes in zip(launches, [[30, 0, 2, 14], [0, 0, 2, 14]], strict=True):
        size, weight = launch[3], launch[4]
        assert weight.tolist()[0] == 0
        assert [a.dtype for a in (size, weight)] == [np.int64, np.int64]
        if launch is launches[-1]:  # the arrays are those of the plan, as of the last step
            assert size.tolist() == sizes
            assert weight.tolist() == [0, 0, overhead, 2 * overhead + 2, 3 * overhead + 16]
    assert params[0].tolist() == [[-1 + 0j] * 5] * 3
    assert params[3].tolist() == [-2.5 + 0j] * 7


# --- numbers kept per tensor ------------------------------------------------------------------------------------------


def test_scalars_of_rows_are_gathered_and_advanced_for_active_tensors_only() -> None:
    loops = numba.driver()
    steps = torch.tensor([3.0, 3.0, 8.0, 3.0])
    products = torch.tensor([0.5, 0.5, 0.1, 0.25], dtype=torch.float64)
    address = np.array([[steps[i].data_ptr(), products[i].data_ptr()] for i in range(4)])
    is_double, row_of = np.array([False, True]), np.array([0, 0, 1, 0], np.int32)
    active = np.array([True, True, True, False])
    seen, rows = np.zeros(2, np.bool_), np.zeros((2, 2))
    assert loops.gather(address, is_double, active, row_of, seen, rows)
    assert rows.tolist() == [[3.0, 0.5], [8.0, 0.1]]
    new = rows + np.array([[1.0, 0.25], [1.0, 0.5]])
    empty = np.zeros(4, np.int64)
    loops.launch_serial(0, 0, empty, prefix_sums(empty, active), address, is_double, active, row_of, new)
    assert steps.tolist() == [4.0, 4.0, 9.0, 3.0]
    assert products.tolist() == [0.75, 0.75, 0.6, 0.25]
    values = np.zeros((4, 2))
    loops.read(address, is_double, values)
    assert values.tolist() == [[4.0, 0.75], [4.0, 0.75], [9.0, 0.6], [3.0, 0.25]]
    active[3] = True
    assert not loops.gather(address, is_double, active, row_of, seen, rows), "tensor 3 left its row behind"
