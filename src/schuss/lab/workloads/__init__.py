"""The workloads that come with schuss, on data that need no download, and how one's own are found."""

from collections.abc import Callable

from schuss.bounds import nearest
from schuss.lab.workload import Task, Workload
from schuss.lab.workloads.embeddings import factorisation, zipf_dense, zipf_sparse
from schuss.lab.workloads.images import autoencoder, digits, digits_vit
from schuss.lab.workloads.quadratics import noisy_quadratic, quadratic_deep
from schuss.lab.workloads.tabular import breast_cancer, diabetes
from schuss.lab.workloads.text import char_gpt, char_lstm
from schuss.lookup import named

FUNCTIONS: tuple[Callable[[int], Task], ...] = (
    digits, digits_vit, autoencoder, breast_cancer, diabetes, char_gpt, char_lstm, zipf_dense, zipf_sparse,
    factorisation, quadratic_deep, noisy_quadratic,
)  # fmt: skip

WORKLOADS: dict[str, Workload] = {workload.name: workload for workload in map(Workload.of, FUNCTIONS)}
"""By name, in the order in which `schuss workloads` shows them."""


def find(name: str) -> Workload:
    """The workload called `name`, of schuss or, as `module:function`, of anybody.

    Raises:
        ValueError: there is none, its module cannot be imported, or it cannot be called.
    """
    if ":" not in name:
        if name not in WORKLOADS:
            raise ValueError(f"unknown workload {name!r}: {nearest(name, [*WORKLOADS, 'module:function'])}")
        return WORKLOADS[name]
    function = named(name)
    if not callable(function):
        raise ValueError(f"{name} must be a function of a seed, got {type(function).__name__}")
    return Workload(name, Workload.of(function).description, function)
