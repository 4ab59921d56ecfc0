"""What holds for any shapes, layouts, groups and gradients: Hypothesis looks for a counterexample."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import ALL, RICH, Case, assert_equal, each, randn
from schuss.bounds import Interval
from schuss.testing import has_sums

ROUNDING = {torch.float64: 1e-12, torch.float32: 16 * 2.0**-23, torch.bfloat16: 4 * 2.0**-8}
few = settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
every_case = each(ALL)
every_rule = each(RICH)


class Setting:
    """Some parameters, laid out in some way, and which of them have a gradient at which step."""

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], orders: Sequence[tuple[int, ...]], present: Sequence[Sequence[bool]],
        dtype: torch.dtype, seed: int,
    ) -> None:  # fmt: skip
        self.shapes, self.orders, self.present, self.dtype, self.seed = shapes, orders, present, dtype, seed

    def __repr__(self) -> str:
        return f"Setting({self.shapes}, {self.orders}, {self.present}, {self.dtype}, {self.seed})"

    def parameters(self) -> list[torch.nn.Parameter]:
        """Fresh parameters; their dimensions lie in memory in the drawn order."""
        made = []
        for i, (shape, order) in enumerate(zip(self.shapes, self.orders, strict=True)):
            values = randn(*shape, dtype=self.dtype, seed=self.seed + i)
            inverse = sorted(range(len(order)), key=order.__getitem__)
            made.append(torch.nn.Parameter(values.permute(order).contiguous().permute(inverse)))
        return made

    def gradients(self, step: int) -> list[torch.Tensor | None]:
        """The gradients of a step, contiguous; `lay_out` puts them into the parameters' order."""
        return [
            randn(*shape, dtype=self.dtype, seed=self.seed + 100 * step + i + 17) if there else None
            for i, (shape, there) in enumerate(zip(self.shapes, self.present[step], strict=True))
        ]


def lay_out(p: torch.Tensor, g: torch.Tensor | None) -> torch.Tensor | None:
    return None if g is None else torch.empty_like(p).detach().copy_(g)


@st.composite
def some_settings(
    draw: Any,
    case: Case,
    dtypes: Sequence[torch.dtype] = (torch.float64, torch.float32),
    *,
    steps: int = 7,
    most: int = 4,
    in_order: bool = False,
) -> Setting:
    """Of parameters that the optimizer takes; `in_order`: contiguous ones, if its kernels want that."""
    count, bounds = draw(st.integers(1, most)), Interval.parse(case.cls.dimensions)
    sides, most_dimensions = st.sampled_from([0, 1, 1, 2, 3, 5]), int(min(bounds.high, 4))
    shapes = [tuple(draw(st.lists(sides, min_size=int(bounds.low), max_size=most_dimensions))) for _ in range(count)]
    permuted = not (in_order and case.needs)
    orders = [tuple(draw(st.permutations(range(len(s)))) if permuted else range(len(s))) for s in shapes]
    present = [[draw(st.booleans()) or step == 0 for _ in range(count)] for step in range(steps)]
    dtypes = [dtype for dtype in dtypes if case.cls.takes_complex or not dtype.is_complex]
    return Setting(shapes, orders, present, draw(st.sampled_from(dtypes)), draw(st.integers(0, 10**6)))


def run(
    case: Case, setting: Setting, groups: Sequence[Sequence[int]] | None = None, *, factor: float = 1.0, **more: Any
) -> tuple[Any, list[torch.nn.Parameter]]:
    """An optimizer after its steps, and the parameters."""
    params = setting.parameters()
    parts = [{"params": [params[i] for i in group]} for group in groups] if groups else params
    optimizer = case.ours(parts, **more)
    for step in range(len(setting.present)):
        for p, g in zip(params, setting.gradients(step), strict=True):
            p.grad = lay_out(p, None if g is None else g * factor)
        optimizer.step()
    return optimizer, params


def assert_near(
    ours: torch.Tensor, theirs: torch.Tensor, what: str, tolerance: float, start: torch.Tensor | None = None
) -> None:
    """Equal relative to each element, or to the largest one of the tensor, and of its start, where elements cancel."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    if ours.numel():
        scale = max(x.detach().abs().max().item() for x in (theirs, start) if x is not None)
        torch.testing.assert_close(
            ours.detach(), theirs.detach(), rtol=tolerance, atol=tolerance * scale,
            msg=lambda text: f"{what}: {text}", check_stride=True,
        )  # fmt: skip


@every_case
@few
@given(data=st.data())
def test_kernels_do_what_eager_torch_does(case: Case, data: st.DataObject) -> None:
    """float64 to 1e-12; float32 to 16 ulps after seven steps: a kernel's root may be an ulp off torch's, and centered
    RMSprop subtracts what is nearly equal. Rules with sums to 16 times that: what differs in one reaches all."""
    setting = data.draw(some_settings(case, (torch.float64, torch.float32, torch.complex64), in_order=True))
    ours, our_params = run(case, setting, backend="numba")
    theirs, their_params = run(case, setting, backend="reference")
    tolerance = 1e-12 if setting.dtype == torch.float64 else 16 * torch.finfo(torch.float32).eps
    tolerance *= 16 if has_sums(ours) else 1
    for i, (p, q, start) in enumerate(zip(our_params, their_params, setting.parameters(), strict=True)):
        assert_near(p, q, f"parameter {i}", tolerance, start)
        assert set(ours.state[p]) == set(theirs.state[q])
        for key, value in theirs.state[q].items():
            assert_near(ours.state[p][key], value, f"{key} of {i}", tolerance)


@every_case
@few
@given(data=st.data())
def test_foreach_does_what_eager_torch_does(case: Case, data: st.DataObject) -> None:
    setting = data.draw(some_settings(case))
    _, our_params = run(case, setting, backend="foreach")
    _, their_params = run(case, setting, backend="reference")
    tolerance = 1e-12 if setting.dtype == torch.float64 else 16 * torch.finfo(torch.float32).eps
    for i, (p, q, start) in enumerate(zip(our_params, their_params, setting.parameters(), strict=True)):
        assert_near(p, q, f"parameter {i}", tolerance, start)


@every_case
@few
@given(data=st.data())
def test_splitting_a_group_changes_no_bit(case: Case, data: st.DataObject) -> None:
    """Neither does the order of parameters."""
    setting = data.draw(some_settings(case, most=6))
    count = len(setting.shapes)
    order = data.draw(st.permutations(range(count)))
    cuts = sorted(data.draw(st.sets(st.integers(1, count - 1)))) if count > 1 else []
    groups = [order[a:b] for a, b in zip([0, *cuts], [*cuts, count], strict=True)]
    one, params = run(case, setting)
    many, split = run(case, setting, groups)
    assert_equal([p.detach() for p in split], [p.detach() for p in params])
    for p, q in zip(params, split, strict=True):
        assert_equal(many.state[q], one.state[p])


@each([case for case in RICH if case.cls.takes(torch.empty(1))])
@few
@given(data=st.data())
def test_coordinates_are_alike(case: Case, data: st.DataObject) -> None:
    """Permuting the coordinates of parameters and gradients permutes the result, to the bit: wherever an element lies,
    in a vector or in what remains of one, in one large tensor or in many small ones. Rules with sums over a tensor know
    which elements are in it, and add them up in their order: of one tensor permuted, they give the same to rounding.
    """
    count = data.draw(st.sampled_from([1, 2, 3, 7, 8, 9, 31, 64, 65, 100, 257]))
    dtype = data.draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    seed = data.draw(st.integers(0, 10**6))
    permutation = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    cut = data.draw(st.integers(0, count))
    start = randn(count, dtype=dtype, seed=seed)
    grads = [randn(count, dtype=dtype, seed=seed + 1 + t) for t in range(7)]
    p = torch.nn.Parameter(start.clone())
    permuted = start[permutation]
    a = case.ours([p])
    if sums := has_sums(a):
        cut = 0
    parts = [torch.nn.Parameter(permuted[:cut].clone()), torch.nn.Parameter(permuted[cut:].clone())]
    b = case.ours(parts)
    for g in grads:
        p.grad = g.clone()
        parts[0].grad, parts[1].grad = g[permutation][:cut], g[permutation][cut:]
        a.step()
        b.step()
    joined = torch.cat([q.detach() for q in parts])
    if sums:
        assert_near(joined, p.detach()[permutation], "permuted", ROUNDING[dtype])
    else:
        assert_equal(joined, p.detach()[permutation])


@every_rule
@few
@given(data=st.data())
def test_mirroring_everything_mirrors_the_result(case: Case, data: st.DataObject) -> None:
    """All rules are odd: with parameters and gradients of the other sign every step is the same, of the other sign."""
    setting = data.draw(some_settings(case))
    _, params = run(case, setting)
    mirrored = setting.parameters()
    for p in mirrored:
        p.data.neg_()
    optimizer = case.ours(mirrored)
    for step in range(len(setting.present)):
        for p, g in zip(mirrored, setting.gradients(step), strict=True):
            p.grad = lay_out(p, None if g is None else -g)
        optimizer.step()
    assert_equal([-p.detach() for p in mirrored], [p.detach() for p in params])


SCALE_FREE = [
    Case("Adam", dict(lr=0.01, eps=0.0)),
    Case("Adam", dict(lr=0.01, eps=0.0, amsgrad=True)),
    Case("AdamW", dict(lr=0.01, eps=0.0)),
    Case("NAdam", dict(lr=0.01, eps=0.0)),
    Case("Adamax", dict(lr=0.01, eps=0.0)),
    Case("RMSprop", dict(lr=0.01, eps=0.0)),
    Case("RMSprop", dict(lr=0.01, eps=0.0, momentum=0.9)),
    Case("Adagrad", dict(lr=0.01, eps=0.0)),
    Case("ADOPT", dict(lr=0.01, eps=0.0)),
    Case("Lion", dict(lr=0.01)),
    Case("Rprop", dict(lr=0.01)),
    Case("Adafactor", dict(lr=0.01, eps=(0.0, 1e-3))),
    Case("Muon", dict(lr=0.01, eps=0.0)),
    Case("NorMuon", dict(lr=0.01, eps=0.0)),
]


@each(SCALE_FREE)
@few
@given(data=st.data())
def test_the_size_of_gradients_does_not_matter(case: Case, data: st.DataObject) -> None:
    """Without eps, gradients multiplied by a power of two make the same steps, to the bit."""
    setting = data.draw(some_settings(case))
    factor = 2.0 ** data.draw(st.integers(-12, 12))
    _, params = run(case, setting)
    _, scaled = run(case, setting, factor=factor)
    assert_equal([p.detach() for p in scaled], [p.detach() for p in params], f"factor {factor}")


@every_rule
@few
@given(data=st.data())
def test_a_gradient_in_any_layout_is_the_same_gradient(case: Case, data: st.DataObject) -> None:
    """Contiguous, or in the parameter's own order: to the bit where kernels and eager torch agree, else to 1e-12."""
    setting = data.draw(some_settings(case, (torch.float64,)))
    _, params = run(case, setting)
    others = setting.parameters()
    optimizer = case.ours(others)
    for step in range(len(setting.present)):
        for p, g in zip(others, setting.gradients(step), strict=True):
            p.grad = g
        optimizer.step()
    for i, (p, q) in enumerate(zip(others, params, strict=True)):
        assert_near(p, q, f"parameter {i}", 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@every_rule
def test_the_place_in_memory_does_not_matter(case: Case, dtype: torch.dtype) -> None:
    """A parameter that starts at an odd element of its storage makes the bits of one that starts at the first."""
    results = []
    for offset in (0, 1, 3):
        storage = torch.zeros(120, dtype=dtype)
        p = torch.nn.Parameter(case.fit(storage[offset : offset + 101]))
        p.data.copy_(randn(101, dtype=dtype, seed=1))
        optimizer = case.ours([p])
        for step in range(7):
            p.grad = case.fit(randn(101 + offset, dtype=dtype, seed=step)[offset:])
            p.grad.copy_(randn(101, dtype=dtype, seed=50 + step))
            optimizer.step()
        results.append(p.detach().clone())
        assert not storage[:offset].any()
        assert not storage[offset + 101 :].any()
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])
