"""Orthogonalization: exact facts in float64, the published ranges of singular values, and what rounding may cost."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.optim._muon import _zeropower_via_newtonschulz

from schuss.matrices.newton_schulz import PRESETS, orthogonalize

JORDAN, POLAR = PRESETS["jordan"], PRESETS["polar_express"]
# Output singular values of those that are at least 0.002 of the Frobenius norm, in exact arithmetic.
RANGES = {"jordan": (0.6818, 1.2024), "polar_express": (0.8589, 1.1411)}
SPECTRA = {
    "even": lambda t: 1 - t / 2,
    "ill-conditioned": lambda t: 10 ** (-2.2 * t),
    "harmonic": lambda t: 1 / (1 + 63 * t),
    "one large": lambda t: torch.where(t == 0, 1.0, 0.02),
    "low rank": lambda t: torch.where(t < 0.1, 1.0, 0.0),
}

every_preset = pytest.mark.parametrize("preset", PRESETS)
both_forms = pytest.mark.parametrize("gram", [False, True], ids=["plain", "gram"])
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)
every_orientation = pytest.mark.parametrize("tall", [False, True], ids=["wide", "tall"])


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@cache
def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(randn(n, n, seed=seed))[0]


def made_of(s: Tensor, columns: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """U, U diag(s) Vᵀ and Vᵀ, with random U and V."""
    u, vt = orthogonal(len(s), 1), orthogonal(columns or 2 * len(s), 2)[: len(s)]
    return u, u * s @ vt, vt


def phi(s: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
    for a, b, c in coefficients:
        s = a * s + b * s**3 + c * s**5
    return s


def spectrum_of(name: str, m: int) -> Tensor:
    return SPECTRA[name](torch.linspace(0, 1, m, dtype=torch.float64))


@every_preset
@both_forms
def test_singular_vectors_stay_and_singular_values_follow_the_polynomial(preset: str, gram: bool) -> None:
    s = torch.logspace(0, -4, 24, dtype=torch.float64)
    u, x, vt = made_of(s)
    result = u.mT @ orthogonalize(x, PRESETS[preset], dtype=torch.float64, gram=gram) @ vt.mT
    coefficients = [(3.4445, -4.7750, 2.0315)] * 5
    normalized = s / s.norm()
    if preset == "polar_express":
        coefficients = [
            (8.15655, -22.48329, 15.87877), (4.04293, -2.80892, 0.50002), (3.89167, -2.77248, 0.50606),
            (3.28575, -2.36813, 0.46449), (2.34654, -1.70978, 0.42324),
        ]  # fmt: skip
        normalized = normalized / 1.02
    torch.testing.assert_close(result, torch.diag(phi(normalized, coefficients)), rtol=0, atol=1e-11)


@every_preset
def test_the_polynomials_have_the_published_ranges(preset: str) -> None:
    above = torch.linspace(0.002, 1, 200_001, dtype=torch.float64)
    out = phi(above, PRESETS[preset])
    assert (round(out.min().item(), 4), round(out.max().item(), 4)) == RANGES[preset]


@pytest.mark.parametrize(("smallest", "low", "high"), [(0.01, 0.6818, 1.1344), (0.005, 0.6818, 1.1544)])
def test_jordan_is_narrower_for_larger_singular_values(smallest: float, low: float, high: float) -> None:
    s = torch.logspace(np.log10(smallest), 0, 40, dtype=torch.float64)
    s = s * (smallest / (s / s.norm()).min()).clamp(min=1)  # the small ones are at least `smallest` of the norm
    s[s < smallest * s.norm()] = smallest * s.norm()
    values = torch.linalg.svdvals(orthogonalize(made_of(s)[1], JORDAN, dtype=torch.float64))
    assert low - 1e-4 <= values.min()
    assert values.max() <= high + 1e-4


@every_preset
@both_forms
@every_orientation
@every_spectrum
def test_singular_values_are_in_range_in_bfloat16(preset: str, gram: bool, tall: bool, spectrum: str) -> None:
    s = spectrum_of(spectrum, 96)
    u, x, vt = made_of(s, 240)
    result = orthogonalize(x.mT if tall else x, PRESETS[preset], gram=gram)
    values = (u.mT @ (result.mT if tall else result) @ vt.mT).diagonal()[s / s.norm() > 0.002]
    low, high = RANGES[preset]
    assert low - 0.02 < values.min()
    assert values.max() < high + 0.02


@every_preset
@every_spectrum
@pytest.mark.parametrize("side", [64, 256])
def test_the_gram_form_mixes_singular_vectors_as_little_as_the_plain_form(
    preset: str, spectrum: str, side: int
) -> None:
    u, x, vt = made_of(spectrum_of(spectrum, side), 2 * side)
    mixed = []
    for gram in (False, True):
        result = u.mT @ orthogonalize(x, PRESETS[preset], gram=gram).double() @ vt.mT
        mixed.append((result - torch.diag(result.diagonal())).norm() / result.norm())
    # Rounding in bfloat16 fills directions in which a matrix of low rank is zero, in either form.
    assert mixed[0] < (0.4 if spectrum == "low rank" else 0.035)
    assert mixed[1] < max(mixed[0], 0.035)


@pytest.mark.parametrize("rows", [3, 40, 600])
@every_preset
@every_orientation
def test_both_forms_are_the_loop_of_the_definition_in_float64(rows: int, preset: str, tall: bool) -> None:
    g = randn(rows, 2 * rows + 1, seed=rows).numpy()
    x = g / np.linalg.norm(g)
    for a, b, c in PRESETS[preset]:
        gram_matrix = x @ x.T
        x = a * x + (b * gram_matrix + c * gram_matrix @ gram_matrix) @ x
    for gram in (None, False, True):
        given = torch.from_numpy(g.T if tall else g)
        result = orthogonalize(given, PRESETS[preset], dtype=torch.float64, gram=gram)
        np.testing.assert_allclose(result.numpy(), x.T if tall else x, rtol=0, atol=1e-10)


@both_forms
def test_runs_of_many_iterations_restart(gram: bool) -> None:
    s = spectrum_of("ill-conditioned", 96)
    result = orthogonalize(made_of(s, 240)[1], JORDAN[:1] * 12, gram=gram)
    assert torch.linalg.svdvals(result).max() < 1.25


@pytest.mark.parametrize("shape", [(96, 240), (240, 96), (96, 96), (640, 1000), (1000, 640)], ids=str)
def test_agrees_with_torch_in_bfloat16(shape: tuple[int, int]) -> None:
    g = randn(*shape).float()
    expected = _zeropower_via_newtonschulz(g, JORDAN[0], 5, 1e-7).float()
    result = orthogonalize(g, JORDAN)
    assert (result - expected).norm() < 0.04 * expected.norm()
    assert result.shape == g.shape


@both_forms
def test_is_odd(gram: bool) -> None:
    x = randn(30, 70).float()
    assert torch.equal(orthogonalize(-x, JORDAN, gram=gram), -orthogonalize(x, JORDAN, gram=gram))


@both_forms
def test_rotations_pass_through(gram: bool) -> None:
    x, q, p = randn(20, 50), orthogonal(20, 3), orthogonal(50, 4)
    rotated = orthogonalize(q @ x @ p, JORDAN, dtype=torch.float64, gram=gram)
    torch.testing.assert_close(rotated, q @ orthogonalize(x, JORDAN, dtype=torch.float64, gram=gram) @ p)


@pytest.mark.parametrize("scale", [2.0**40, 2.0**-20, 3.7, 1e-5])
def test_scale_does_not_matter(scale: float) -> None:
    x = randn(20, 50).float().clamp(-3, 3)
    expected = orthogonalize(x, JORDAN)
    result = orthogonalize(x * scale, JORDAN)
    assert torch.equal(result, expected) if np.log2(scale) % 1 == 0 else (result - expected).abs().max() < 0.01


@pytest.mark.parametrize("scale", [1e20, 1e30, 1e36])
def test_squares_that_overflow_do_no_harm(scale: float) -> None:
    u, x, vt = made_of(1 - torch.linspace(0, 0.5, 20, dtype=torch.float64))
    x = x.float() / x.abs().max().float()
    values = (u.mT @ orthogonalize(x * scale, JORDAN).double() @ vt.mT).diagonal()
    assert values.min() > 0.66
    assert values.max() < 1.16


def test_eps_bounds_the_norm_that_divides() -> None:
    x = randn(4, 9)
    x /= x.norm()
    tiny = 1e-3 * x
    torch.testing.assert_close(
        orthogonalize(tiny, [(1.0, 0.0, 0.0)], eps=0.1, dtype=torch.float64), tiny / 0.1, rtol=1e-14, atol=0
    )
    torch.testing.assert_close(
        orthogonalize(tiny, [(1.0, 0.0, 0.0)], eps=1e-4, dtype=torch.float64), x, rtol=1e-14, atol=0
    )
    assert orthogonalize(x.float() * 1e-42, JORDAN).abs().max() < 1e-30


@pytest.mark.parametrize("shape", [(5, 17), (17, 5), (6, 6), (2, 5, 17)], ids=str)
def test_a_zero_matrix_stays_zero(shape: tuple[int, ...]) -> None:
    assert torch.equal(orthogonalize(torch.zeros(shape), JORDAN), torch.zeros(shape))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nan_spoils_its_own_matrix_only(bad: float) -> None:
    x = randn(3, 8, 20).float()
    expected = orthogonalize(x, JORDAN)
    x[1, 2, 3] = bad
    result = orthogonalize(x, JORDAN)
    assert result[1].isnan().all()
    assert torch.equal(result[::2], expected[::2])


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (1, 1)], ids=str)
@both_forms
def test_vectors_are_normalized(shape: tuple[int, int], gram: bool) -> None:
    x = randn(*shape)
    scale = phi(torch.ones((), dtype=torch.float64), JORDAN)
    torch.testing.assert_close(orthogonalize(x, JORDAN, dtype=torch.float64, gram=gram), scale * x / x.norm())


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0), (0, 3, 4), (2, 0, 4)], ids=str)
def test_empty_matrices(shape: tuple[int, ...]) -> None:
    assert orthogonalize(torch.empty(shape), JORDAN).shape == shape


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inside", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_dtypes(dtype: torch.dtype, inside: torch.dtype) -> None:
    x = randn(24, 60).to(dtype)
    result = orthogonalize(x, JORDAN, dtype=inside)
    assert result.dtype == dtype
    expected = orthogonalize(x.double(), JORDAN, dtype=torch.float64)
    tolerance = 16 * max(torch.finfo(dtype).eps, torch.finfo(inside).eps)
    assert (result - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (12, 12)], ids=str)
def test_a_batch_is_its_matrices_one_by_one(shape: tuple[int, int]) -> None:
    x = randn(2, 3, *shape)
    result = orthogonalize(x, JORDAN, dtype=torch.float64)
    for i in range(2):
        for j in range(3):
            alone = orthogonalize(x[i, j], JORDAN, dtype=torch.float64)
            torch.testing.assert_close(result[i, j], alone, rtol=0, atol=1e-13)


def test_a_batch_larger_than_the_cache_is_its_matrices_one_by_one() -> None:
    x = randn(3, 300, 3000).float()
    alone = torch.stack([orthogonalize(matrix, JORDAN) for matrix in x])
    assert torch.equal(orthogonalize(x, JORDAN), alone)


def test_the_layout_of_the_input_does_not_matter() -> None:
    x = randn(40, 120)
    expected = orthogonalize(x[::2, ::2].clone(), JORDAN, dtype=torch.float64)
    torch.testing.assert_close(orthogonalize(x[::2, ::2], JORDAN, dtype=torch.float64), expected)
    transposed = x.mT.contiguous().mT[::2, ::2]
    torch.testing.assert_close(orthogonalize(transposed, JORDAN, dtype=torch.float64), expected)
    same = x[:1, :1].expand(3, 8)
    torch.testing.assert_close(
        orthogonalize(same, JORDAN, dtype=torch.float64), orthogonalize(same.clone(), JORDAN, dtype=torch.float64)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(10, 30), (30, 10), (10, 10)], ids=str)
def test_the_input_is_not_modified(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = randn(*shape).to(dtype)
    x.requires_grad_()
    before, version = x.detach().clone(), x._version
    result = orthogonalize(x, JORDAN, dtype=dtype)
    assert torch.equal(x, before)
    assert x._version == version
    assert not result.requires_grad
    assert result.data_ptr() != x.data_ptr()


def test_nothing_depends_on_the_values() -> None:
    x = torch.empty(3, 64, 256, device="meta", dtype=torch.float32)
    result = orthogonalize(x, POLAR)
    assert (result.shape, result.dtype, result.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize(
    ("x", "dtype", "message"),
    [
        (torch.ones(3), torch.bfloat16, "x must have two dimensions or more, got shape"),
        (torch.ones(3, 4, dtype=torch.int32), torch.bfloat16, r"x.dtype must be of floating point, got torch.int32"),
        (torch.ones(3, 4, dtype=torch.complex64), torch.bfloat16, r"x.dtype must be of floating point"),
        (torch.ones(3, 4), torch.int8, "dtype must be of floating point, got torch.int8"),
    ],
)
def test_errors(x: Tensor, dtype: torch.dtype, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        orthogonalize(x, JORDAN, dtype=dtype)
