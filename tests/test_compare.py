"""Training runs, their ranking, and the report on them."""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from schuss import optim
from schuss.lab import report
from schuss.lab.candidate import DEFAULT_NAMES, candidates
from schuss.lab.compare import Run, compare, train
from schuss.lab.ranking import Mean, rank, remarks, table, tied
from schuss.lab.workload import Workload
from schuss.lab.workloads import find


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Test processes side by side already use every core, and so small a network gains nothing from a second one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def workload() -> Workload:
    return find("digits")


@pytest.fixture(scope="module")
def runs(workload: Workload) -> list[Run]:
    return list(compare(workload, candidates(["torch:SGD", "torch:AdamW"], [0.003, 0.03]), seeds=[0, 1], epochs=2))


def untimed(run: Run) -> Run:
    return replace(run, step_ms=0.0, train_step_ms=0.0)


def made(optimizer: str, lr: float, accuracy: float, *, seed: int = 0, loss: float = 0.5) -> Run:
    test = {"loss": (2.3, loss), "accuracy": (0.1, accuracy)}
    return Run(optimizer, lr, seed, (2.3, loss), test, step_ms=0.25, train_step_ms=1.5)


# --- training ---------------------------------------------------------------------------------------------------------


def test_same_seed_same_run_whatever_the_global_random_state(workload: Workload) -> None:
    [candidate] = candidates(["torch:AdamW"])
    torch.manual_seed(1)
    first = train(workload, candidate, 0.01, seed=3, epochs=1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = train(workload, candidate, 0.01, seed=3, epochs=1)
    assert untimed(first) == untimed(second)
    assert torch.equal(torch.get_rng_state(), state)


def test_training_is_the_textbook_loop(workload: Workload) -> None:
    [candidate] = candidates(["torch:SGD"])
    run = train(workload, candidate, 0.03, seed=5, epochs=2)
    task = workload(5)
    optimizer = torch.optim.SGD(task.model.parameters(), lr=0.03, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=2 * 23)
    for _ in range(2):
        for inputs, targets in task.batches:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(task.model(inputs), targets).backward()
            optimizer.step()
            schedule.step()
    assert {name: values[-1] for name, values in run.test.items()} == pytest.approx(task.scores(optimizer), rel=1e-5)
    assert (len(run.train_loss), len(run.test_loss)) == (2 * 23, 3)


def test_every_optimizer_starts_from_the_same_weights_and_batch(runs: list[Run]) -> None:
    assert len(runs) == 2 * 2 * 2
    for seed in (0, 1):
        starts = {(run.test_loss[0], run.test_accuracy[0], run.train_loss[0]) for run in runs if run.seed == seed}
        assert len(starts) == 1
    assert len({run.train_loss[0] for run in runs}) == 2


def test_torch_and_schuss_take_the_same_path(workload: Workload) -> None:
    ours, theirs = compare(workload, candidates(["AdamW", "torch:AdamW"], [0.003]), seeds=[2], epochs=1)
    assert ours.train_loss == pytest.approx(theirs.train_loss, rel=1e-3)
    assert ours.test_loss[-1] == pytest.approx(theirs.test_loss[-1], rel=1e-3)


def test_training_learns(runs: list[Run]) -> None:
    for run in runs:
        assert run.test_loss[-1] < run.test_loss[0]


def test_a_run_that_diverges_stops_and_says_so(workload: Workload) -> None:
    [candidate] = candidates(["torch:SGD"], [1e30])
    [run] = compare(workload, [candidate], epochs=2)
    assert run.diverged
    assert len(run.train_loss) < 23
    assert not math.isfinite(run.train_loss[-1])
    assert len(run.test_loss) == 1


@pytest.mark.parametrize("name", ["torch:LBFGS", "torch:Muon", "Muon"])
def test_an_optimizer_that_cannot_train_the_workload_is_refused_before_the_first_run(
    workload: Workload, name: str
) -> None:
    with pytest.raises(ValueError, match=rf"^{name} cannot train the digits workload: "):
        compare(workload, candidates([name]))


# --- candidates -------------------------------------------------------------------------------------------------------


def test_default_candidates_have_equal_budgets_and_names_of_their_own() -> None:
    defaults = candidates(DEFAULT_NAMES)
    assert [candidate.name for candidate in defaults] == list(DEFAULT_NAMES)
    assert {len(candidate.lrs) for candidate in defaults} == {3}
    for candidate in defaults:
        module = torch.optim if candidate.name.startswith("torch:") else optim
        assert candidate.build is getattr(module, candidate.name.removeprefix("torch:"))


def test_lrs_replace_the_grid_sorted_and_once_each() -> None:
    [candidate] = candidates(["torch:AdamW", "torch:AdamW"], [0.1, 0.01, 0.1])
    assert candidate.lrs == (0.01, 0.1)


def test_a_class_without_a_grid_of_its_own_is_tried_around_its_default() -> None:
    [candidate] = candidates(["torch:Adadelta"])
    assert candidate.lrs == (0.3, 1.0, 3.0)


def test_sgd_has_nesterov_momentum() -> None:
    [candidate] = candidates(["torch:SGD"])
    [group] = candidate.optimizer([torch.nn.Parameter(torch.zeros(1))], 0.1).param_groups
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.1, 0.9, True)


@pytest.mark.parametrize(
    ("names", "lrs", "message"),
    [
        (["torch:adamw"], None, "unknown optimizer 'torch:adamw': did you mean 'torch:AdamW'?"),
        (["Adopt"], None, "unknown optimizer 'Adopt': did you mean 'ADOPT'?"),
        (["torch:RAdm"], None, "unknown optimizer 'torch:RAdm': did you mean 'torch:RAdam'?"),
        (["Optimizer"], None, "unknown optimizer 'Optimizer': "),
        ([], None, "at least one optimizer is needed"),
        (["torch:SGD"], [], "at least one learning rate is needed"),
        (["torch:SGD"], [0.1, 0.0], "lr must be in (0, inf), got 0"),
        (["torch:SGD"], [math.nan], "lr must be in (0, inf), got nan"),
        (["torch:SGD"], [math.inf], "lr must be in (0, inf), got inf"),
    ],
)
def test_bad_candidates(names: list[str], lrs: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        candidates(names, lrs)


# --- ranking ----------------------------------------------------------------------------------------------------------


def test_mean_and_standard_error() -> None:
    mean = Mean.of([0.90, 0.92, 0.94])
    assert mean.value == pytest.approx(0.92)
    assert mean.error == pytest.approx(0.02 / math.sqrt(3))
    assert math.isnan(Mean.of([0.9]).error)


def test_ranked_by_accuracy_at_the_best_lr_then_by_loss() -> None:
    standings = rank(
        [
            made("A", 0.1, 0.95),
            made("A", 0.2, 0.80),
            made("B", 0.1, 0.90),
            made("B", 0.2, 0.97),
            made("C", 0.1, 0.95, loss=0.4),
            made("D", 0.1, 0.99, loss=math.nan),
        ]
    )
    assert [(s.rank, s.optimizer, s.best.lr) for s in standings] == [
        (1, "B", 0.2),
        (2, "C", 0.1),
        (3, "A", 0.1),
        (4, "D", 0.1),
    ]


def test_equal_means_are_equal_however_they_are_summed() -> None:
    thirds, tenths = [0.1 + 0.2, 0.9], [0.3, 0.9]
    assert Mean.of(thirds).value != Mean.of(tenths).value
    runs = [made("A", 0.1, value, seed=i, loss=0.5) for i, value in enumerate(thirds)]
    runs += [made("B", 0.1, value, seed=i, loss=0.4) for i, value in enumerate(tenths)]
    assert [standing.optimizer for standing in rank(runs)] == ["B", "A"]


def test_a_learning_rate_at_which_any_seed_diverged_is_not_the_best() -> None:
    runs = [made("A", 0.1, 0.6), made("A", 0.1, 0.6, seed=1), made("A", 0.2, 0.9)]
    runs.append(made("A", 0.2, 0.9, seed=1, loss=math.inf))
    [standing] = rank(runs)
    assert standing.best.lr == 0.1
    assert [trial.diverged for trial in standing.trials] == [0, 1]


@pytest.mark.parametrize(
    ("accuracies", "edge"),
    [([0.9, 0.8, 0.7], "smallest"), ([0.7, 0.9, 0.8], None), ([0.7, 0.8, 0.9], "largest"), ([0.9], None)],
)
def test_edge_of_the_grid(accuracies: list[float], edge: str | None) -> None:
    [standing] = rank([made("A", 0.1 * (i + 1), accuracy) for i, accuracy in enumerate(accuracies)])
    assert standing.edge == edge


def test_tied_within_two_standard_errors_of_the_difference() -> None:
    def seeds(optimizer: str, *accuracies: float) -> list[Run]:
        return [made(optimizer, 0.1, accuracy, seed=i) for i, accuracy in enumerate(accuracies)]

    # Both errors are 0.01, so two standard errors of a difference are 0.0283.
    standings = rank([*seeds("A", 0.94, 0.96), *seeds("B", 0.912, 0.932), *seeds("C", 0.911, 0.931)])
    assert [standing.optimizer for standing in tied(standings)] == ["B"]
    assert tied(rank([made("A", 0.1, 0.9), made("B", 0.1, 0.9)])) == []


def test_table_and_remarks() -> None:
    runs = [made("A", 0.1, 0.90), made("A", 0.1, 0.94, seed=1, loss=0.7), made("A", 0.2, 0.5), made("A", 0.2, 0.5)]
    runs += [made("B", 0.003, 0.9, loss=math.nan), made("B", 0.003, 0.9, seed=1)]
    standings = rank(runs)
    assert table(standings) == [
        ("1", "A", "0.1", "92.00 ± 2.00", "0.600 ± 0.100", "0.250", "1.50"),
        ("2", "B", "-", "diverged", "-", "0.250", "1.50"),
    ]
    assert remarks(standings) == [
        "Best lr at the edge of its grid, so a better one may lie beyond (see --lrs): A (0.1, smallest).",
        "Diverged: B at lr 0.003 (1 of 2 runs).",
    ]
    assert table(rank([made("A", 0.1, 0.9)])) == [("1", "A", "0.1", "90.00", "0.500", "0.250", "1.50")]


# --- report -----------------------------------------------------------------------------------------------------------


def figures(page: str) -> list[list[dict[str, object]]]:
    """The traces of each figure on the page."""
    starts = re.finditer(r'Plotly\.newPlot\(\s*"[0-9a-f-]{36}",\s*', page)
    return [json.JSONDecoder().raw_decode(page, match.end())[0] for match in starts]


class References(HTMLParser):
    """Collects what the page would load, and its text outside of scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str | None] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.loaded += [value for name, value in attrs if name in {"src", "href", "srcset", "data"}]

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.text.append(data)


def test_page_needs_nothing_from_outside_and_shows_every_optimizer(workload: Workload, runs: list[Run]) -> None:
    standings = rank(runs)
    page = report.to_html(standings, command="schuss compare --lrs '<1>'", workload=workload)
    references = References()
    references.feed(page)
    assert references.loaded == []
    assert "@import" not in page.split("</style>")[0]
    text = " ".join(references.text)
    for cell in (cell for row in table(standings) for cell in row):
        assert cell in text
    assert "schuss compare --lrs '<1>'" in text
    assert f"torch {torch.__version__}" in text

    accuracy, *others = figures(page)
    assert len(others) == 3
    for figure in (accuracy, *others):
        assert {trace["legendgroup"] for trace in figure} == {"torch:SGD", "torch:AdamW"}
    for standing in standings:
        [trace] = [trace for trace in accuracy if trace["name"] == standing.optimizer]
        first, second = (run.test_accuracy for run in standing.best.runs)
        assert trace["y"] == pytest.approx([50 * (a + b) for a, b in zip(first, second, strict=True)])


def test_sensitivity_shows_every_learning_rate_and_marks_divergence(workload: Workload) -> None:
    runs = [made("A", 0.1, 0.9, loss=0.3), made("A", 0.2, 0.8, loss=0.4), made("A", 0.3, 0.1, loss=math.inf)]
    *_, (finished, diverged) = figures(report.to_html(rank(runs), command="", workload=workload))
    assert (finished["x"], finished["y"]) == ([0.1, 0.2], [0.3, 0.4])
    assert diverged["x"] == [0.3]


def test_a_comparison_in_which_everything_diverged_still_has_a_report(workload: Workload) -> None:
    [run] = compare(workload, candidates(["torch:SGD"], [1e30]), epochs=1)
    page = report.to_html(rank([run]), command="", workload=workload)
    assert "Diverged: torch:SGD at lr 1e+30 (1 of 1 runs)." in page


def test_json_holds_the_records(workload: Workload, runs: list[Run]) -> None:
    document = json.loads(report.to_json(runs, command="schuss compare", workload=workload))
    assert document["command"] == "schuss compare"
    assert document["workload"] == "digits"
    assert document["versions"]["torch"] == torch.__version__
    for record, run in zip(document["runs"], runs, strict=True):
        assert record.pop("diverged") is False
        read = {key: tuple(value) if isinstance(value, list) else value for key, value in record.items()}
        test = {"loss": read.pop("test_loss"), "accuracy": read.pop("test_accuracy")}
        assert Run(**read, test=test) == run


def test_json_writes_null_for_numbers_that_are_not_finite(workload: Workload) -> None:
    run = made("A", 0.1, 0.9, loss=math.nan)
    [record] = json.loads(report.to_json([run], command="", workload=workload))["runs"]
    assert record["test_loss"] == [2.3, None]
    assert record["diverged"] is True
