"""The CUDA back end without a GPU: numbers in Triton's interpreter, and the machine code that Triton makes.

Triton decides when it is imported whether functions are interpreted or compiled. This process compiles; the classes
that interpret are run by `test_interpreted` in processes of their own, and collected there only.
"""

import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from schuss import optim
from schuss.engine import pieces, trace
from schuss.engine.stages import Values, cut, is_staged
from schuss.engine.storage import BLOCK, MAPS, Layout, Storage, compute_dtype, keys, random_bits, slots, stream
from schuss.formula import absolute, exp, lerp, log, logical_and, maximum, minimum, sign, sqrt, where
from schuss.optimizer import Optimizer

pytest.importorskip("triton")

import triton.language as tl
from torch.overrides import TorchFunctionMode
from triton import __version__ as version
from triton import jit

from schuss.engine import triton
from schuss.engine.triton_words import random_bits as draw_bits
from schuss.engine.triton_words import stream_key

INTERPRETED = triton.interpreted()
CHUNK = triton.CHUNK
SIZES = (1, 255, 256, 257, CHUNK - 1, CHUNK, 3 * CHUNK + 17)
HALVES = (torch.bfloat16, torch.float16)
OF_VECTORS = [cls for cls in optim.RULES if cls.takes(torch.empty(1))]
rules = pytest.mark.parametrize("cls", OF_VECTORS, ids=lambda cls: cls.__name__)


@dataclass(frozen=True)
class Kernel:
    """A formula, the text of its kernel, and eager torch's opinion of it."""

    text: str
    formula: trace.Formula
    scalars: tuple[str, ...]
    layout: Layout
    row: tuple[float, ...]
    eager: Callable[[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]


def of_rule(
    cls: type[Optimizer],
    dtype: torch.dtype = torch.float32,
    states: torch.dtype | None = None,
    rounding: Any = "nearest",
    eight_bit: bool = False,
    **settings: Any,
) -> Kernel:
    """The kernel of the third step of an optimizer, with its default settings if there are no others."""
    optimizer = cls([p := torch.nn.Parameter(torch.ones(3))], **settings)
    optimizer._make_state(p, group := optimizer.param_groups[0])
    rule = optimizer._rule
    variant = rule.variant(group, p)
    hyper = rule.unpack(np.array([rule.numbers(group)]).T)
    composed = rule.pieces(hyper)
    formula, scalars = rule.trace(variant, composed)
    kept = {name: optimizer.state[p][name].reshape(1).numpy() for name in rule.scalar_states}
    kept |= {"step": np.array([2.0])} if rule.has_step else {"first": np.array([False])}
    kept |= rule.given(p)
    values = {n: float(np.asarray(v).reshape(-1)[0]) for n, v in rule.finish(hyper, kept, needed=scalars).items()}
    values["step"] = 3.0
    if rounding == "stochastic" and "step" not in scalars:
        scalars += ("step",)
    layout = {"p": Storage(dtype, rounding), "g": Storage(dtype)}
    for letter in formula.inputs[2:]:
        eight = torch.uint8 if is_positive(letter) else torch.int8
        layout[letter] = Storage(eight if eight_bit else states or dtype)

    def eager(roles: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        kept = {n: roles.get(n) for n in rule.states}
        return pieces.apply(rule.formula, composed, roles["p"], roles["g"], kept, {**others, **rule.chosen(variant)})

    if is_staged(formula):
        return after_sums(cls, formula, scalars, layout, values)
    text = triton.kernel_source(cls.__name__, formula, scalars, layout)
    return Kernel(text, formula, scalars, layout, tuple(values[n] for n in scalars), eager)


def after_sums(
    cls: type[Optimizer], formula: trace.Formula, scalars: tuple[str, ...], layout: Layout, values: dict[str, float]
) -> Kernel:
    """The kernel that updates, of a rule that finds sums before; what it is made of them, is 0.75 here."""
    stages = cut(formula, scalars)
    values |= dict.fromkeys(stages.between, 0.75)

    def eager(roles: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        value = Values({**roles, **others})
        return {letter: value(node) for letter, node in stages.final}

    text = triton.kernel_source(cls.__name__, stages.final, stages.scalars, layout)
    return Kernel(text, stages.final, stages.scalars, layout, tuple(values[n] for n in stages.scalars), eager)


def of_function(
    function: Callable[..., Any],
    dtype: torch.dtype = torch.float32,
    rounding: Any = "nearest",
    states: Mapping[str, torch.dtype] | None = None,
    **scalars: float,
) -> Kernel:
    """The kernel of a formula p, g, states -> p, states."""
    states = states or {}
    formula, names = pieces.trace(function, pieces.Pieces(), dict.fromkeys(states, True), {})
    layout = {"p": Storage(dtype, rounding), "g": Storage(dtype)} | {n: Storage(d) for n, d in states.items()}
    text = triton.kernel_source(function.__name__, formula, names, layout)

    def eager(roles: Mapping[str, torch.Tensor], others: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        new = function(*(roles[letter] for letter in layout), **others)
        return dict(zip(("p", *states), new if states else (new,), strict=True))

    return Kernel(text, formula, names, layout, tuple(scalars[n] for n in names), eager)


def is_unchanged(letter: str, node: trace.Expr) -> bool:
    """Whether a new value is the old one, which is not stored again; Adan's last gradient is g, which is."""
    return (node.op, node.value) == ("name", letter)


def is_positive(letter: str) -> bool:
    """Whether a state is a sum of squares or of sizes."""
    return letter in ("u", "v", "s", "n")


Tensors = dict[tuple[str, str], torch.Tensor]


def run(
    kernel: Kernel, tensors: list[Tensors], streams: list[int] | None = None, skip: float | None = None, step: int = 3
) -> None:
    """One launch on all tensors, each with a row of its own."""
    sizes = [t["p", "values"].numel() for t in tensors]
    work = [(k, chunk) for k, size in enumerate(sizes) for chunk in range(-(-size // CHUNK))]
    rows = [[step if n == "step" else v for n, v in zip(kernel.scalars, kernel.row, strict=True)]] * len(tensors)
    triton.run(
        triton.load("test", kernel.text),
        len(work),
        torch.tensor(work, dtype=torch.int32),
        torch.tensor(sizes),
        torch.tensor([[t[slot].data_ptr() for slot in slots(kernel.layout)] for t in tensors]),
        torch.arange(len(tensors), dtype=torch.int32),
        torch.tensor(rows, dtype=compute_dtype(kernel.layout)),
        None if streams is None else torch.tensor([s - (s >> 63 << 64) for s in streams]),
        skip=None if skip is None else torch.tensor([skip]),
    )


def values(letter: str, size: int, seed: int, special: bool = True) -> torch.Tensor:
    """Float32 values of a role, from tiny to large, with some that are not usual."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator) * 10 ** (4 * torch.rand(size, generator=generator) - 3)
    x = x.abs() if is_positive(letter) else x
    if special and size > 20:
        unusual = (0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, 3e38, 1e-20, 1.0, -1.0)
        x[torch.randperm(size, generator=generator)[:10]] = torch.tensor(unusual)
    return x


def fresh(layout: Layout, size: int, seed: int = 0, offset: int = 0, special: bool = True) -> Tensors:
    """Tensors of every slot, as views with a border of 8 elements on which nobody may write."""
    tensors: Tensors = {}
    for k, (letter, part) in enumerate(slots(layout)):
        storage = layout[letter]
        if part == "absmax":
            data = values("v", -(-size // BLOCK), 100 * seed + k, special=False)
        elif storage.blockwise:
            codes = torch.arange(size) * 7 % 256 - (128 if storage.dtype == torch.int8 else 0)
            data = codes.clamp(min=-127).to(storage.dtype)
        else:
            data = values(letter, size, 100 * seed + k, special) * (2.0**-10 if part == "compensation" else 1)
            data = data.to(storage.dtype)
        border = torch.full((len(data) + 16 + 8,), 77, dtype=data.dtype)
        view = border[8 + offset : 8 + offset + len(data)]
        view.copy_(data)
        tensors[letter, part] = view
    return tensors


def copied(tensors: Tensors) -> Tensors:
    return {slot: t.clone() for slot, t in tensors.items()}


def borders(tensor: torch.Tensor) -> torch.Tensor:
    whole = torch.tensor([], dtype=tensor.dtype).set_(tensor.untyped_storage())
    first = tensor.storage_offset()
    return torch.cat([whole[:first], whole[first + len(tensor) :]])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal, the sign of zero included; any NaN equals any other."""
    if not a.is_floating_point():
        return torch.equal(a, b)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.itemsize]
    a, b = (torch.where(t.isnan(), torch.full_like(t, math.nan), t) for t in (a, b))
    return torch.equal(a.view(integer), b.view(integer))


# --- what the kernels have to compute, in torch -----------------------------------------------------------------------


def read(layout: Layout, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The roles as numbers of the dtype that the kernel computes in."""
    roles = {}
    for letter, storage in layout.items():
        stored = tensors[letter, "values"]
        if storage.blockwise:
            absmax = tensors[letter, "absmax"].repeat_interleave(BLOCK)[: len(stored)]
            x = storage.blockwise.decode(stored.float()) * absmax
        elif storage.kahan:
            x = stored.float() + tensors[letter, "compensation"].float()
        else:
            x = stored
        roles[letter] = x.to(compute_dtype(layout))
    return roles


def encoded(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and absmax, block by block; the maps are formulas and run on tensors, too."""
    scheme, codes, absmax = MAPS[dtype], [], []
    for block in x.float().split(BLOCK):
        size = block.abs().view(torch.int32).amax().view(torch.float32)
        inverse = torch.tensor(0.0) if size < 2.0**-126 else 1 / size
        codes.append(torch.trunc(scheme.encode(block * inverse)).to(dtype))
        size = torch.tensor(0.0) if size < 2.0**-126 else size
        absmax.append(size)
    return torch.cat(codes), torch.stack(absmax)


def drawn(x: torch.Tensor, dtype: torch.dtype, key: tuple[int, int]) -> torch.Tensor:
    """Stochastic rounding in Python's integers and torch's float64."""
    bits = random_bits(torch.arange(len(x)), key)
    if dtype == torch.bfloat16:
        raised = ((x.view(torch.int32).long() & 0xFFFFFFFF) + (bits >> 16)) >> 16
        result = (raised & 0xFFFF).to(torch.uint16).view(torch.bfloat16)
        return torch.where(x.isnan(), torch.tensor(math.nan, dtype=dtype), result)
    exponent = torch.clamp((x.view(torch.int32).long() >> 23) & 0xFF, min=113)
    ulp = 2.0 ** (exponent - 137).double()
    size = torch.trunc(x.double().abs() / ulp + (bits >> 19) * 2.0**-13) * ulp
    return torch.where(x.isfinite(), size.copysign(x), x.double()).to(torch.float16)


class ExactRoots(TorchFunctionMode):
    """torch's own roots on the CPU may be an ulp off; kernels round them once, as IEEE asks and CUDA's torch does."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.sqrt:
            with np.errstate(invalid="ignore"):
                return torch.as_tensor(np.sqrt(args[0].numpy()))
        return function(*args, **(kwargs or {}))


def expected(kernel: Kernel, tensors: Tensors, key: tuple[int, int] = (0, 0)) -> Tensors:
    """What a launch has to leave."""
    with ExactRoots():
        return _expected(kernel, tensors, key)


def _expected(kernel: Kernel, tensors: Tensors, key: tuple[int, int]) -> Tensors:
    dtype, layout = compute_dtype(kernel.layout), kernel.layout
    row = {n: torch.tensor(v, dtype=dtype) for n, v in zip(kernel.scalars, kernel.row, strict=True)}
    new = kernel.eager(read(layout, tensors), row)
    result = copied(tensors)
    for letter, storage in layout.items():
        if letter not in new or is_unchanged(letter, kernel.formula.outputs[letter]):
            continue
        x = new[letter] if storage.dtype == torch.float64 else new[letter].float()
        if storage.blockwise:
            result[letter, "values"], result[letter, "absmax"] = encoded(x, storage.dtype)
        elif storage.stochastic:
            result[letter, "values"] = drawn(x, storage.dtype, key)
        else:
            result[letter, "values"] = nearest = x.to(storage.dtype)
            if storage.kahan:
                rest = torch.where(nearest.float().isfinite(), x - nearest.float(), 0.0)
                result[letter, "compensation"] = rest.to(storage.dtype)
    return result


def check(kernel: Kernel, special: bool = True) -> list[Tensors]:
    """Launch on tensors of all sizes, and one that begins where no vector does, and compare every bit."""
    tensors = [fresh(kernel.layout, size, k, special=special) for k, size in enumerate(SIZES)]
    tensors.append(fresh(kernel.layout, 2 * CHUNK, 50, offset=1, special=special))
    streams = [stream(11, k) for k in range(len(tensors))] if kernel.layout["p"].stochastic else None
    wanted = [
        expected(kernel, t, keys(streams[k], 3) if streams else (0, 0)) for k, t in enumerate(map(copied, tensors))
    ]
    run(kernel, tensors, streams)
    for got, right in zip(tensors, wanted, strict=True):
        for slot, tensor in got.items():
            assert same_bits(tensor, right[slot]), (slot, len(tensor), (tensor != right[slot]).nonzero()[:5])
            assert torch.all(borders(tensor) == 77), slot
    return tensors


# --- in the interpreter -----------------------------------------------------------------------------------------------


class TestRules:
    __test__ = INTERPRETED

    @rules
    def test_bits_are_those_of_eager_torch(self, cls: type[Optimizer]) -> None:
        check(of_rule(cls))

    @pytest.mark.parametrize(
        ("cls", "settings"),
        [
            (optim.Adam, {"amsgrad": True, "weight_decay": 0.1, "maximize": True}),
            (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
            (optim.RMSprop, {"centered": True, "momentum": 0.9}),
        ],
    )
    def test_other_forms(self, cls: type[Optimizer], settings: dict[str, Any]) -> None:
        check(of_rule(cls, **settings))

    @pytest.mark.parametrize("cls", [optim.AdamW, optim.Rprop], ids=lambda cls: cls.__name__)
    def test_float64(self, cls: type[Optimizer]) -> None:
        check(of_rule(cls, torch.float64))

    def test_every_tensor_has_its_own_row(self) -> None:
        kernel = of_function(scaled, lr=0.0)
        tensors = [fresh(kernel.layout, 300, k, special=False) for k in range(3)]
        before = [t["p", "values"].clone() for t in tensors]
        triton.run(
            triton.load("test", kernel.text),
            3,
            torch.tensor([[0, 0], [1, 0], [2, 0]], dtype=torch.int32),
            torch.tensor([300, 200, 0]),
            torch.tensor([[t[slot].data_ptr() for slot in slots(kernel.layout)] for t in tensors]),
            torch.tensor([1, 0, 0], dtype=torch.int32),
            torch.tensor([[2.0], [8.0]]),
        )
        assert torch.equal(tensors[0]["p", "values"], before[0] * 8)
        assert torch.equal(tensors[1]["p", "values"][:200], before[1][:200] * 2)
        assert torch.equal(tensors[1]["p", "values"][200:], before[1][200:])
        assert torch.equal(tensors[2]["p", "values"], before[2])

    @pytest.mark.parametrize("found", [1.0, 0.0, math.nan, -2.0])
    def test_skip(self, found: float) -> None:
        kernel = of_rule(optim.AdamW, eight_bit=True)
        tensors = fresh(kernel.layout, CHUNK + 300)
        before, wanted = copied(tensors), expected(kernel, copied(tensors))
        run(kernel, [tensors], skip=found)
        for slot, tensor in tensors.items():
            assert same_bits(tensor, (before if found else wanted)[slot])


def scaled(p: Any, g: Any, lr: Any) -> Any:
    return p * lr


def small_numbers(p: Any, g: Any) -> Any:
    return where(p > 0.1, p * 0.1, 0.3) + 1 / 3 * g + where(g < 0, 0.7, g)


def unary(p: Any, g: Any) -> Any:
    return where(g > 0, -p, sign(p) + abs(g) + absolute(p) * sqrt(g))


def chosen(p: Any, g: Any, w: Any) -> Any:
    low = where(logical_and(p >= 0, g <= p), minimum(p, g), maximum(-p, g))
    return lerp(where(p != g, low, p), g, w) + where(g == 1, sqrt(p), 0)


def exp_and_log(p: Any, g: Any, m: Any) -> Any:
    return exp(p), log(g)


class TestWords:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    @pytest.mark.parametrize("function", [small_numbers, unary])
    def test_agree_with_eager_torch(self, function: Callable[..., Any], dtype: torch.dtype) -> None:
        check(of_function(function, dtype))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_exp_and_log_are_torchs_but_for_ulps(self, dtype: torch.dtype) -> None:
        """In the interpreter they are NumPy's, which are off by up to three."""
        kernel = of_function(exp_and_log, dtype, states={"m": dtype})
        x = torch.cat([values("p", CHUNK, 1), torch.tensor([87.0, -87.0, 1.0, 0.0])]).to(dtype)
        tensors: Tensors = {("p", "values"): x.clone(), ("g", "values"): x.abs(), ("m", "values"): x.clone()}
        run(kernel, [tensors])
        for letter, right in (("p", torch.exp(x)), ("m", torch.log(x.abs()))):
            got, rtol = tensors[letter, "values"], 3 * torch.finfo(dtype).eps
            torch.testing.assert_close(got, right, rtol=rtol, atol=0, equal_nan=True)

    @pytest.mark.parametrize("w", [0.25, 0.5, 0.9])
    def test_choices(self, w: float) -> None:
        check(of_function(chosen, w=w))

    @pytest.mark.parametrize("p", [0.0, 3.0, -2.5, math.inf, math.nan])
    def test_whole_powers_are_products(self, p: float) -> None:
        def cubes(p: Any, g: Any) -> Any:
            return p**3 + 2 * p**2 + p**-1 + p**0

        kernel = of_function(cubes)
        assert "**" not in kernel.text
        assert "power" not in kernel.text
        tensors: Tensors = {("p", "values"): torch.tensor([p]), ("g", "values"): torch.ones(1)}
        run(kernel, [tensors])
        x = np.float32(p)
        with np.errstate(all="ignore"):
            right = x * (x * x) + np.float32(2) * (x * x) + np.float32(1) / x + np.float32(1)
        assert same_bits(tensors["p", "values"], torch.tensor([float(right)]))

    def test_signs_of_zero_and_nan(self) -> None:
        def signs(p: Any, g: Any) -> Any:
            return where(g > 0, -p, sign(p))

        tensors: Tensors = {
            ("p", "values"): torch.tensor([0.0, -0.0, math.nan, -math.inf, 1e-45]),
            ("g", "values"): torch.tensor([1.0, 1.0, 0.0, 0.0, 0.0]),
        }
        run(of_function(signs), [tensors])
        assert tensors["p", "values"].tolist() == [0.0, 0.0, 0.0, -1.0, 1.0]
        assert tensors["p", "values"].signbit().tolist() == [True, False, False, True, False]

    def test_names_that_a_kernel_has_itself(self) -> None:
        def named(
            p: Any, g: Any, work: Any, tl: Any, p_at: Any, i: Any, sqrt: Any, m_: Any, t1: Any, BLOCK: Any
        ) -> Any:
            return p * (work + tl) + (p_at + i) * g + sqrt * m_ + t1 * BLOCK

        check(of_function(named, work=1, tl=2, p_at=3, i=4, sqrt=5, m_=6, t1=7, BLOCK=8))


class TestStorages:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("states", [None, torch.float32])
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_types(self, dtype: torch.dtype, states: torch.dtype | None) -> None:
        check(of_rule(optim.AdamW, dtype, states))

    def test_float64_states_of_a_half_parameter(self) -> None:
        check(of_rule(optim.AdamW, torch.bfloat16, torch.float64))

    def test_bfloat16_ties_go_to_even_and_nan_stays(self) -> None:
        kernel = of_rule(optim.SGD, torch.bfloat16)
        x = torch.tensor([0x3F80, 0x3F81, 0x7F7F, 0x7F80, 0xFF80, 0x7FC0], dtype=torch.uint16).view(torch.bfloat16)
        g = torch.tensor([-0.5, -0.5, -1.0, 1.0, 1.0, 1.0])  # half an ulp of 1, and of the largest number
        g[:2] *= 2**-7 / 1e-3
        g[2] *= 2**119 / 1e-3
        tensors: Tensors = {("p", "values"): x.clone(), ("g", "values"): g.bfloat16()}
        wanted = expected(kernel, copied(tensors))["p", "values"]
        run(kernel, [tensors])
        assert tensors["p", "values"].view(torch.uint16)[:5].tolist() == wanted.view(torch.uint16)[:5].tolist()
        assert tensors["p", "values"].view(torch.uint16)[3:].tolist() == [0x7F80, 0xFF80, 0x7FC0]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
    @pytest.mark.parametrize("cls", [optim.AdamW, optim.Adamax, optim.Rprop], ids=lambda cls: cls.__name__)
    def test_eight_bits(self, cls: type[Optimizer], dtype: torch.dtype) -> None:
        check(of_rule(cls, dtype, eight_bit=True), special=False)

    def test_blocks_that_are_not_finite_stay_visible(self) -> None:
        kernel = of_rule(optim.AdamW, eight_bit=True)
        tensors = fresh(kernel.layout, 5 * BLOCK + 10, special=False)
        g = tensors["g", "values"]
        g[BLOCK + 3], g[2 * BLOCK], g[5 * BLOCK + 9] = math.nan, math.inf, -math.inf
        wanted = expected(kernel, copied(tensors))
        run(kernel, [tensors])
        for letter in "mv":
            assert same_bits(tensors[letter, "values"], wanted[letter, "values"])
            assert same_bits(tensors[letter, "absmax"], wanted[letter, "absmax"])
            assert tensors[letter, "absmax"].isfinite().tolist() == [True, False, False, True, True, False]
        finite = [block.isfinite().any().item() for block in read(kernel.layout, tensors)["m"].split(BLOCK)]
        assert finite == [True, False, False, True, True, False]

    def test_an_outlier_changes_its_block_only(self) -> None:
        kernel = of_rule(optim.AdamW, eight_bit=True)
        plain = fresh(kernel.layout, 4 * BLOCK, special=False)
        other = copied(plain)
        other["g", "values"][BLOCK + 7] = 1e6
        run(kernel, [plain])
        run(kernel, [other])
        for letter in "mv":
            differ = (plain[letter, "values"] != other[letter, "values"]).view(4, BLOCK).any(1)
            assert differ.tolist() == [False, True, False, False]

    @pytest.mark.parametrize("tiny", [0.0, 1e-40])
    def test_zero_stays_zero(self, tiny: float) -> None:
        kernel = of_rule(optim.AdamW, eight_bit=True)
        tensors = fresh(kernel.layout, 300)
        for slot, tensor in tensors.items():
            tensor.fill_(tiny if slot == ("g", "values") else 0)
        run(kernel, [tensors])
        for letter in "mv":
            assert not tensors[letter, "values"].any()
            assert not tensors[letter, "absmax"].any()

    def test_what_lies_beyond_the_end_does_not_count(self) -> None:
        def far(p: Any, g: Any, m: Any) -> Any:
            return p, where(p == 0, 1e6, m)  # what is read there is 0

        check(of_function(far, states={"m": torch.int8}), special=False)

    def test_what_does_not_change_is_not_written(self) -> None:
        def kept(p: Any, g: Any, m: Any, v: Any) -> Any:
            return p + m, m, v + g

        kernel = of_function(kept, states={"m": torch.int8, "v": torch.float32})
        assert re.findall(r"tl\.store\((\w+)", kernel.text) == ["p_", "v_"]
        check(kernel, special=False)

    def test_a_state_that_becomes_a_number(self) -> None:
        def reset(p: Any, g: Any, m: Any, lr: Any) -> Any:
            return p, lr * 2

        kernel = of_function(reset, states={"m": torch.int8}, lr=3.0)
        tensors = fresh(kernel.layout, CHUNK + 300, special=False)
        run(kernel, [tensors])
        assert read(kernel.layout, tensors)["m"].unique().tolist() == pytest.approx([6.0])

    def test_another_map(self, monkeypatch: pytest.MonkeyPatch) -> None:
        linear = type(MAPS[torch.int8])(
            127, lambda code: code / 127, lambda share: where(share == share, share * 127, 0.0)
        )
        monkeypatch.setitem(MAPS, torch.int8, linear)
        check(of_rule(optim.Lion, eight_bit=True), special=False)


@jit
def draw(index, streams, steps, out):  # type: ignore[no-untyped-def]
    i, stream, step = tl.arange(0, 4), tl.load(streams), tl.load(steps)
    key0, key1 = stream_key(stream, step), stream_key(stream >> 32, step)
    tl.store(out + i, draw_bits(tl.load(index + i), key0, key1).to(tl.int64))


def moved(p: Any, g: Any, move: Any, step: Any) -> Any:
    return p + move


def scaled_step(p: Any, g: Any, lr: Any) -> Any:
    return p - lr * g


class TestRounding:
    __test__ = INTERPRETED

    @pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD], ids=lambda cls: cls.__name__)
    def test_bits(self, cls: type[Optimizer], dtype: torch.dtype, rounding: str) -> None:
        check(of_rule(cls, dtype, torch.float32, rounding))

    @pytest.mark.parametrize("rounding", ["stochastic", "kahan"])
    def test_with_eight_bit_states(self, rounding: str) -> None:
        check(of_rule(optim.AdamW, torch.bfloat16, rounding=rounding, eight_bit=True), special=False)

    @pytest.mark.parametrize(("dtype", "above"), [(torch.bfloat16, 1 + 2.0**-7), (torch.float16, 1 + 2.0**-10)])
    def test_golden_bits(self, dtype: torch.dtype, above: float) -> None:
        """From the middle between two numbers, the upper half of all draws goes up."""
        kernel = of_function(moved, dtype, "stochastic", move=(above - 1) / 2, step=1)
        tensors: Tensors = {slot: torch.ones(16, dtype=dtype) for slot in slots(kernel.layout)}
        run(kernel, [tensors], [stream(0, 0)], step=1)
        assert set(tensors["p", "values"].tolist()) == {1.0, above}
        assert (tensors["p", "values"] == above).int().tolist() == [0, 1, 1, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 1, 0, 1]

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("share", [0.25, 0.5, 0.875])
    def test_unbiased(self, dtype: torch.dtype, share: float) -> None:
        ulp, n = (2.0**-7 if dtype == torch.bfloat16 else 2.0**-10), 8 * CHUNK
        kernel = of_function(moved, dtype, "stochastic", move=share * ulp, step=1)
        tensors: Tensors = {slot: torch.ones(n, dtype=dtype) for slot in slots(kernel.layout)}
        means = []
        for step in (1, 2):
            tensors["p", "values"].fill_(1)
            run(kernel, [tensors], [stream(5, 1)], step=step)
            means.append((tensors["p", "values"].double() - 1).mean().item() / ulp)
        assert means[0] != means[1]
        assert means == pytest.approx([share] * 2, abs=4 * math.sqrt(share * (1 - share) / n))

    def test_random_bits(self) -> None:
        index = torch.tensor([0, 1, 2**32, 2**40 + 12345])
        out, seed = torch.zeros(4, dtype=torch.int64), stream(0, 0)
        draw[(1,)](index, torch.tensor([seed - (seed >> 63 << 64)]), torch.ones(1), out)
        assert out.tolist() == random_bits(index, keys(seed, 1)).tolist()
        assert out.tolist() == [1957512047, 3766589979, 3074407430, 108544227]

    def test_kahan_keeps_what_is_too_small_for_the_parameter(self) -> None:
        kernel = of_function(scaled_step, torch.bfloat16, "kahan", lr=2.0**-10)
        tensors: Tensors = {slot: torch.ones(300, dtype=torch.bfloat16) for slot in slots(kernel.layout)}
        tensors["p", "compensation"].zero_()
        for _ in range(64):
            run(kernel, [tensors])
        total = tensors["p", "values"].float() + tensors["p", "compensation"].float()
        assert total.unique().tolist() == [1 - 64 * 2.0**-10]
        tensors["g", "values"].fill_(-math.inf)
        run(kernel, [tensors])
        assert tensors["p", "values"].unique().tolist() == [math.inf]
        assert tensors["p", "compensation"].unique().tolist() == [0]


# --- compiled ---------------------------------------------------------------------------------------------------------

CLASSES = ("TestRules", "TestWords", "TestStorages", "TestRounding")


@pytest.mark.skipif(INTERPRETED, reason="already interpreted")
@pytest.mark.parametrize("name", CLASSES)
def test_interpreted(name: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_ADDOPTS"} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"{__file__}::{name}"]
    root = Path(__file__).parent.parent
    ran = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert re.search(r"\d+ passed", ran.stdout)


def wide(ptx: str, access: str) -> int:
    """How many accesses to global memory there are of 128 bits."""
    return len(re.findall(rf"\b{access}\.global(?:\.\w+)*?\.(?:v4\.\w32|v2\.\w64)\b", ptx))


def inexact(ptx: str) -> set[str]:
    """Instructions that round otherwise than IEEE says."""
    flushes = "" if OLD else r"|\.ftz"  # Triton 3.5's root does
    return set(re.findall(rf"\bfma\S*|\S*(?:\.approx|\.full{flushes})\S*", ptx))


def registers(kernel: Kernel) -> int:
    """As many as leave room for three programs on a multiprocessor, or with Adan's four states for two."""
    return 80 if len(kernel.layout) < 6 else 112


OLD = version.startswith("3.5.")
SPILLED = 32 if OLD or version.startswith("3.6.") else 0  # older ones keep a number or two of 8-bit states in memory


class TestCompiled:
    __test__ = not INTERPRETED

    @rules
    def test_float32(self, cls: type[Optimizer]) -> None:
        kernel = of_rule(cls)
        machine = triton.compiled("test", kernel.text, kernel.layout)
        stored = [node for letter, node in kernel.formula if not is_unchanged(letter, node)]
        loaded = {node.value for node in trace.used(stored) if node.op == "name"} & {*kernel.layout}
        assert (wide(machine.ptx, "ld"), wide(machine.ptx, "st")) == (2 * len(loaded), 2 * len(stored))
        assert triton.resources(machine).spilled_bytes == 0
        assert triton.resources(machine).registers <= registers(kernel)
        assert inexact(machine.ptx) == set()

    @pytest.mark.parametrize("cls", [c for c in OF_VECTORS if c is not optim.Prodigy], ids=lambda cls: cls.__name__)
    def test_eight_bits(self, cls: type[Optimizer]) -> None:
        kernel = of_rule(cls, eight_bit=True)
        machine = triton.compiled("test", kernel.text, kernel.layout)
        assert (wide(machine.ptx, "ld"), wide(machine.ptx, "st")) == (4, 2)  # p and g; codes are 8 bytes a thread
        assert triton.resources(machine).spilled_bytes <= SPILLED
        assert triton.resources(machine).registers <= registers(kernel)
        assert inexact(machine.ptx) == set()

    @pytest.mark.parametrize("rounding", ["nearest", "stochastic", "kahan"])
    @pytest.mark.parametrize("dtype", HALVES)
    def test_half_types(self, dtype: torch.dtype, rounding: str) -> None:
        kernel = of_rule(optim.AdamW, dtype, rounding=rounding)
        machine = triton.compiled("test", kernel.text, kernel.layout, skip=True)
        extra = rounding == "kahan"
        assert (wide(machine.ptx, "ld"), wide(machine.ptx, "st")) == (4 + extra, 3 + extra)
        assert triton.resources(machine).spilled_bytes == 0

    def test_powers_that_are_not_whole(self) -> None:
        def roots(p: Any, g: Any) -> Any:
            return p**0.25 + p**g

        kernel = of_function(roots)
        machine = triton.compiled("test", kernel.text, kernel.layout, arch="sm_80")
        assert ".target sm_80" in machine.ptx
        assert triton.resources(machine).spilled_bytes == 0

    def test_exp_and_log_are_those_of_libdevice(self) -> None:
        """Triton's own are single instructions of few digits; of these there is one, with corrections round it."""
        for dtype in (torch.float32, torch.float64):
            kernel = of_function(exp_and_log, dtype, states={"m": dtype})
            machine = triton.compiled("test", kernel.text, kernel.layout)
            assert "lg2.approx" not in machine.ptx
            assert len(re.findall(r"\bfma", machine.ptx)) > 10
            assert triton.resources(machine).spilled_bytes == 0

    @pytest.mark.parametrize("arch", ["90", "sm_9", "gfx942", "sm_90a"])
    def test_an_unknown_architecture(self, arch: str) -> None:
        kernel = of_function(moved, move=1, step=1)
        with pytest.raises(ValueError, match=f"arch must be sm_NN .* such as sm_90, got '{arch}'"):
            triton.compiled("test", kernel.text, kernel.layout, arch=arch)

    def test_obstacle(self) -> None:
        assert triton.obstacle() == (None if torch.cuda.is_available() else "torch sees no CUDA device")

    @rules
    def test_text(self, cls: type[Optimizer]) -> None:
        """It can be read: every line of code fits a screen, and every role is named."""
        kernel = of_rule(cls, eight_bit=True)
        _, description, code = kernel.text.split('"""', 2)
        assert max(map(len, code.splitlines())) <= 120
        for letter, storage in kernel.layout.items():
            assert f"{letter}: {str(storage.dtype).removeprefix('torch.')}" in description
