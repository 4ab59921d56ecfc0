"""The command `schuss compare`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from schuss import __version__
from schuss.cli import app, main

SMALL = ["compare", "--optimizers", "torch:SGD,torch:AdamW", "--lrs", "0.01", "--epochs", "1"]


def test_prints_the_ranking_and_writes_page_and_numbers(tmp_path: Path) -> None:
    out = tmp_path / "new" / "folder"
    result = CliRunner().invoke(app, [*SMALL, "--seeds", "0,7", "--out", str(out)])
    assert result.exit_code == 0, result.output
    document = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    command = "schuss compare --optimizers torch:SGD,torch:AdamW --lrs 0.01 --epochs 1 --seeds 0,7 --threads 1"
    assert document["command"] == command
    assert document["versions"]["threads"] == "1"
    assert command in (out / "compare.html").read_text(encoding="utf-8")
    final: dict[str, float] = {}
    for run in document["runs"]:
        assert (run["lr"], len(run["test_loss"])) == (0.01, 2)
        final[run["optimizer"]] = final.get(run["optimizer"], 0) + 50 * run["test_accuracy"][-1]
    assert [run["seed"] for run in document["runs"]] == [0, 7, 0, 7]
    rows = [line.split() for line in result.stdout.splitlines() if line[:2] in ("1 ", "2 ")]
    ranked = sorted(final, key=lambda name: -final[name])
    assert [row[:4] for row in rows] == [[str(i + 1), n, "0.01", f"{final[n]:.2f}"] for i, n in enumerate(ranked)]
    assert f"Report: {out / 'compare.html'}" in result.stdout
    names = {"compare.html", "compare.json", "standings.csv", "runs.csv", "curves.csv", "runs.sqlite"}
    assert {file.name for file in out.iterdir()} == names


def test_called_again_it_takes_what_is_there(tmp_path: Path) -> None:
    arguments = [*SMALL, "--seeds", "1", "--out", str(tmp_path)]
    first = CliRunner().invoke(app, arguments)
    again = CliRunner().invoke(app, arguments)
    line = f"Taken from {tmp_path / 'runs.sqlite'}: 2 of 2 runs; delete it to train them again.\n"
    assert line not in first.stdout
    assert again.stdout.replace(line, "") == first.stdout
    other = CliRunner().invoke(app, [*arguments, "--store", str(tmp_path / "other")])
    assert "Taken from" not in other.stdout
    assert (tmp_path / "other").exists()


def test_workloads_of_ones_own_in_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the folder where one is; with what the command line prints of two."""
    (tmp_path / "here.py").write_text("from small_workloads import plane, ravine, Seen as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "here", raising=False)
    arguments = ["compare", "--workload", "here:plane,here:ravine", "--workload", "quadratic_deep", "--epochs", "2"]
    arguments += [
        "--optimizers",
        "AdamW,here:Mine",
        "--seeds",
        "2",
        "--jobs",
        "2",
        "--lrs",
        "0.03,0.1",
        "--extend",
        "0",
    ]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    for name in ("here:plane", "here:ravine", "quadratic_deep"):
        assert f"\n{name}: " in f"\n{result.stdout}"
    assert "All 3 workloads, performance profiles" in result.stdout
    document = json.loads(Path("out/compare.json").read_text(encoding="utf-8"))
    assert [run["status"] for run in document["runs"]] == ["finished"] * 24
    expected = "schuss compare --workload here:plane,here:ravine,quadratic_deep --optimizers AdamW,here:Mine "
    assert document["command"] == f"{expected}--lrs 0.03,0.1 --epochs 2 --extend 0 --seeds 2 --threads 1"


def test_ctrl_c_prints_what_there_is_and_exits_with_130(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from schuss.lab import compare as module

    calls, attempt = [], module.attempt

    def interrupted(*arguments: object, **options: object) -> object:
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return attempt(*arguments, **options)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(module, "attempt", interrupted)
        result = CliRunner().invoke(app, [*SMALL, "--seeds", "2", "--out", str(tmp_path)])
    assert result.exit_code == 130
    assert "Interrupted: 1 of 4 runs; means are over the seeds that are there." in result.stdout
    assert "The same command goes on from here." in result.stdout
    assert len(json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["runs"]) == 1
    result = CliRunner().invoke(app, [*SMALL, "--seeds", "2", "--out", str(tmp_path)])
    assert result.exit_code == 0
    assert "1 of 4 runs" in result.stdout


@pytest.mark.parametrize(("seeds", "expected"), [("2", [0, 1]), ("7,", [7]), ("3, 1,3", [3, 1])])
def test_seeds_are_a_count_or_a_list(tmp_path: Path, seeds: str, expected: list[int]) -> None:
    arguments = ["compare", "--optimizers", "torch:SGD", "--lrs", "0.01", "--epochs", "1", "--seeds", seeds]
    assert CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)]).exit_code == 0
    runs = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["runs"]
    assert [run["seed"] for run in runs] == expected


def test_optimizers_may_be_repeated(tmp_path: Path) -> None:
    arguments = ["compare", "--optimizers", "torch:SGD", "--optimizers", "torch:Adam, torch:SGD", "--lrs", "0.01"]
    arguments += ["--epochs", "1", "--seeds", "1", "--out", str(tmp_path)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    runs = json.loads((tmp_path / "compare.json").read_text(encoding="utf-8"))["runs"]
    assert [run["optimizer"] for run in runs] == ["torch:SGD", "torch:Adam"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizers", "torch:AdmW"], "unknown optimizer 'torch:AdmW': did you mean 'torch:AdamW'?"),
        (["--optimizers", ","], "at least one optimizer is needed"),
        (["--optimizers", "torch:LBFGS"], "torch:LBFGS cannot train the digits workload: "),
        (["--optimizers", "torch:SGD", "--lrs", "0.1,x"], "--lrs must be numbers separated by commas, got '0.1,x'"),
        (["--optimizers", "torch:SGD", "--lrs", "-1"], "lr must be in (0, inf), got -1"),
        (["--optimizers", "torch:SGD", "--lrs", ","], "at least one learning rate is needed"),
        (["--optimizers", "torch:SGD", "--seeds", "0"], "--seeds must be a count of at least 1 or integers"),
        (["--optimizers", "torch:SGD", "--seeds", "1,-2"], "--seeds must be a count of at least 1 or integers"),
        (["--optimizers", "torch:SGD", "--seeds", ""], "--seeds must be a count of at least 1 or integers"),
        (["--workload", "digit"], "unknown workload 'digit': did you mean 'digits'?"),
        (["--workload", ","], "at least one workload is needed"),
        (["--optimizers", "no_such_module:SGD"], "cannot import 'no_such_module'"),
        (["--warmup", "1"], "compare: warmup must be in [0, 1), got 1"),
        (["--jobs", "0"], "'--jobs'"),
        (["--epochs", "0"], "'--epochs'"),
        (["--epoch", "1"], "--epochs"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(SystemExit) as ended:
        main(["compare", *arguments, "--out", str(out)])
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("schuss: ")
    assert message in output.err
    assert output.err.count("\n") == 1
    assert not out.exists()


def test_a_file_in_the_place_of_the_folder_is_reported_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "file"
    taken.write_text("kept")
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--out", str(taken)])
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"schuss: Invalid value: cannot make the folder {taken}: File exists\n"
    assert taken.read_text() == "kept"


def test_a_file_that_is_no_store_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    taken = tmp_path / "file"
    taken.write_text("kept")
    with pytest.raises(SystemExit) as ended:
        main([*SMALL, "--out", str(tmp_path / "out"), "--store", str(taken)])
    assert ended.value.code == 2
    error = f"schuss: Invalid value: cannot use {taken} as a store of runs: file is not a database; name another file\n"
    assert capsys.readouterr().err == error
    assert taken.read_text() == "kept"


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (["--version"], __version__), ([], "compare"), (["--help"], "compare"):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert not ended.value.code
        assert expected in capsys.readouterr().out


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("missing", ["typer", "rich", "plotly", "scipy", "sklearn"])
def test_without_the_lab_extra_one_line_says_how_to_install_it(missing: str) -> None:
    result = python(
        f"import sys; sys.modules[{missing!r}] = None; sys.argv = ['schuss', 'compare']; "
        f"from schuss.cli import main; main()"
    )
    assert result.returncode == 1
    assert result.stderr == 'schuss: the command line needs the lab extra: pip install "schuss[lab]"\n'


def test_help_does_not_wait_for_heavy_imports() -> None:
    result = python(
        "import sys; from schuss.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print(sorted({'plotly', 'sklearn', 'numba'} & set(sys.modules)))"
    )
    assert result.stdout.endswith("[]\n"), result.stdout + result.stderr
