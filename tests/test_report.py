"""The report of a comparison in a browser, its figures, and its curves for TensorBoard: of runs that nobody made."""

import json
import math
import re
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import small_workloads as small
from browser import look, need_chromium
from schuss.lab import report, tensorboard
from schuss.lab.candidate import Candidate
from schuss.lab.compare import Comparison
from schuss.lab.run import Run
from schuss.lab.workload import Workload

EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>$title"
LRS = (0.01, 0.03, 0.1)


def synthetic(
    workloads: dict[str, str],
    optimizers: list[str],
    *,
    seeds: int = 3,
    epochs: int = 8,
    batches: int = 60,
    only: int = 999,
) -> Comparison:
    """Runs of falling losses with noise; the first optimizer diverges at the largest rate. Of the first, accuracies."""
    comparison = Comparison(
        [Workload(name, about, small.plane) for name, about in workloads.items()],
        [Candidate(name, small.Seen, LRS) for name in optimizers],
        lrs=None, seeds=seeds, confirm=0, epochs=1, warmup=0.0, extend=2, threads=None,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    runs = comparison._runs
    for w, workload in enumerate(workloads):
        changed = {"epochs": epochs, "steps": epochs * batches, "batch_size": 64, "parameters": 6058}
        if w == 0:
            changed |= {"metric": "accuracy", "better": "higher", "target": 0.9}
        comparison.goals[workload] = replace(comparison.goals[workload], **changed)
        for k, optimizer in enumerate(optimizers):
            for j, lr in enumerate(LRS):
                for seed in range(seeds):
                    if len(runs) == only:
                        comparison.interrupted = True
                        return comparison
                    lost = k == 0 and j == 2
                    length = epochs * batches // (2 if lost else 1)
                    rate = (4 + k + w) * (1 - 0.3 * abs(j - 1)) / (epochs * batches)
                    train = 2.3 * np.exp(-rate * np.arange(length) + 0.2 * rng.standard_normal(length)) + 0.05
                    train[-1] = math.nan if lost else train[-1]
                    steps = range(0, length + (not lost), batches)
                    loss = 2.3 * np.exp(-rate * np.array(steps) + 0.05 * rng.standard_normal(len(steps))) + 0.08
                    judged = np.round(360 * np.clip(1 - 0.4 * loss, 0, 1)) / 360 if w == 0 else np.sqrt(loss)
                    test = {"loss": tuple(loss.tolist()), ("accuracy" if w == 0 else "error"): tuple(judged.tolist())}
                    seconds = tuple(1e-3 * (1 + k + 0.1 * seed) * step for step in steps)
                    runs[workload, optimizer, lr, seed] = Run(
                        optimizer, lr, seed, tuple(train.tolist()), test, 0.2, 1 + k, workload, tuple(steps), seconds
                    )
    return comparison


@pytest.fixture(scope="module")
def compared() -> Comparison:
    return synthetic({"digits": "Images of digits.", EVIL: EVIL}, ["AdamW", "torch:AdamW", EVIL])


def specification(page: str) -> list[dict[str, Any]]:
    found = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page)
    assert found is not None
    return json.loads(found[1])  # type: ignore[no-any-return]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_curves_are_means_and_ranges_of_the_numbers_beside(compared: Comparison, tmp_path: Path) -> None:
    compared.save(tmp_path)
    document = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    _, accuracy, rates, loss, *_ = specification((tmp_path / "compare.html").read_text(encoding="utf-8"))
    standings = {s["optimizer"]: s for s in document["workloads"][0]["standings"]}
    for figure, name, scale in ((accuracy, "test_accuracy", 100), (loss, "test_loss", 1)):
        assert len(figure["data"]) == 3
        for trace in figure["data"]:
            best = standings[trace["legendgroup"]]["best"]
            runs = [
                run for run in document["runs"]
                if (run["workload"], run["optimizer"], run["lr"]) == ("digits", trace["legendgroup"], best["lr"])
            ]  # fmt: skip
            columns = [[scale * value for value in column] for column in zip(*(run[name] for run in runs), strict=True)]
            assert len(runs) == 3
            assert trace["x"] == runs[0]["steps"]
            assert trace["y"] == pytest.approx([statistics.fmean(column) for column in columns], rel=1e-6)
            for (low, high), column in zip(trace["customdata"], columns, strict=True):
                assert (low, high) == (pytest.approx(min(column), rel=1e-6), pytest.approx(max(column), rel=1e-6))
            clocks = zip(*(run["seconds"] for run in runs), strict=True)
            assert trace["meta"]["seconds"] == pytest.approx([statistics.fmean(clock) for clock in clocks], rel=1e-6)
    finished, broken = rates["data"][:2]
    trials = standings[finished["legendgroup"]]["trials"]
    there = [trial for trial in trials if trial["finished"] == trial["runs"]]
    assert finished["x"] == [trial["lr"] for trial in there]
    for key, part, values in (("mean", "y", finished["y"]), ("standard_error", "error", finished["error_y"]["array"])):
        assert values == pytest.approx([100 * t["final"]["accuracy"][key] for t in there]), part
    lost = [trace for trace in rates["data"] if trace["meta"]["kind"] == "broken" and trace["x"]]
    assert [(trace["legendgroup"], trace["x"]) for trace in lost] == [("AdamW", [0.1])]
    assert lost[0]["customdata"] == ["diverged: 3 of 3 runs"]
    assert broken["yaxis"] == "y2"


def test_profiles_are_those_of_the_json(compared: Comparison) -> None:
    figure = specification(report.to_html(compared))[0]
    profiles = report.record(compared)["profiles"]
    for cost, profile in profiles.items():
        for trace in figure["data"]:
            ratios = profile["optimizers"][trace["legendgroup"]]["ratios"]
            x, y = trace["meta"][cost], trace["meta"][f"{cost}_y"]
            assert {ratio for ratio in ratios if math.isfinite(ratio)} <= set(x)
            assert y == pytest.approx([100 * sum(ratio <= tau for ratio in ratios) / len(ratios) for tau in x])


def test_long_curves_are_thinned_on_the_page_and_not_beside(tmp_path: Path) -> None:
    comparison = synthetic({"long": ""}, ["AdamW"], seeds=2, epochs=600, batches=10)
    comparison.save(tmp_path)
    document = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))
    assert len(document["runs"][0]["train_loss"]) == 6000
    assert len(document["runs"][0]["test_loss"]) == 601
    accuracy, _, loss, _, training = specification((tmp_path / "compare.html").read_text(encoding="utf-8"))
    for figure, last in ((accuracy, 6000), (loss, 6000), (training, 6000)):
        [trace] = figure["data"]
        assert 200 < len(trace["x"]) <= report.POINTS + report.EARLY
        assert trace["x"][-1] == last
        assert trace["x"] == sorted(set(trace["x"]))
    best = report.record(comparison)["workloads"][0]["standings"][0]["best"]["lr"]
    runs = [run for run in document["runs"] if run["lr"] == best]
    [trace] = loss["data"]
    for step, y in zip(trace["x"], trace["y"], strict=True):
        assert y == pytest.approx(statistics.fmean(run["test_loss"][step // 10] for run in runs), rel=1e-6)


def test_the_time_of_a_step_lies_between_those_of_evaluations() -> None:
    run = Run("A", 0.1, 0, (1.0,) * 9, {"loss": (1.0,) * 3}, 1.0, 1.0, "w", (0, 4, 8), (0.0, 2.0, 6.0))
    assert run.seconds_at(range(1, 10)) == pytest.approx([0.5, 1, 1.5, 2, 3, 4, 5, 6, 6.75])
    at_once = replace(run, train_loss=(math.inf,), test={"loss": (1.0,)}, steps=(0,), seconds=(0.0,), train_step_ms=2.0)
    assert at_once.seconds_at([1]) == [0.002]


def test_smoothing_leaves_a_constant_and_halves_a_step_within_its_window() -> None:
    assert report._smooth([2.0] * 50, 10) == pytest.approx([2.0] * 50)
    smoothed = report._smooth([0.0] * 100 + [1.0] * 7, 10)
    assert smoothed[-1] == pytest.approx(1 - 0.9**7, rel=1e-3)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_an_interrupted_comparison_says_what_there_is() -> None:
    names = ["a", "b", "c"]
    page = report.to_html(synthetic(dict.fromkeys(names, ""), ["SGD", "AdamW"], only=20))
    assert "Interrupted: 20 of 54 runs" in page
    assert "Optimizers on 3 workloads" in page
    assert "<span>c<small>no run yet</small></span>" in page
    assert re.findall(r'<a href="#(\w+)">', page) == ["all", "w0", "w1"]
    for target in ("all", "w0", "w1"):
        assert page.count(f'id="{target}"') == 1
    empty = report.to_html(synthetic({"a": ""}, ["SGD"], only=0))
    assert specification(empty) == []
    assert "Interrupted: 0 of 9 runs" in empty


def test_landscapes_in_the_folder_are_linked_to(tmp_path: Path) -> None:
    from schuss.lab.landscape import landscape

    landscape("quadratic", ["SGD"], lr=0.01, steps=2, size=11).save(tmp_path / "a b.html")
    (tmp_path / "other.html").write_text("<title>other</title>", encoding="utf-8")
    synthetic({"a": ""}, ["SGD"], seeds=1).save(tmp_path)
    page = (tmp_path / "compare.html").read_text(encoding="utf-8")
    assert '<a href="a%20b.html">landscape: Optimizers on quadratic</a>' in page
    assert "other.html" not in page
    for name in re.findall(r'<a href="([^#"]+)">', page):
        assert (tmp_path / name.replace("%20", " ")).exists()


SCRIPT = """
const all = [...doc.querySelectorAll(".plot")];
const found = {lazy: all.filter(plot => !plot.data).length};
win.dispatchEvent(new win.Event("beforeprint"));  // draws all: without a screen nothing is scrolled into view
await wait(100);
const [profile, accuracy, rates, loss] = all;
const lines = plot => plot.data.filter(t => t.meta.kind !== "band");
const seen = plot => plot.data.map(t => [t.meta.kind, t.meta.run, t.visible]);
const press = async button => { button.click(); await wait(40); return button.getAttribute("aria-pressed"); };
found.drawn = all.map(plot => plot.querySelectorAll(".trace").length);
found.lines = [accuracy, rates, loss].map(plot => lines(plot).map(t => [[...t.x], [...t.y]]));
found.bands = accuracy.data.filter(t => t.meta.kind === "band").map(t => [[...t.x], [...t.y]]);
found.types = [accuracy, loss].map(plot => [plot.layout.xaxis.type, plot.layout.yaxis.type]);
const tools = plot => [...plot.closest("figure").querySelectorAll("button")];
found.logx = await press(tools(accuracy)[0]);
found.logy = await press(tools(loss)[1]);
found.turned = [accuracy, loss].map(plot => [plot._fullLayout.xaxis.type, plot._fullLayout.yaxis.type]);
await press(tools(accuracy)[0]);
const [button, other] = doc.querySelectorAll(".legend button");
found.pressed = await press(button);
found.hidden = all.map(plot => [...new Set(plot.data.filter(t => t.visible === false).map(t => t.meta.run))]);
found.number = Number(button.dataset.run);
await press(button);
found.back = all.flatMap(plot => plot.data.filter(t => t.visible === false)).length;
other.dispatchEvent(new win.MouseEvent("click", {shiftKey: true, bubbles: true}));
await wait(40);
found.alone = [...new Set(accuracy.data.filter(t => t.visible).map(t => t.meta.run))];
found.aloneNumber = Number(other.dataset.run);
other.dispatchEvent(new win.MouseEvent("click", {shiftKey: true, bubbles: true}));
await wait(40);
found.spread = [await press(doc.getElementById("spread")), accuracy.data.filter(t => t.visible).map(t => t.meta.kind)];
const [steps, seconds] = doc.querySelectorAll("[data-x]");
found.clocks = [await press(seconds), steps.getAttribute("aria-pressed")];
found.seconds = lines(accuracy).map(t => [...t.x]);
found.title = [accuracy, profile, rates].map(plot => plot.layout.xaxis.title.text);
found.profile = profile.data.map(t => [[...t.x], [...t.y]]);
await press(steps);
found.again = lines(accuracy).map(t => [...t.x]);
const reached = [...doc.querySelectorAll("button:not([hidden]), a, .scroll")];
found.focus = reached.map(e => { e.focus(); return doc.activeElement === e; });
found.named = [...doc.querySelectorAll("button, .plot, .scroll, nav, [role=group]")].map(
  e => e.getAttribute("aria-label") || e.textContent.trim());
const ring = win.getComputedStyle(doc.activeElement);
found.stated = [...doc.querySelectorAll("button")].map(e => e.getAttribute("aria-pressed"));
found.width = [
  doc.documentElement.scrollWidth, doc.documentElement.clientWidth, win.innerWidth,
  ...all.map(p => p.getBoundingClientRect().right),
];
found.injected = [doc.querySelectorAll("img").length, doc.scripts.length];
found.heading = doc.querySelectorAll("h2")[2].textContent;
found.hover = await (async () => {
  all[1].scrollIntoView();
  win.Plotly.Fx.hover(accuracy, [{curveNumber: accuracy.data.length - 1, pointNumber: 2}]);
  await wait(100);
  return accuracy.querySelector(".hoverlayer").textContent;
})();
found.page = win.getComputedStyle(doc.body).backgroundColor;
found.ink = win.getComputedStyle(accuracy.querySelector(".xtick text")).fill;
found.requests = win.performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"));
return found;
"""


@pytest.mark.parametrize(("width", "theme"), [(1200, "light"), (375, "dark")])
def test_the_page_in_a_browser(compared: Comparison, tmp_path: Path, width: int, theme: str) -> None:
    """Curves, toggles, legend, keyboard, width, theme, foreign text; no error, nothing from the network."""
    need_chromium()
    compared.save(tmp_path, command=f"schuss compare {EVIL}")
    assert (tmp_path / "compare.html").stat().st_size < 6e6  # five of them are Plotly
    found = look(tmp_path / "compare.html", SCRIPT, width=width, theme=theme)
    figures = specification((tmp_path / "compare.html").read_text(encoding="utf-8"))
    _, accuracy, *_ = figures
    assert found["lazy"] > 3
    assert len(found["drawn"]) == len(figures) == 11
    assert min(found["drawn"]) >= 3
    for shown, figure in zip(found["lines"], figures[1:4], strict=True):
        assert shown == [[trace["x"], trace["y"]] for trace in figure["data"]]
    for (x, y), trace in zip(found["bands"], accuracy["data"], strict=True):
        assert x == [*trace["x"], *reversed(trace["x"])]
        assert y == [high for _, high in trace["customdata"]] + [low for low, _ in reversed(trace["customdata"])]
    assert found["types"] == [["linear", "linear"], ["linear", "log"]]
    assert (found["logx"], found["logy"]) == ("true", "false")
    assert found["turned"] == [["log", "linear"], ["linear", "linear"]]
    assert found["pressed"] == "false"
    assert found["hidden"] == [[found["number"]]] * 11
    assert found["back"] == 0
    assert found["alone"] == [found["aloneNumber"]]
    assert found["spread"] == ["false", ["curve"] * 3]
    assert found["clocks"] == ["true", "false"]
    assert found["seconds"] == [trace["meta"]["seconds"] for trace in accuracy["data"]]
    assert found["again"] == [trace["x"] for trace in accuracy["data"]]
    assert found["title"] == ["seconds of training", "seconds, as a multiple of the fastest", "learning rate"]
    assert found["profile"] == [[t["meta"]["seconds"], t["meta"]["seconds_y"]] for t in figures[0]["data"]]
    assert all(found["focus"])
    assert all(found["named"])
    assert set(found["stated"]) == {"true", "false"}
    scroll, client, inner, *right = found["width"]
    assert inner == width
    assert scroll == client  # nothing to the right of the page
    assert max(right) <= client
    assert found["injected"] == [0, 3]
    assert found["heading"] == EVIL
    assert "torch:AdamW, lr 0.03" in found["hover"]
    assert "seeds" in found["hover"]
    assert found["page"] == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 28)"}[theme]
    assert found["ink"] == {"light": "rgb(30, 36, 48)", "dark": "rgb(228, 232, 238)"}[theme]
    assert found["requests"] == []


# --- TensorBoard ------------------------------------------------------------------------------------------------------


def test_tensorboard_shows_every_run(compared: Comparison, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    folder = tensorboard.write(compared, tmp_path / "log")
    tensorboard.write(compared, folder)  # again: once, not twice
    files = sorted(folder.rglob("events.*"))
    assert len(files) == len(compared.runs) == 54
    for file in files:
        assert file.resolve().is_relative_to(folder.resolve())
    for run in [run for run in compared.runs if run.workload == "digits" and run.seed == 1]:
        name = {"torch:AdamW": "torch_AdamW", "AdamW": "AdamW"}.get(run.optimizer)
        if name is None:
            continue
        events = EventAccumulator(str(folder / "digits" / name / f"{run.lr:g}" / "seed_1"), {"scalars": 0})
        events.Reload()
        assert sorted(events.Tags()["scalars"]) == ["test/accuracy", "test/loss", "train/loss"]
        shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
        assert [step for step, _ in shown] == [*range(1, 1 + len(run.train_loss))]
        np.testing.assert_array_equal([value for _, value in shown], np.float32(run.train_loss))
        accuracy = events.Scalars("test/accuracy")
        assert [event.step for event in accuracy] == [*run.steps]
        np.testing.assert_array_equal([event.value for event in accuracy], np.float32(run.test["accuracy"]))
        clock = [event.wall_time - accuracy[0].wall_time for event in accuracy]
        assert clock == pytest.approx(run.seconds, abs=1e-5)
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        assert settings["lr"].number_value == run.lr
        assert settings["optimizer"].string_value == run.optimizer


def test_folders_of_runs_that_are_gone_are_gone(tmp_path: Path) -> None:
    tensorboard.write(synthetic({"a": ""}, ["SGD", "AdamW"], seeds=1, epochs=1, batches=2), tmp_path)
    (tmp_path / "a" / "SGD" / "mine.txt").write_text("kept")
    tensorboard.write(synthetic({"a": ""}, ["Adam"], seeds=1, epochs=1, batches=2), tmp_path)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["Adam", "SGD"]
    assert [path.name for path in (tmp_path / "a" / "SGD").iterdir()] == ["mine.txt"]


def test_names_become_folders_of_their_own() -> None:
    names = ["../../etc", "a:b", "a/b", "A_B", "..", "", "x" * 300, "é"]
    found = tensorboard._folders(names)
    assert list(found) == names
    assert len({folder.lower() for folder in found.values()}) == len(names)
    for folder in found.values():
        assert re.fullmatch(r"[\w+=-][\w.+=-]*", folder)
        assert len(folder) < 90


def test_saving_with_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = synthetic({"a": ""}, ["SGD"], seeds=1, epochs=1, batches=2)
    *_, folder = comparison.save(tmp_path, tensorboard=True)
    assert folder == tmp_path / "tensorboard"
    assert len(list(folder.rglob("events.*"))) == 3
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ModuleNotFoundError, match=r'need TensorBoard: pip install "schuss\[lab\]"'):
        comparison.save(tmp_path, tensorboard=True)


def test_the_command_writes_curves_and_says_how_to_see_them(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from schuss.cli import app

    arguments = ["compare", "--optimizers", "torch:SGD", "--lrs", "0.01", "--epochs", "1", "--seeds", "1"]
    result = CliRunner().invoke(app, [*arguments, "--tensorboard", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert f"Curves: tensorboard --logdir {tmp_path / 'tensorboard'}\n" in result.stdout
    assert len(list((tmp_path / "tensorboard" / "digits" / "torch_SGD" / "0.01" / "seed_0").iterdir())) == 1
