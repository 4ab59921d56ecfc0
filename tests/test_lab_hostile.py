"""What users' functions do that the lab has to say in a line, or must not take for something else."""

import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import small_workloads as small
from schuss import optim
from schuss.cli import main
from schuss.lab.candidate import Candidate, candidates
from schuss.lab.check import check
from schuss.lab.compare import compare, extended
from schuss.lab.evidence import against_the_best
from schuss.lab.find_lr import find_lr
from schuss.lab.ranking import Mean
from schuss.lab.run import attempt
from schuss.lab.store import Store, source
from schuss.lab.workload import Task, Workload


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def changed(**changes: Any) -> Callable[[int], Task]:
    def make(seed: int) -> Task:
        return replace(small.plane(seed), **changes)

    return make


SGD = {"optimizers": ["torch:SGD"], "lrs": [0.1], "seeds": 1, "extend": 0}


# --- numbers that would be wrong --------------------------------------------------------------------------------------


def split(parameters: Any, lr: float) -> torch.optim.Optimizer:
    """Goes through the parameters twice."""
    matrices = [p for p in parameters if p.ndim == 2]
    rest = [p for p in parameters if p.ndim < 2]
    return torch.optim.SGD([{"params": matrices}, {"params": rest, "weight_decay": 0.0}], lr=lr)


def test_a_function_may_go_through_the_parameters_twice() -> None:
    model = nn.Linear(3, 2)
    made = Candidate("split", split, (0.1,)).for_model(model, 0.1)
    assert [g["params"] for g in made.param_groups] == [[model.weight], [model.bias]]


def with_momentum(momentum: float) -> Callable[..., torch.optim.Optimizer]:
    def build(parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum)

    return build


class Built:
    def __init__(self, momentum: float, held: Any = None) -> None:
        self.momentum, self.held = momentum, held

    def __call__(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=lr, momentum=self.momentum)


def method(momentum: float) -> Callable[..., torch.optim.Optimizer]:
    return Built(momentum).__call__


def part(momentum: float) -> Callable[..., torch.optim.Optimizer]:
    return partial(torch.optim.SGD, momentum=momentum)


@pytest.mark.parametrize("make", [with_momentum, Built, method, part])
def test_a_run_of_another_closure_or_object_is_not_taken_from_the_store(make: Any, tmp_path: Path) -> None:
    arguments: dict[str, Any] = SGD | {"store": tmp_path / "runs.sqlite"}
    losses = []
    for momentum, recalled in ((0.0, 0), (0.9, 0), (0.0, 1)):
        comparison = compare(small.plane, **(arguments | {"optimizers": [make(momentum)]}))
        assert comparison.recalled == recalled
        losses.append(comparison.runs[0].test_loss[-1])
    assert losses[0] == losses[2] != losses[1]


def test_what_cannot_be_written_down_is_made_again(tmp_path: Path) -> None:
    arguments: dict[str, Any] = SGD | {"store": tmp_path / "runs.sqlite"}
    thing = Built(0.0, held=iter([1]).__next__)  # a function within an iterator, in a list
    thing.held = [lambda: None]
    for _ in range(2):
        assert compare(small.plane, **(arguments | {"optimizers": [thing]})).recalled == 0


def test_functions_that_hold_each_other() -> None:
    def even(n: int) -> bool:
        return n == 0 or odd(n - 1)

    def odd(n: int) -> bool:
        return n > 0 and even(n - 1)

    assert source(even) != source(odd)
    assert re.fullmatch("[0-9a-f]{64}", source(even))


def test_workloads_that_differ_by_what_they_enclose_are_two(tmp_path: Path) -> None:
    def with_noise(scale: float) -> Callable[[int], Task]:
        def plane(seed: int) -> Task:
            task = small.plane(seed)
            batches = [batch if i == 0 else [part * scale for part in batch] for i, batch in enumerate(task.batches)]
            return replace(task, batches=batches)

        return plane

    arguments: dict[str, Any] = SGD | {"store": tmp_path / "runs.sqlite"}
    assert [compare(with_noise(scale), **arguments).recalled for scale in (1.0, 0.5, 1.0)] == [0, 0, 1]


def test_two_candidates_of_one_name_are_refused_where_they_differ() -> None:
    one = Candidate("X", optim.AdamW, (0.1,), {"weight_decay": 0.0})
    assert candidates([one, replace(one)]) == [one]
    for other in (replace(one, lrs=(0.1, 0.2)), replace(one, arguments={"weight_decay": 1.0})):
        with pytest.raises(ValueError, match="two optimizers are called 'X'"):
            candidates([one, other])


def test_seeds_that_change_nothing_are_no_evidence() -> None:
    def same(seed: int) -> Task:
        return small.plane(0)

    [result] = compare(same, ["AdamW", "torch:SGD"], lrs=[0.01, 0.1], seeds=3, extend=0).results
    assert [standing.p for standing in result.standings] == [None, None]
    assert any(line.startswith("Seeds change nothing in this workload") for line in result.remarks)


class Once:
    """Batches that end for good."""

    def __init__(self, batches: Any, lengths: list[int]) -> None:
        self._batches, self._lengths = list(batches), lengths

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._batches[: self._lengths.pop(0)] if self._lengths else [])


def test_epochs_of_another_length_are_said() -> None:
    def short(seed: int) -> Task:
        task = small.plane(seed)
        return replace(task, batches=Once(task.batches, [len(task.batches), 1]))

    run = attempt(Workload.of(short), candidates(["torch:SGD"])[0], 0.1, seed=0, epochs=3, warmup=0.0)
    count = len(small.plane(0).batches)
    assert (run.error or "").startswith(f"ValueError: batches gave 1 in epoch 2 and have length {count}; each time one")


def test_a_grid_stays_where_there_is_no_next_number() -> None:
    for grid, edge in (((1.0, 1e300), "largest"), ((1e-323, 1.0), "smallest")):
        assert extended(grid, edge) == grid


# --- reports that would be lost ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_value_that_is_not_finite_has_no_error(value: float, tmp_path: Path) -> None:
    assert [str(Mean.of([1.0, value]).error), str(Mean.of([value, value]).error)] == ["nan", "nan"]

    def wild(seed: int) -> Task:
        task = small.plane(seed)
        return replace(task, evaluate=lambda model: {**task.evaluate(model), "perplexity": value})

    comparison = compare(wild, **(SGD | {"seeds": 2}))
    assert [run.error for run in comparison.runs] == [None, None]
    assert "perplexity_mean" in (comparison.save(tmp_path)[2]).read_text(encoding="utf-8").splitlines()[0]


def test_values_that_only_some_seeds_have_are_left_out_of_means(tmp_path: Path) -> None:
    def odd(seed: int) -> Task:
        task = small.plane(seed)
        return replace(task, evaluate=lambda model: {**task.evaluate(model), f"of {seed}": 1.0})

    comparison = compare(odd, **(SGD | {"seeds": 2}))
    comparison.save(tmp_path)
    header = (tmp_path / "standings.csv").read_text(encoding="utf-8").splitlines()[0]
    assert "loss_mean" in header
    assert "of 0" not in header
    assert "final_of 0" in (tmp_path / "runs.csv").read_text(encoding="utf-8").splitlines()[0]


def test_an_evaluation_that_changes_its_values_is_a_failed_run() -> None:
    def forgetful(seed: int) -> Task:
        task, calls = small.plane(seed), []

        def evaluate(model: nn.Module) -> dict[str, Any]:
            calls.append(None)
            values = dict(task.evaluate(model))
            return values if len(calls) < 3 else values | {"late": 1.0}

        return replace(task, evaluate=evaluate)

    def lossless(seed: int) -> Task:
        task = small.plane(seed)
        if seed == 0:
            return task
        return replace(task, evaluate=lambda model: {k: v for k, v in task.evaluate(model).items() if k != "loss"})

    [run] = compare(forgetful, **SGD).runs
    assert re.match(r"ValueError: evaluate gave .*'late' after epoch 2 and .* before training", run.error or "")
    good, bad = compare(lossless, **(SGD | {"seeds": 2})).runs
    assert good.error is None
    assert (bad.error or "").startswith("ValueError: evaluate must give 'loss', got")


def test_a_program_that_exits_is_a_failed_run() -> None:
    def leaving(seed: int) -> Task:
        def loss(model: nn.Module, batch: Any) -> Tensor:
            raise SystemExit(0)

        return replace(small.plane(seed), loss=loss) if seed else small.plane(seed)

    good, bad = compare(leaving, **(SGD | {"seeds": 2})).runs
    assert (good.error, (bad.error or "")[:13]) == (None, "SystemExit: 0")
    with pytest.raises(ValueError, match=r"loss raised SystemExit: 0"):
        compare(lambda seed: leaving(1), **SGD)


@pytest.mark.parametrize("record", ["{}", "{bad", '{"optimizer": "A", "wings": 2}', "[]"])
def test_a_row_that_cannot_be_read_is_made_again(record: str, tmp_path: Path) -> None:
    path = tmp_path / "runs.sqlite"
    compare(small.plane, **SGD, store=path)
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE runs SET run = ?", (record,))
    for recalled in (0, 1):
        assert compare(small.plane, **SGD, store=path).recalled == recalled


def test_scores_beyond_the_square_root_of_the_largest_number() -> None:
    p = against_the_best([[1e200, 0.0], [1.1e200, 0.0], [1.2e200, 0.0]], grain=1e199)
    assert 0 <= p[1] <= 1


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": 5}, "Task: metric must be the name of a value, got int"),
        ({"epochs": True}, "Task: epochs must be an integer in [1, inf), got True"),
        ({"loss": lambda model, batch: model(batch[0]).mean() * 1j}, "loss must be a real number, got torch.complex64"),
    ],
)
def test_odd_tasks(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        check(Workload.of(changed(**changes)), seconds=0)


def test_a_loss_that_raises_later_is_said_by_the_check() -> None:
    def second(seed: int) -> Task:
        task, calls = small.plane(seed), []

        def loss(model: nn.Module, batch: Any) -> Tensor:
            calls.append(None)
            if len(calls) > 2:
                raise KeyError("second batch")
            return task.loss(model, batch)

        return replace(task, loss=loss)

    with pytest.raises(ValueError, match="second: loss raised KeyError: 'second batch'"):
        check(Workload.of(second), seconds=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lrs": 0.1}, "lrs must be several learning rates, got 0.1"),
        ({"lrs": ["a"]}, "lr must be a number in (0, inf), got 'a'"),
        ({"jobs": 1.5}, "compare: jobs must be an integer in [1, inf), got 1.5"),
        ({"jobs": "a"}, "compare: jobs must be an integer in [1, inf), got 'a'"),
        ({"warmup": "a"}, "compare: warmup must be in [0, 1), got 'a'"),
        ({"extend": None}, "compare: extend must be an integer in [0, inf), got None"),
        ({"epochs": True}, "compare: epochs must be an integer in [1, inf), got True"),
        ({"seeds": [True]}, "seeds must be a count in [1, 10000] or integers in [0, 2**63), got [True]"),
        ({"seeds": 10**11}, "seeds must be a count in [1, 10000] or integers in [0, 2**63), got 100000000000"),
        ({"seeds": [2**63]}, "seeds must be a count in [1, 10000] or integers in [0, 2**63), got [92233720"),
    ],
)
def test_arguments_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        compare(small.plane, **(SGD | arguments))


MODULE = """
from small_workloads import plane
from dataclasses import replace
import torch


def raises(seed):
    raise KeyError("missing")


def nothing(seed):
    return None


def leaves(seed):
    raise SystemExit


def slope(x, y):
    return {}[0]


def rateless(parameters, momentum=0.5):
    return torch.optim.SGD(parameters, lr=0.1, momentum=momentum)
"""


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("find-lr theirs:raises", "theirs:raises: the function raised KeyError: 'missing'"),
        ("find-lr theirs:nothing", "the function must return a schuss.lab.workload.Task, got NoneType"),
        ("tune theirs:raises", "theirs:raises: the function raised KeyError: 'missing'"),
        ("tune theirs:nothing", "the function must return a schuss.lab.workload.Task, got NoneType"),
        ("tune theirs:plane --optimizer theirs:rateless", "takes no lr; give it an argument of this name"),
        ("landscape theirs:raises --steps 3", "theirs:raises: the function raised KeyError: 'missing'"),
        ("landscape theirs:slope --steps 3", "no gradient at (-4.0, 4.0): 0"),
        ("workloads theirs:leaves", "the function raised SystemExit"),
        ("compare --workload quits:plane", "cannot import 'quits': SystemExit"),
        ("compare --seeds 99999999999", "seeds must be a count in [1, 10000]"),
        ("compare --seeds 9223372036854775808,", "integers in [0, 2**63)"),
        ("tune theirs:plane --out odd?folder", "'?' ends a URL"),
        ("tune theirs:plane --out foreign", "it is a database, but no study of Optuna's; tables: mine"),
        ("schedule cosine(10) --steps 99999999999999999999999", "--steps"),
    ],
)
def test_a_line_on_the_command_line(
    line: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "theirs.py").write_text(MODULE, encoding="utf-8")
    (tmp_path / "quits.py").write_text("import sys\nsys.exit(0)\n", encoding="utf-8")
    (tmp_path / "foreign").mkdir()
    with closing(sqlite3.connect(tmp_path / "foreign" / "tune.db")) as connection, connection:
        connection.execute("CREATE TABLE mine (x)")
    monkeypatch.delitem(__import__("sys").modules, "theirs", raising=False)
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    output = capsys.readouterr()
    assert ended.value.code == 2
    assert message in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_find_lr_gives_requires_grad_back_and_says_what_a_lazy_module_needs() -> None:
    task = small.plane(0)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.1)

    def freezing(model: nn.Module, batch: Any) -> Tensor:
        loss = task.loss(model, batch)
        for p in model.parameters():
            p.requires_grad_(False)
        return loss

    before = [p.requires_grad for p in task.model.parameters()]
    with pytest.raises(RuntimeError):
        find_lr(task.model, optimizer, list(task.batches), freezing, steps=10)
    assert [p.requires_grad for p in task.model.parameters()] == before
    lazy = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    with pytest.raises(ValueError, match="a lazy module has no weights yet; call the model on a batch first"):
        find_lr(lazy, torch.optim.SGD(lazy[1].parameters(), lr=0.1), list(task.batches), task.loss, steps=10)


def test_a_store_is_closed_when_it_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"no database at all, but long enough to be looked at")
    with pytest.raises(OSError, match=r"cannot use .* as a store of runs"):
        Store(tmp_path / "x")
