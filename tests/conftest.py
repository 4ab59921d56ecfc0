"""Fixtures of several files."""

import signal

import pytest

from cases import make_matrices_exact

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what is to run in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def exact_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Muon's function of matrices in float64."""
    make_matrices_exact(monkeypatch)
