"""The workloads of the lab: what they are made of, what a seed fixes, and what is said of one that is none."""

import copy
import math
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from schuss import optim
from schuss.cli import app, main
from schuss.lab.candidate import candidates
from schuss.lab.check import HEADER, check
from schuss.lab.compare import train
from schuss.lab.workload import Task, Workload
from schuss.lab.workloads import WORKLOADS, embeddings, find, images, parts, quadratics, tabular, text

every_workload = pytest.mark.parametrize("workload", WORKLOADS.values(), ids=WORKLOADS)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Test processes side by side already use every core."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def steps(task: Task, count: int, lr: float = 0.01) -> list[float]:
    """The losses of so many steps."""
    sparse = any(getattr(module, "sparse", False) for module in task.model.modules())
    optimizer = (torch.optim.SparseAdam if sparse else torch.optim.Adam)(task.model.parameters(), lr=lr)
    losses = []
    while len(losses) < count:
        for batch in islice(task.batches, count - len(losses)):
            optimizer.zero_grad()
            loss = task.loss(task.model, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses


def scores(task: Task) -> dict[str, float]:
    return task.scores(torch.optim.SGD(task.model.parameters(), lr=0.0))


# --- every workload ---------------------------------------------------------------------------------------------------


@every_workload
def test_a_seed_fixes_every_bit_whatever_ran_before(workload: Workload) -> None:
    """First weights, order and noise, and the weights after some steps and the start of an epoch."""
    torch.manual_seed(1)
    first = workload(3)
    weights = [p.detach().clone() for p in first.model.parameters()]
    losses = steps(first, 3)
    find("digits")(0)
    torch.randn(7)
    second = workload(3)
    assert all(map(torch.equal, weights, second.model.parameters()))
    assert steps(second, 3) == losses
    assert all(map(torch.equal, first.model.parameters(), second.model.parameters()))
    assert scores(first) == scores(second)


@every_workload
def test_torchs_global_generator_is_neither_used_nor_moved(workload: Workload) -> None:
    before = torch.get_rng_state()
    steps(workload(0), 1)
    assert torch.equal(torch.get_rng_state(), before)


@every_workload
def test_another_seed_is_another_run(workload: Workload) -> None:
    assert steps(workload(0), 2) != steps(workload(1), 2)


@every_workload
def test_it_learns_in_a_few_steps(workload: Workload) -> None:
    task = workload(0)
    before = scores(task)["loss"]
    steps(task, 25)
    assert scores(task)["loss"] < before


@every_workload
def test_the_check_passes_and_the_target_is_not_there_at_the_start(workload: Workload) -> None:
    facts = check(workload, seconds=0)
    task = facts.task
    assert len(facts.cells()) == len(HEADER)
    assert not task.reached(facts.scores[task.metric])
    assert task.steps == task.epochs * sum(1 for _ in task.batches) == task.epochs * len(task.batches)
    assert workload.description.endswith(".")
    assert len(workload.description) < 80


TUNED = {
    "digits": ("torch:SGD", 0.1),
    "autoencoder": ("torch:AdamW", 0.01),
    "breast_cancer": ("torch:SGD", 0.01),
    "diabetes": ("torch:AdamW", 0.001),
    "zipf_dense": ("torch:AdamW", 0.03),
    "zipf_sparse": ("torch:SparseAdam", 0.03),
    "factorisation": ("torch:AdamW", 0.03),
    "quadratic_deep": ("torch:SGD", 0.01),
    "noisy_quadratic": ("torch:AdamW", 0.01),
}
"""From which optimizer and learning rate a target is; of workloads short enough to run whole."""


@pytest.mark.parametrize("name", TUNED)
def test_the_target_is_reached(name: str) -> None:
    optimizer, lr = TUNED[name]
    run = train(find(name), candidates([optimizer], [lr])[0], lr, seed=1)
    task = find(name)(1)
    assert task.reached(run.test[task.metric][-1])


@pytest.mark.parametrize(
    ("name", "lr", "epochs", "loss"),
    [("digits_vit", 0.01, 2, 1.915), ("char_gpt", 0.003, 1, 2.842), ("char_lstm", 0.03, 1, 2.126)],
)
def test_the_start_of_longer_runs_is_as_recorded(name: str, lr: float, epochs: int, loss: float) -> None:
    """As far as other versions of torch and of Python's text let it be."""
    run = train(find(name), candidates(["torch:AdamW"], [lr])[0], lr, seed=1, epochs=epochs)
    assert run.test_loss[-1] == pytest.approx(loss, rel=0.05)


# --- data and models --------------------------------------------------------------------------------------------------


def test_digits_are_split_by_class_and_standardised_with_the_training_set() -> None:
    (train_x, train_y), (test_x, test_y) = images.data()
    assert train_x.shape == (1437, 1, 8, 8)
    assert test_x.shape == (360, 1, 8, 8)
    assert train_x.mean().item() == pytest.approx(0, abs=1e-6)
    assert train_x.std(correction=0).item() == pytest.approx(1, abs=1e-6)
    share = torch.bincount(test_y) / torch.bincount(torch.cat([train_y, test_y]))
    assert torch.allclose(share, torch.tensor(0.2), atol=0.005)


@pytest.mark.parametrize(("name", "shape"), [("breast_cancer", (455, 30)), ("diabetes", (353, 10))])
def test_tables_are_standardised_with_the_training_set(name: str, shape: tuple[int, int]) -> None:
    (x, y), (test_x, test_y) = tabular.data(name)
    assert x.shape == shape
    assert len(test_x) == len(test_y) == len(x) // 4 + 1
    torch.testing.assert_close(x.mean(dim=0), torch.zeros(shape[1]), rtol=0, atol=1e-6)
    torch.testing.assert_close(x.std(dim=0, correction=0), torch.ones(shape[1]), rtol=1e-5, atol=0)
    if y.is_floating_point():
        assert y.shape == (len(x), 1)
        assert y.std(correction=0).item() == pytest.approx(1, rel=1e-5)


def test_an_epoch_visits_every_row_once_in_another_order() -> None:
    rows = parts.Shuffled((torch.arange(1437),), 64, parts.seeded(0))
    first, second = ([batch for (batch,) in rows] for _ in range(2))
    assert [len(batch) for batch in first] == [64] * 22 + [29]
    assert torch.cat(first).sort().values.tolist() == list(range(1437))
    assert torch.cat(first).tolist() != torch.cat(second).tolist()
    assert len(rows) == 23
    assert [len(batch) for (batch,) in parts.Shuffled((torch.arange(9),), 4, parts.seeded(0), drop_last=True)] == [4, 4]


def _layers() -> nn.Module:
    return nn.ModuleList(
        [nn.Conv2d(2, 3, 3), nn.Linear(4, 5), nn.Linear(5, 2, bias=False), nn.LayerNorm(3), nn.LSTM(3, 4),
         nn.Embedding(5, 3), nn.EmbeddingBag(4, 2)]
    )  # fmt: skip


def test_models_begin_as_torch_begins_them() -> None:
    """To the bit what torch's own generator gives from the same seed."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        theirs = _layers()
    ours = parts.initialised(_layers, parts.seeded(5))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    with pytest.raises(TypeError, match="no rule for the parameters of a BatchNorm1d"):
        parts.initialised(lambda: nn.BatchNorm1d(3), parts.seeded(0))


def test_the_gpt_does_not_see_what_it_predicts() -> None:
    """Logits at a position stay as they are when later characters change; those of the vision transformer do not."""
    task = find("char_gpt")(0)
    x = next(iter(task.batches))[:1, :-1]
    other = x.clone()
    other[0, 40:] = (other[0, 40:] + 1) % 50
    before, after = task.model(x), task.model(other)
    torch.testing.assert_close(before[0, :40], after[0, :40])
    assert not torch.allclose(before[0, 40:], after[0, 40:])


def test_a_block_is_that_of_torch() -> None:
    block = parts.Block(8, 2, causal=False)
    theirs = nn.TransformerEncoderLayer(
        8, 2, 32, dropout=0, activation="gelu", batch_first=True, norm_first=True
    ).eval()  # fmt: skip
    ours = dict(block.named_parameters())
    names = {"self_attn.in_proj_": "qkv.", "self_attn.out_proj.": "out.", "linear1.": "mlp.1.", "linear2.": "mlp.3.",
             "norm1.": "attention_norm.", "norm2.": "mlp.0."}  # fmt: skip
    state = {}
    for name in theirs.state_dict():
        prefix = next(prefix for prefix in names if name.startswith(prefix))
        state[name] = ours[name.replace(prefix, names[prefix])].detach()
    theirs.load_state_dict(state)
    x = torch.randn(3, 5, 8, generator=parts.seeded(0))
    torch.testing.assert_close(block(x), theirs(x), rtol=1e-5, atol=1e-6)


def test_text_is_split_before_windows_are_cut() -> None:
    train, test, characters = text.data()
    assert train.dtype == torch.int64
    assert test.shape == (64, text.LENGTH + 1)
    assert 90 < characters < 200
    assert int(train.max()) < characters
    # The entropy of characters alone: what a model that has learnt nothing but their frequencies gets.
    share = torch.bincount(train).double() / len(train)
    entropy = -(share[share > 0] * share[share > 0].log()).sum().item()
    assert 3.0 < entropy < 3.5
    assert find("char_gpt")(0).target < entropy - 0.5
    assert find("char_lstm")(0).target < entropy - 0.5


def test_frequencies_follow_zipfs_law() -> None:
    expected = np.array([1 / rank for rank in range(1, 2001)])
    expected /= expected.sum()
    np.testing.assert_allclose(embeddings.zipf().numpy(), expected, rtol=1e-12)
    drawn = embeddings.bags(10_000, parts.seeded(5))[0].flatten()
    counts = np.bincount(drawn.numpy(), minlength=2000)
    deviation = (counts - len(drawn) * expected) / np.sqrt(len(drawn) * expected)
    # Pearson's: χ² of 1999 degrees has standard deviation √(2 · 1999).
    assert abs((deviation**2).sum() - 1999) < 4 * math.sqrt(2 * 1999)


def test_sparse_gradients_are_the_dense_ones() -> None:
    dense, sparse = find("zipf_dense")(0), find("zipf_sparse")(0)
    for task in (dense, sparse):
        task.loss(task.model, next(iter(task.batches))).backward()
    for p, q in zip(dense.model.parameters(), sparse.model.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert q.grad.is_sparse
        assert not p.grad.is_sparse
        torch.testing.assert_close(q.grad.to_dense(), p.grad)


def test_the_matrix_has_its_rank_and_its_noise() -> None:
    (x, y), (test_x, _) = embeddings.entries()
    assert (len(x), len(test_x)) == (7200, 1800)
    assert len({tuple(pair) for pair in torch.cat([x, test_x]).tolist()}) == 9000
    assert y.std().item() == pytest.approx(math.sqrt(1 + embeddings.NOISE**2), rel=0.05)
    # Least squares of rows and columns in turn: with the right rank what is left is about the noise.
    rows, columns = torch.randn(200, 5, generator=parts.seeded(1)), torch.randn(150, 5, generator=parts.seeded(2))
    for _ in range(20):
        for mine, others, side in ((rows, columns, 0), (columns, rows, 1)):
            for i in range(len(mine)):
                known = x[:, side] == i
                a = others[x[known, 1 - side]]
                mine[i] = torch.linalg.solve(a.T @ a + 1e-4 * torch.eye(5), a.T @ y[known])
    left = ((rows[x[:, 0]] * columns[x[:, 1]]).sum(dim=1) - y).square().mean().item()
    assert left == pytest.approx(embeddings.NOISE**2 * (1 - 5 * 350 / 7200), rel=0.1)


# --- quadratics -------------------------------------------------------------------------------------------------------


def test_quadratic_deep_has_deepobss_spectrum_and_directions() -> None:
    hessian = quadratics.deep_hessian().double()
    random = np.random.RandomState(42)
    drawn = np.concatenate([random.uniform(0, 1, 90), random.uniform(30, 60, 10)])
    found = np.linalg.eigvalsh(hessian.numpy())
    np.testing.assert_allclose(found, np.sort(drawn), rtol=0, atol=5e-6)
    assert (found < 1).sum() == 90
    assert (found > 30).sum() == 10
    # Entries of the matrix that DeepOBS's own code makes, of which the directions are, too.
    theirs = {(0, 0): 6.221429443252536, (0, 1): 1.1270198982225974, (57, 3): -0.12367968379370259,
              (99, 99): 6.305663773355068}  # fmt: skip
    for index, value in theirs.items():
        assert hessian[index].item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("n", [2, 3, 8])
def test_rotations_are_rotations(n: int) -> None:
    turn = quadratics.rotation(n, np.random.RandomState(0))
    np.testing.assert_allclose(turn @ turn.T, np.eye(n), atol=1e-12)
    # In odd dimensions DeepOBS's sign gives a reflection; the Hessian is the same.
    assert abs(np.linalg.det(turn)) == pytest.approx(1)


def test_quadratic_deep_has_deepobss_noise_start_and_loss() -> None:
    task = find("quadratic_deep")(0)
    assert (len(task.batches), task.batch_size, task.steps) == (7, 128, 700)
    train, _ = quadratics.deep_data()
    assert train.shape == (1000, 100)
    assert train.std().item() == pytest.approx(0.6, rel=0.01)
    hessian = quadratics.deep_hessian().double().numpy()
    away = 1 - np.float32(np.random.RandomState(43).normal(0, 0.6, (1000, 100)))[:896].astype(float)
    expected = 0.5 * np.einsum("ni,ij,nj->n", away, hessian, away).mean()
    assert expected == pytest.approx(353.44677)
    assert scores(task)["loss"] == pytest.approx(expected, rel=1e-5)
    (batch,) = next(iter(task.batches))
    task.loss(task.model, (batch,)).backward()
    [theta] = task.model.parameters()
    assert theta.grad is not None
    np.testing.assert_allclose(theta.grad.numpy(), hessian @ (1 - batch.double().mean(dim=0).numpy()), rtol=1e-3)


def test_the_noisy_quadratics_variance_follows_its_closed_form() -> None:
    """E θ² of plain SGD: (1-αh)^2t + (1 - (1-αh)^2t) α c / (B h (2 - αh)), with c = h and θ of variance 1 at first."""
    lr, count, batch_size = 0.5, 40, 32
    h = 1 / np.arange(1, 1001)
    decay = (1 - lr * h) ** (2 * count)
    expected = decay + (1 - decay) * lr / (batch_size * (2 - lr * h))
    squares, runs = np.zeros(1000), 80
    for seed in range(runs):
        task = find("noisy_quadratic")(seed)
        optimizer = torch.optim.SGD(task.model.parameters(), lr=lr)
        for batch in islice(task.batches, count):
            optimizer.zero_grad()
            task.loss(task.model, batch).backward()
            optimizer.step()
        squares += task.model().detach().double().numpy() ** 2 / runs
    # A mean of `runs` squares of a normal variable has a relative error of √(2 / runs); bands of 50 average it.
    for start in (0, 1, 2, 5, 20, 100, 500):
        band = slice(start, start + max(1, start))
        ratio = (squares[band] / expected[band]).mean()
        assert abs(ratio - 1) < 4 * math.sqrt(2 / (runs * max(1, start))), start
    assert (task.batch_size, len(task.batches)) == (batch_size, 100)


def test_the_noisy_quadratic_evaluates_its_risk() -> None:
    task = find("noisy_quadratic")(4)
    theta = task.model().detach().double().numpy()
    assert scores(task)["loss"] == pytest.approx(0.5 * (theta**2 / np.arange(1, 1001)).sum(), rel=1e-5)


# --- tasks of others --------------------------------------------------------------------------------------------------


def task(**changes: Any) -> Task:
    """A line through noise, with changes."""
    generator = parts.seeded(0)
    x = torch.randn(8, 2, generator=generator)
    fields: dict[str, Any] = {
        "model": parts.initialised(lambda: nn.Linear(2, 1), generator),
        "batches": [x[:4], x[4:]],
        "loss": lambda model, batch: model(batch).square().mean(),
        "evaluate": lambda model: {"loss": model(x).square().mean()},
        "metric": "loss",
        "target": 0.1,
        "epochs": 2,
        "batch_size": 4,
    }
    return Task(**(fields | changes))


def failing(*_: Any) -> Any:
    raise RuntimeError("no such\nfile")


class Lucky:
    """Another one each time."""

    generator = parts.seeded(0)

    def __call__(self, seed: int) -> Task:
        return task(model=parts.initialised(lambda: nn.Linear(2, 1), self.generator))


class Once:
    """Batches that are used up: each time one goes through them is not an epoch."""

    def __init__(self) -> None:
        self.rest = iter([torch.ones(4, 2)])

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self.rest


def frozen() -> nn.Module:
    return parts.initialised(lambda: nn.Linear(2, 1), parts.seeded(0)).requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (failing, "mine: the function raised RuntimeError: no such file"),
        (lambda seed: None, "mine: the function must return a schuss.lab.workload.Task, got NoneType"),
        (lambda: task(), "mine: the function raised TypeError: "),
        (lambda seed: task(model=nn.ReLU()), "ValueError: Task: the model has no parameters that require a gradient"),
        (lambda seed: task(model=frozen()), "ValueError: Task: the model has no parameters that require a gradient"),
        (lambda seed: task(model=torch.relu), "TypeError: Task: model must be a torch.nn.Module, got builtin_function"),
        (lambda seed: task(batches=[]), "ValueError: Task: there is no batch"),
        (lambda seed: task(batches=iter([1])), "TypeError: Task: batches must have a length"),
        (lambda seed: task(batches=parts.Drawn(3, failing)), "mine: batches raised RuntimeError: no such file"),
        (lambda seed: task(batches=Once()), "mine: batches gave none; each time one goes through them must be a whole"),
        (lambda seed: task(loss=0), "TypeError: Task: loss must be a function, got int"),
        (lambda seed: task(epochs=0), "ValueError: Task: epochs must be an integer in [1, inf), got 0"),
        (lambda seed: task(target=math.nan), "ValueError: Task: target must be finite, got nan"),
        (lambda seed: task(better="more"), "ValueError: Task: better must be 'lower' or 'higher', got 'more'"),
        (lambda seed: task(loss=failing), "mine: loss raised RuntimeError: no such file"),
        (lambda seed: task(loss=lambda m, b: 0.5), "mine: loss must return a tensor, got float"),
        (lambda seed: task(loss=lambda m, b: m(b)), "mine: loss must be one number, got shape (4, 1); take its mean"),
        (lambda seed: task(loss=lambda m, b: m(b).mean() * math.nan), "mine: the loss of the first batch is nan"),
        (lambda seed: task(loss=lambda m, b: m(b).mean().detach()), "mine: the loss has no gradient; "),
        (
            lambda seed: task(loss=lambda m, b: torch.zeros((), requires_grad=True) * 1),
            "mine: the loss depends on no parameter of the model; ",
        ),
        (
            lambda seed: task(loss=lambda m, b: (0 * m(b)).abs().sqrt().sum()),
            "mine: a gradient of the first batch is not finite",
        ),
        (lambda seed: task(evaluate=failing), "mine: evaluate raised RuntimeError: no such file"),
        (lambda seed: task(evaluate=lambda m: 0.3), "mine: evaluate raised AttributeError: "),
        (lambda seed: task(evaluate=lambda m: {"mse": 1.0}), "mine: evaluate must give 'loss', got 'mse'"),
        (lambda seed: task(metric="accuracy"), "mine: evaluate must give 'accuracy', got 'loss'"),
        (lambda seed: task(evaluate=lambda m: {"loss": math.inf}), "mine: 'loss' of evaluate is inf before training"),
        (Lucky(), "mine: the first loss of seed 0 is "),
    ],
)
def test_what_is_no_workload_is_said_in_a_line(make: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        check(Workload("mine", "Mine.", make))
    assert "\n" not in str(raised.value)
    assert str(raised.value).startswith("mine: ")


def test_a_check_moves_nothing() -> None:
    mine = task()
    before = copy.deepcopy(mine.model.state_dict())
    facts = check(Workload.of(lambda seed: replace(mine)))
    assert facts.step_s > 0
    for name, value in facts.task.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_dropout_passes_the_check_but_weights_from_the_global_generator_do_not() -> None:
    def dropping(seed: int) -> Task:
        model = nn.Sequential(nn.Dropout(0.5), parts.initialised(lambda: nn.Linear(2, 1), parts.seeded(seed)))
        return task(model=model)

    before = torch.get_rng_state()
    check(Workload.of(dropping))
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match="the first loss of seed 0 is"):
        check(Workload("mine", "", lambda seed: task(model=nn.Linear(2, 1))))


def test_a_target_is_reached_from_its_better_side() -> None:
    assert task(target=0.1).reached(0.1)
    assert not task(target=0.1).reached(0.11)
    assert not task(target=0.1).reached(math.nan)
    higher = task(target=0.1, better="higher")
    assert higher.reached(0.1)
    assert not higher.reached(0.09)


def test_scores_are_those_of_the_weights_that_an_optimizer_would_have_evaluated() -> None:
    mine = task()
    optimizer = optim.ScheduleFreeSGD(mine.model.parameters(), lr=0.1)
    steps_before = [p.detach().clone() for p in mine.model.parameters()]
    assert mine.scores(optimizer) == pytest.approx(scores(mine))
    for batch in mine.batches:
        optimizer.zero_grad()
        mine.loss(mine.model, batch).backward()
        optimizer.step()
    trained = [p.detach().clone() for p in mine.model.parameters()]
    assert not torch.equal(trained[0], steps_before[0])
    found = mine.scores(optimizer)
    assert all(map(torch.equal, trained, mine.model.parameters()))
    assert mine.model.training
    optimizer.eval()
    assert found == scores(mine)


# --- names and the command --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digit", "unknown workload 'digit': did you mean 'digits'?"),
        ("zipf_spars", "unknown workload 'zipf_spars': did you mean 'zipf_sparse'?"),
        ("no_such_module:line", "cannot import 'no_such_module': ModuleNotFoundError: "),
        ("mine_broken:line", "cannot import 'mine_broken': ZeroDivisionError: division by zero"),
        ("mine_here:lime", "module 'mine_here' has no 'lime': did you mean 'line'?"),
        ("mine_here:number", "mine_here:number must be a function of a seed, got int"),
    ],
)
def test_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str) -> None:
    (tmp_path / "mine_here.py").write_text("number = 3\ndef line(seed):\n    '''A line.'''\n")
    (tmp_path / "mine_broken.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        find(name)


def test_the_command_shows_every_workload() -> None:
    result = CliRunner().invoke(app, ["workloads"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.stdout.splitlines()[2:]}
    assert list(lines) == list(WORKLOADS)
    for name, workload in WORKLOADS.items():
        made = workload(0)
        assert workload.description in lines[name]
        assert f" {made.parameters:,} " in lines[name]
        assert f" {made.steps:,} " in lines[name]
        assert f" {made.target:g} " in lines[name]


def docs_example() -> str:
    page = Path(__file__).resolve().parent.parent / "docs" / "workloads.md"
    return re.search(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)[1]  # type: ignore[index]


def test_the_command_checks_the_example_of_the_documentation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the folder where it is called, as users do."""
    (tmp_path / "my_module.py").write_text(docs_example())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    result = CliRunner().invoke(app, ["workloads", "my_module:spirals"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "my_module:spirals" in result.stdout
    assert "Two spirals: three linear layers." in result.stdout
    assert "Checked with seed 0: 30 epochs of 16 batches of 64. Before training: loss " in result.stdout


@pytest.mark.parametrize(
    ("argument", "message"),
    [("digit", "did you mean 'digits'?"), ("no_such_module:line", "cannot import 'no_such_module'")],
)
def test_a_mistake_is_one_line_and_exit_code_2(capsys: pytest.CaptureFixture[str], argument: str, message: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["workloads", argument])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("schuss: ")
    assert message in output.err
    assert output.err.count("\n") == 1
