"""The functions of matrices of SOAP and Shampoo: against dense algebra in float64."""

import numpy as np
import pytest
import torch

from cases import randn
from schuss.matrices import kronecker

FACTORS = [(True, True), (True, False), (False, True)]


def symmetric(side: int, seed: int, values: np.ndarray | None = None) -> torch.Tensor:
    """A symmetric matrix with these eigenvalues."""
    basis = torch.linalg.qr(randn(side, side, seed=seed)).Q
    return (basis * torch.as_tensor(np.linspace(1, 2, side) if values is None else values)) @ basis.mT


# --- blocks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "block", "expected"),
    [(10, None, (1, 10)), (10, 10, (1, 10)), (10, 4, (3, 4)), (10, 6, (2, 5)), (11, 10, (2, 6)), (3, 1, (3, 1))],
)
def test_a_side_is_cut_into_as_few_blocks_as_can_be(side: int, block: int | None, expected: tuple[int, int]) -> None:
    assert kronecker.cut(side, block) == expected


def test_blocks_are_those_of_the_matrix_row_by_row() -> None:
    x = randn(2, 5, 7)
    parts = kronecker.grid(x, 3)  # rows 3 and 2, columns 3, 3 and 1
    assert parts.shape == (2, 6, 3, 3)
    whole = np.zeros((2, 6, 9))
    whole[:, :5, :7] = x.numpy()
    for k in range(6):
        row, column = divmod(k, 3)
        expected = whole[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert np.array_equal(parts[:, k].numpy(), expected)


@pytest.mark.parametrize("shape", [(5, 7), (6, 6), (1, 4), (4, 1), (2, 9)])
@pytest.mark.parametrize("block", [None, 1, 2, 3, 100])
def test_surrounding_with_nothing_is_nothing(shape: tuple[int, int], block: int | None) -> None:
    x = randn(3, *shape)
    assert torch.equal(kronecker.surround(x, None, None, block=block), x)


@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("block", [3, 4, 100])
def test_blocks_have_factors_of_their_own(block: int, factors: tuple[bool, bool]) -> None:
    """Of 8 x 6: cut, multiplied and put together by NumPy."""
    x = randn(2, 8, 6)
    (down, height), (across, width) = kronecker.cut(8, block), kronecker.cut(6, block)
    left = randn(2, down * across, height, height, seed=1) if factors[0] else None
    right = randn(2, down * across, width, width, seed=2) if factors[1] else None
    expected = np.zeros((2, down * height, across * width))
    padded = np.zeros_like(expected)
    padded[:, :8, :6] = x.numpy()
    for n in range(2):
        for k in range(down * across):
            rows = slice(k // across * height, k // across * height + height)
            columns = slice(k % across * width, k % across * width + width)
            part = padded[n, rows, columns]
            part = part if left is None else left[n, k].numpy() @ part
            expected[n, rows, columns] = part if right is None else part @ right[n, k].numpy()
    np.testing.assert_allclose(
        kronecker.surround(x, left, right, block=block).numpy(), expected[:, :8, :6], rtol=1e-13, atol=1e-13
    )


# --- rotations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factors", FACTORS)
def test_rotating_there_and_back(factors: tuple[bool, bool]) -> None:
    x = randn(3, 5, 7)
    left = torch.linalg.qr(randn(3, 5, 5, seed=1)).Q if factors[0] else None
    right = torch.linalg.qr(randn(3, 7, 7, seed=2)).Q if factors[1] else None
    there = kronecker.rotate(x, left, right)
    expected = x if left is None else left.mT @ x
    torch.testing.assert_close(there, expected if right is None else expected @ right, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(kronecker.rotate_back(there, left, right), x, rtol=1e-13, atol=1e-13)


def test_a_matrix_has_the_same_bits_whatever_stands_beside_it() -> None:
    x, left, right = randn(4, 40, 30), randn(4, 40, 40, seed=1), randn(4, 30, 30, seed=2)
    together = kronecker.surround(x, left, right)
    moments = kronecker.left_moment(x, left, 0.5, 0.25)
    for k in range(4):
        one = slice(k, k + 1)
        assert torch.equal(kronecker.surround(x[one], left[one], right[one]), together[one])
        assert torch.equal(kronecker.left_moment(x[one], left[one], 0.5, 0.25), moments[one])


def test_bfloat16_products_are_near() -> None:
    x = randn(2, 60, 50, dtype=torch.float32)
    q = torch.linalg.qr(randn(2, 60, 60, seed=1, dtype=torch.float32)).Q
    exact, rounded = kronecker.rotate(x, q, None), kronecker.rotate(x.bfloat16(), q, None)
    assert rounded.dtype == torch.bfloat16
    error = (rounded.float() - exact).norm() / exact.norm()
    assert 2.0**-12 < error < 2.0**-7  # rounded indeed, and to no fewer than 8 bits


# --- moments ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (520, 3), (3, 520)])  # products of long sides are made in strips
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_moments_of_rows_and_columns(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = randn(2, *shape, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    keep, weight = np.array([0.5, 1.0]), np.array([0.25, 2.0])
    for moment, side in ((kronecker.left_moment, 0), (kronecker.right_moment, 1)):
        before = randn(2, shape[side], shape[side], seed=3, dtype=wide)
        before = before + before.mT
        after = moment(x, before, keep, weight)
        y = x.double() if side == 0 else x.double().mT
        scale = torch.as_tensor(keep)[:, None, None], torch.as_tensor(weight)[:, None, None]
        expected = scale[0] * before.double() + scale[1] * (y @ y.mT)
        assert after.dtype == wide
        tolerance = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-8}[dtype]
        error = (after.double() - expected).abs().max() / expected.abs().max()
        assert error <= tolerance
        assert (after - after.mT).abs().max() <= tolerance * expected.abs().max()


def test_moments_of_blocks_are_the_blocks_moments() -> None:
    x = randn(1, 8, 6)
    before = torch.zeros(1, 6, 3, 3)  # blocks of 3 x 3: 3 down, 2 across
    after = kronecker.left_moment(x, before.double(), 0.0, 1.0, block=3)
    parts = kronecker.grid(x, 3)
    torch.testing.assert_close(after, parts @ parts.mT)


def test_a_moment_without_weight_stays() -> None:
    x, before = randn(1, 4, 3), randn(1, 4, 4, seed=1)
    x[0, 0, 0] = torch.nan
    assert torch.equal(kronecker.left_moment(x, before, 1.0, 0.0), before)


@pytest.mark.parametrize("numbers", [0.3, np.float64(0.3), np.full(1, 0.3), torch.full((1,), 0.3), torch.tensor(0.3)])
def test_numbers_of_every_back_end_make_the_same_bits(numbers: object) -> None:
    """A float64 number rounds as one in a float32 tensor, for matrices in float32."""
    x, before = randn(1, 4, 3, dtype=torch.float32), randn(1, 4, 4, seed=1, dtype=torch.float32)
    expected = kronecker.left_moment(x, before, torch.full((1,), 0.7), torch.full((1,), 0.3))
    assert torch.equal(kronecker.left_moment(x, before, np.full(1, 0.7), numbers), expected)


@pytest.mark.parametrize("block", [None, 3])
def test_lists_are_batches(block: int | None) -> None:
    """To the same bits."""
    x = randn(2, 8, 6)
    blocks = () if block is None else (6,)
    left, right = randn(2, *blocks, *[block or 8] * 2, seed=1), randn(2, *blocks, *[block or 6] * 2, seed=2)
    for function, squares in ((kronecker.rotate, (left, right)), (kronecker.rotate_back, (None, right))):
        if block is None:
            assert torch.equal(function(x, *(f if f is None else list(f) for f in squares)), function(x, *squares))
    surrounded = kronecker.surround(x, left, right, block=block)
    assert torch.equal(kronecker.surround(x, list(left), list(right), block=block), surrounded)
    moments = kronecker.left_moment(x, left, 0.5, 0.25, block=block)
    assert torch.equal(kronecker.left_moment(x, list(left), 0.5, 0.25, block=block), moments)


@pytest.mark.parametrize("side", [7, 600])  # in one piece, and in strips
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_in_their_own_place(side: int, dtype: torch.dtype) -> None:
    x, before = randn(3, side, 5, dtype=dtype), randn(3, side, side, seed=1, dtype=torch.float32)
    before += before.mT.clone()
    for moment, y in ((kronecker.left_moment, x), (kronecker.right_moment, x.mT)):
        expected = moment(y, before, 0.75, 0.5)
        own = [a.clone() for a in before]
        assert moment(y, own, 0.75, 0.5, out=[own[0], None, own[2]]) is None
        assert torch.equal(torch.stack(own), torch.stack([expected[0], before[1], expected[2]]))
        elsewhere = [torch.full_like(a, torch.nan) for a in before]
        moment(y, before, np.array([0.75, 1.0, 0.75]), np.array([0.5, 0.0, 0.5]), out=elsewhere)
        assert torch.equal(torch.stack(elsewhere), torch.stack([expected[0], before[1], expected[2]]))


# --- eigenvectors -----------------------------------------------------------------------------------------------------


def test_an_eigenbasis_begins_with_the_largest_eigenvalue() -> None:
    a = symmetric(6, 1, np.array([3.0, 1.0, 5.0, 0.0, 4.0, 2.0]))
    basis = kronecker.eigenbasis(a)
    assert basis is not None
    expected = torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0, 0.0], dtype=torch.float64))
    torch.testing.assert_close(basis.mT @ a @ basis, expected, rtol=1e-13, atol=1e-13)


def test_an_eigenbasis_of_nothing_is_a_basis() -> None:
    basis = kronecker.eigenbasis(torch.zeros(4, 4))
    assert basis is not None
    torch.testing.assert_close(basis @ basis.mT, torch.eye(4))


def test_power_iterations_approach_the_eigenbasis() -> None:
    """The part of a column outside its eigenvector shrinks by the ratio of eigenvalues, 1/2 at each iteration."""
    a = symmetric(5, 2, 2.0 ** -np.arange(5))
    basis = torch.linalg.qr(kronecker.eigenbasis(a) + 0.05 * randn(5, 5, seed=3)).Q
    off = []
    for _ in range(12):
        found = kronecker.next_basis(a, basis)
        assert found is not None
        basis, order = found
        torch.testing.assert_close(basis.mT @ basis, torch.eye(5, dtype=torch.float64))
        turned = basis.mT @ a @ basis
        off.append((turned - turned.diag().diag()).norm().item())
    assert sorted(order.tolist()) == [0, 1, 2, 3, 4]
    assert off[-1] < 1e-3 * off[0]
    assert off[-1] / off[-2] == pytest.approx(0.5, abs=0.05)


def test_columns_are_put_in_order_of_their_eigenvalues() -> None:
    """From a basis that is right but shuffled: the order is told, and nothing else changes, but for signs."""
    a = symmetric(5, 4)
    sorted_basis = kronecker.eigenbasis(a)
    assert sorted_basis is not None
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    found = kronecker.next_basis(a, sorted_basis[:, shuffle])
    assert found is not None
    basis, order = found
    assert torch.equal(shuffle[order], torch.arange(5))
    torch.testing.assert_close((basis.mT @ sorted_basis).abs(), torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
@pytest.mark.parametrize("factors", [*FACTORS, (False, False)])
def test_turning_into_new_bases(shape: tuple[int, int], factors: tuple[bool, bool]) -> None:
    """What a matrix of coordinates stands for stays."""
    old, new = ([torch.linalg.qr(randn(n, n, seed=seed + n)).Q for n in shape] for seed in (1, 2))
    x = randn(*shape)
    pairs = [(a, b) if there else None for a, b, there in zip(old, new, factors, strict=True)]
    turned = kronecker.turn(x, *pairs)
    before, after = ([q if there else None for q, there in zip(bases, factors, strict=True)] for bases in (old, new))
    stands_for = [kronecker.rotate_back(y[None], *([q[None] if q is not None else q for q in bases]))
                  for y, bases in ((x, before), (turned, after))]  # fmt: skip
    torch.testing.assert_close(*stands_for, rtol=1e-13, atol=1e-13)
    rounded = kronecker.turn(x, *pairs, torch.bfloat16)
    assert rounded.dtype == x.dtype
    if any(factors):
        assert 2.0**-12 < (rounded - turned).norm() / turned.norm() < 2.0**-6


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_has_no_basis_and_no_root(bad: float) -> None:
    a = symmetric(4, 1)
    basis = kronecker.eigenbasis(a)
    assert basis is not None
    a[2, 1] = a[1, 2] = bad
    assert kronecker.eigenbasis(a) is None
    assert kronecker.next_basis(a, basis) is None
    assert kronecker.inverse_root(a[None], 0.25, 1e-6) is None


def test_eigenvectors_that_are_not_found_are_looked_for_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    a, asked = symmetric(4, 1).float(), []
    eigh = torch.linalg.eigh

    def fails(x: torch.Tensor) -> object:
        asked.append(x.dtype)
        if x.dtype == torch.float32 or len(asked) > 2:
            raise torch.linalg.LinAlgError("did not converge")
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", fails)
    basis = kronecker.eigenbasis(a)
    assert asked == [torch.float32, torch.float64]
    assert basis is not None
    assert basis.dtype == torch.float32
    torch.testing.assert_close((basis.mT @ a @ basis).diag(), torch.linspace(2, 1, 4))
    assert kronecker.eigenbasis(a) is None  # neither dtype


# --- roots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0, 0.3])
def test_inverse_roots(exponent: float) -> None:
    a = torch.stack([symmetric(5, 1), symmetric(5, 2)])
    root = kronecker.inverse_root(a, exponent, 1e-300)
    assert root is not None
    values, vectors = np.linalg.eigh(a.numpy())
    np.testing.assert_allclose(root, (vectors * values[:, None] ** -exponent) @ vectors.transpose(0, 2, 1), rtol=1e-12)


def test_eps_is_relative_to_the_largest_eigenvalue() -> None:
    """So a matrix of low rank, of whatever size, has a root: its zeros, also those rounded below zero, become eps."""
    x = randn(6, 2, dtype=torch.float32)
    for factor in (1e-8, 1.0, 1e8):
        a = factor * x @ x.mT
        root = kronecker.inverse_root(a[None], 0.5, 1e-2)
        assert root is not None
        largest = torch.linalg.eigvalsh(a)[-1].item()
        values = torch.linalg.eigvalsh(root[0]).tolist()
        assert values[-1] == pytest.approx((1e-2 * largest) ** -0.5, rel=1e-3)
        assert values[0] == pytest.approx((1.01 * largest) ** -0.5, rel=1e-3)


def test_the_root_of_nothing_is_nothing() -> None:
    a = torch.stack([torch.zeros(3, 3), torch.eye(3)])
    root = kronecker.inverse_root(a, 0.25, 1e-6)
    assert root is not None
    assert not root[0].any()
    torch.testing.assert_close(root[1], torch.eye(3), rtol=1e-6, atol=1e-6)
