"""Fixtures of several files."""

import pytest

from cases import make_matrices_exact


@pytest.fixture
def exact_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon's function of matrices in float64."""
    make_matrices_exact(monkeypatch)
