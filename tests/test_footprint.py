"""The command `schuss plan` and `schuss.footprint`: bytes and times against the shapes, the plan, and real tensors."""

import importlib
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from schuss import optim, shapes
from schuss.cli import app, main
from schuss.footprint import Bandwidth, Row, footprint, measure, table

STORAGES = (None, "float32", "bfloat16", "int8")
SMALL = 12 * (7 * 768 + 2304 + 3072 - 768) + 2 * 768
"""Elements of GPT-2's biases and norms: in each of 12 blocks 4 of norms, 2 of projections, and the two wide ones."""


def by_storage(rows: list[Row]) -> dict[str | None, Row]:
    return {row.state_dtype: row for row in rows if row.rounding == rows[0].rounding}


def small_model() -> nn.Module:
    """Tensors above and below what is stored in blocks, one of them no multiple of a block."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(70, 61), nn.Tanh(), nn.Linear(61, 5))


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def cells(output: str, start: str) -> list[str]:
    """The cells of a row of the table after its name."""
    (line,) = (line for line in output.splitlines() if line.startswith(f"{start}  "))
    return re.split(r" {2,}", line.removeprefix(start).strip())


# --- shapes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "elements", "tensors"),
    [
        ("gpt2", 124_439_808, 148),
        ("gpt2-medium", 354_823_168, 292),
        ("gpt2-large", 774_030_080, 436),
        ("gpt2-xl", 1_557_611_200, 580),
    ],
)
def test_sizes_of_gpt2(name: str, elements: int, tensors: int) -> None:
    params = shapes.find(name)
    assert (sum(p.numel() for p in params), len(params)) == (elements, tensors)
    assert all(p.is_meta and p.requires_grad and p.dtype == torch.float32 for p in params)


def test_shapes_of_a_block_of_gpt2() -> None:
    """Against torch's own block of this kind, whose matrices lie the other way."""
    block = nn.TransformerEncoderLayer(768, 12, 3072, device="meta")
    named = shapes.gpt2(1, 768)
    assert sorted(tuple(sorted(p.shape)) for p in block.parameters()) == sorted(
        tuple(sorted(shape)) for name, shape in named.items() if name.startswith("h.0.")
    )


# --- bytes -----------------------------------------------------------------------------------------------------------


def test_bytes_of_gpt2_with_adamw() -> None:
    params = shapes.find("gpt2")
    n = 124_439_808
    rows = by_storage(footprint(params, optim.AdamW))
    assert tuple(rows) == STORAGES
    for row in rows.values():
        assert (row.parameters, row.trained, row.weights, row.gradients) == (n, n, 4 * n, 4 * n)
    blocks = sum(-(-p.numel() // 256) for p in params if p.numel() >= 4096)
    assert sum(p.numel() for p in params if p.numel() < 4096) == SMALL
    codes = 2 * (n - SMALL + 4 * blocks) + 8 * SMALL
    assert abs(codes / n - 2 * (1 + 4 / 256)) < 0.01
    for state_dtype, state in {None: 8 * n, "float32": 8 * n, "bfloat16": 4 * n, "int8": codes}.items():
        row = rows[state_dtype]
        assert (row.state, row.total, row.moved) == (state, 8 * n + state, 12 * n + 2 * state)
    assert rows["int8"].remarks == ("float32 for 98 of 148 tensors (under 4,096 elements)",)
    assert rows[None].remarks == rows["bfloat16"].remarks == ()


def test_bytes_in_bfloat16_and_what_kahan_adds() -> None:
    n = 124_439_808
    rows = footprint(shapes.find("gpt2"), optim.AdamW, dtype=torch.bfloat16)
    assert [(row.state_dtype, row.rounding) for row in rows] == [
        *((s, "nearest") for s in STORAGES),
        (None, "kahan"),
    ]
    first, kahan = rows[0], rows[-1]
    assert (first.weights, first.gradients, first.state, first.moved) == (2 * n, 2 * n, 4 * n, 14 * n)
    assert (kahan.state, kahan.moved) == (6 * n, 18 * n)
    assert rows[1].state == 8 * n


@pytest.mark.parametrize("cls", optim.RULES, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_agrees_with_the_plan_and_with_the_tensors_of_a_step(cls: Any, dtype: torch.dtype) -> None:
    settings = {"momentum": 0.9} if cls is optim.SGD else {}

    def parameters() -> list[nn.Parameter]:
        return [p for p in small_model().to(dtype).parameters() if cls.takes(p)]

    predicted = footprint(parameters(), cls, settings)
    refused = ["int8"] if cls in (optim.Rprop, optim.ASGD, optim.AdEMAMix, optim.Prodigy) else []
    refused = ["bfloat16", "int8"] if cls.__name__.startswith("ScheduleFree") else refused
    assert [row.state_dtype for row in predicted if row.state is None] == refused
    for row in predicted:
        params = parameters()
        options = settings | {"state_dtype": row.state_dtype, "rounding": row.rounding}
        if row.name != "like the parameter" or row.rounding != "nearest":
            options["backend"] = "reference"  # all store the same, and it compiles nothing
        if row.state is None:
            with pytest.raises(ValueError, match="must be float32") as raised:
                cls(params, **options)
            assert row.remarks == (str(raised.value),)
            assert row.total is row.moved is row.seconds(1.0) is None
            continue
        optimizer = cls(params, **options)
        for p in params:
            p.grad = torch.ones_like(p)
        optimizer.step()
        plan = optimizer.plan()
        kept = [t for state in optimizer.state.values() for t in state.values() if t.dim()]
        assert row.state == plan.state_bytes == sum(t.nbytes for t in kept)
        assert row.moved == plan.traffic_bytes
        assert row.weights == row.gradients == sum(p.nbytes for p in params)


@pytest.mark.parametrize("state_dtype", STORAGES)
def test_the_form_of_the_rule_counts(state_dtype: str | None) -> None:
    """amsgrad has a third state; centered RMSprop refuses 8 bits; plain SGD has none to store."""
    params = [nn.Parameter(torch.empty(512, 256, device="meta"))]
    n = params[0].numel()
    per = {None: 4.0, "float32": 4.0, "bfloat16": 2.0, "int8": 1 + 4 / 256}[state_dtype]
    assert by_storage(footprint(params, optim.AdamW, {"amsgrad": True}))[state_dtype].state == 3 * per * n
    assert by_storage(footprint(params, optim.SGD))[state_dtype].state == 0
    centered = by_storage(footprint(params, optim.RMSprop, {"centered": True}))[state_dtype].state
    assert centered == (None if state_dtype == "int8" else 2 * per * n)


def test_frozen_parameters_are_weights_only() -> None:
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 10))
    model[0].requires_grad_(False)
    row = footprint(model.parameters(), optim.AdamW)[0]
    assert (row.parameters, row.trained) == (5050 + 510, 510)
    assert (row.weights, row.gradients, row.state, row.moved) == (4 * 5560, 4 * 510, 8 * 510, 28 * 510)
    tensor = footprint([torch.zeros(10)], optim.AdamW)[0]  # a tensor that is no Parameter is trained as it is
    assert (tensor.trained, tensor.state) == (10, 80)


def test_state_dtype_by_name_gets_a_row_and_rounding_is_kept() -> None:
    params = [nn.Parameter(torch.empty(512, 256, device="meta", dtype=torch.bfloat16))]
    n = params[0].numel()
    settings = {"state_dtype": {"exp_avg": "int8"}, "rounding": "kahan", "backend": "numba"}
    rows = footprint(params, optim.AdamW, settings)
    assert [(row.name, row.state / n) for row in rows if row.state is not None] == [
        ("like the parameter", 6.0),
        ("float32", 10.0),
        ("bfloat16", 6.0),
        ("int8", 2 + 2 * (1 + 4 / 256)),
        ("exp_avg int8", 2 + 2 + 1 + 4 / 256),
    ]


def test_what_stays_of_other_types_is_said() -> None:
    class Special(nn.Parameter):
        pass

    params = [Special(torch.zeros(64, 64)), nn.Parameter(torch.zeros(64, 64, dtype=torch.complex64))]
    row = by_storage(footprint(params, optim.AdamW))["int8"]
    optimizer = optim.AdamW(params, state_dtype="int8")
    assert row.state == optimizer.plan().state_bytes == 2 * (4 + 8) * 4096
    assert set(row.remarks) == {
        "float32 for 1 of 2 tensors (tensor subclass Special)",
        "complex64 for 1 of 2 tensors (complex)",
    }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (([], optim.AdamW), ValueError, "no parameter is trained: there are none"),
        ((nn.Linear(2, 2).requires_grad_(False).parameters(), optim.AdamW), ValueError, "all are frozen"),
        (([torch.zeros(2)] * 2, optim.AdamW), ValueError, "a parameter appears twice"),
        (([torch.zeros(2)], optim.AdamW, {"lr": -1.0}), ValueError, r"AdamW: lr must be in \[0, inf\), got -1.0"),
        (([torch.zeros(2)], optim.AdamW, {"wd": 1}), TypeError, "AdamW: unknown argument 'wd'"),
        (([torch.zeros(2)], optim.AdamW, {"rounding": "kahan"}), ValueError, "is for bfloat16 and float16 parameters"),
        (([torch.zeros(2)], optim.Rprop, {"state_dtype": "int8"}), ValueError, "must be float32 or bfloat16"),
    ],
)
def test_what_is_wrong_for_all_rows_is_an_error(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        footprint(*arguments)


# --- time ------------------------------------------------------------------------------------------------------------


def test_time_is_bytes_over_bandwidth() -> None:
    row = footprint(shapes.find("gpt2"), optim.AdamW)[0]
    assert row.moved == 28 * 124_439_808
    assert row.seconds(20e9) == 28 * 124_439_808 / 20e9
    assert table([row], 20e9)[-1][-1] == "174.2"
    assert cells(invoke("gpt2", "--bandwidth", "40"), "state float32")[-1] == "87.1"


def test_the_bandwidth_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unit, from passes that are said to take 10 ms or longer, on arrays of 1 MB."""
    ticks = iter([t for i in range(10) for t in (float(i), i + 0.010 * (1 + i % 3))])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("schuss.footprint._ARRAY", 1_000_000)
    monkeypatch.setattr("time.perf_counter", lambda: next(ticks))
    measured = measure()
    assert math.isclose(measured.rate, 3e6 / 0.010)
    threads = torch.get_num_threads()
    assert measured.source == f"measured by a += s * b on the CPU with {threads} thread{'s' * (threads > 1)}"


# --- the command -----------------------------------------------------------------------------------------------------


def test_prints_the_table() -> None:
    output = invoke("gpt2", "--bandwidth", "20")
    assert output.startswith("AdamW on gpt2: 124,439,808 parameters in 148 tensors\n")
    assert cells(output, "weights") == cells(output, "gradients") == ["4.00", "497.76 MB"]
    assert cells(output, "state like the parameter") == ["8.00", "995.52 MB", "1.99 GB", "3.48 GB", "174.2"]
    assert cells(output, "state int8") == ["2.04", "253.49 MB", "1.25 GB", "2.00 GB", "100.0"]
    assert "- int8: float32 for 98 of 148 tensors (under 4,096 elements)\n" in output
    assert "- ms per step: bytes moved at 20.0 GB/s, as given." in output


def test_prints_what_kahan_adds() -> None:
    output = invoke("gpt2", "--dtype", "bfloat16", "--bandwidth", "20")
    assert cells(output, 'rounding="kahan" adds') == ["2.00", "248.88 MB", "248.88 MB", "497.76 MB", "24.9"]
    assert "kahan" not in invoke("gpt2", "--bandwidth", "20")


def test_a_storage_that_the_rule_refuses_is_a_remark() -> None:
    output = invoke("gpt2", "--optimizer", "Rprop", "--bandwidth", "20")
    assert cells(output, "state int8") == ["-"] * 5
    assert "- int8: Rprop: state_dtype of 'prev' must be float32 or bfloat16" in output
    assert cells(output, "state float32")[0] == "8.00"


def test_measures_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("schuss.footprint.measure", lambda: Bandwidth(40e9, "measured by nobody"))
    output = invoke("gpt2")
    assert cells(output, "state float32")[-1] == "87.1"
    assert "at 40.0 GB/s, measured by nobody." in output


MODELS = """
import torch
from torch import nn

ran_on = []

def build():
    ran_on.append(torch.empty(0).device.type)
    return nn.Linear(50, 100)

def needs_values():
    model = build()
    model.scale = model.weight.sum().item()
    return model

def huge():
    return nn.Linear(10**6, 10**7, bias=False)

def generator():
    return (torch.empty(50, 2) for _ in range(3))

def half_frozen():
    model = nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 10))
    model[0].requires_grad_(False)
    return model

def broken():
    raise RuntimeError("no such file\\nmore")

def lazy():
    return nn.LazyLinear(3)

def empty():
    return nn.ReLU()

def frozen():
    return nn.Linear(2, 2).requires_grad_(False)

def strings():
    return ["a"]

built = nn.Linear(50, 100)
tensors = [torch.zeros(50, 100), torch.zeros(100)]
number = 3
"""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current folder, with a name of its own."""
    name = f"models_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODELS, encoding="utf-8")
    (tmp_path / f"{name}_raises.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *sys.path])
    return name


@pytest.mark.parametrize(
    ("factory", "headline"),
    [
        ("build", "5,100 parameters in 2 tensors\n"),
        ("needs_values", "5,100 parameters in 2 tensors\n"),
        ("built", "5,100 parameters in 2 tensors\n"),
        ("tensors", "5,100 parameters in 2 tensors\n"),
        ("huge", "10,000,000,000,000 parameters in 1 tensor\n"),
        ("generator", "300 parameters in 3 tensors\n"),
        ("half_frozen", "5,560 parameters in 4 tensors, 510 of them trained\n"),
    ],
)
def test_a_model_of_ones_own(models: str, factory: str, headline: str) -> None:
    output = invoke(f"{models}:{factory}", "--bandwidth", "20")
    assert output.startswith(f"AdamW on {models}:{factory}: {headline}")


def test_a_model_is_built_on_the_meta_device_or_else_for_real(models: str) -> None:
    ran_on = importlib.import_module(models).ran_on
    shapes.find(f"{models}:build")
    assert ran_on == ["meta"]
    ran_on.clear()
    assert all(p.device.type == "cpu" for p in shapes.find(f"{models}:needs_values"))
    assert ran_on == ["meta", "cpu"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gtp2"], "unknown model 'gtp2': did you mean 'gpt2'?"),
        (["bert"], "unknown model 'bert': choose from gpt2, gpt2-medium, gpt2-large, gpt2-xl, module:factory"),
        (["nowhere_to_be_found:build"], "cannot import 'nowhere_to_be_found': ModuleNotFoundError: No module named"),
        ([":build"], "cannot import ''"),
        (["MODELS:nothing"], "module 'MODELS' has no 'nothing': choose from "),
        (["MODELS_raises:build"], "cannot import 'MODELS_raises': ZeroDivisionError: division by zero"),
        (["MODELS:broken"], "MODELS:broken raised RuntimeError: no such file"),
        (["MODELS:lazy"], "MODELS:lazy has parameters without a shape yet"),
        (["MODELS:empty"], "MODELS:empty has no parameters"),
        (["MODELS:frozen"], "no parameter is trained: all are frozen"),
        (["MODELS:strings"], "MODELS:strings must be or return a Module or an iterable of tensors, got one of str"),
        (["MODELS:number"], "MODELS:number must be or return a Module or an iterable of tensors, got int"),
        (["gpt2", "--optimizer", "AdmW"], "unknown optimizer 'AdmW': did you mean 'AdamW'?"),
        (["gpt2", "--set", "lr=-1"], "AdamW: lr must be in [0, inf), got -1"),
        (["gpt2", "--set", "momentum=0.9"], "AdamW: unknown argument 'momentum'"),
        (["gpt2", "--set", "rounding='kahan'"], "AdamW: rounding='kahan' is for bfloat16 and float16 parameters"),
        (["gpt2", "--dtype", "int4"], "--dtype must be float32 or bfloat16, got 'int4'"),
        (["gpt2", "--bandwidth", "0"], "--bandwidth must be in (0, inf), got 0"),
        (["gpt2", "--bandwidth", "nan"], "--bandwidth must be in (0, inf), got nan"),
        ([], "Missing argument 'model'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    models: str, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *(argument.replace("MODELS", models) for argument in arguments)])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.out == ""
    assert message.replace("MODELS", models) in printed.err
    assert printed.err.count("\n") == 1


def test_the_page_shows_what_is_printed() -> None:
    page = Path(__file__).resolve().parent.parent / "docs" / "memory.md"
    shown = re.findall(r"^```console\n\$ schuss plan (.*?)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    assert shown
    for arguments, output in shown:
        assert [line.rstrip() for line in invoke(*arguments.split()).splitlines()] == output.splitlines()
