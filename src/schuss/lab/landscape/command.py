"""What `schuss landscape` does with its words."""

import ast
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from schuss.lab.landscape.compare import OF_NETWORKS, OPTIMIZERS, landscape, look_up
from schuss.lab.landscape.result import NEEDS_KALEIDO, SUFFIXES, Landscape
from schuss.lab.workload import Workload

KINDS = {".html": "Page", ".json": "Numbers", ".csv": "Trajectories", ".png": "Picture", ".svg": "Picture"}


def run(
    surface: str,
    *,
    optimizers: Sequence[str] | None,
    lr: str | None,
    vary: str | None,
    settings: Mapping[str, Any],
    steps: int,
    start: str | None,
    box: str | None,
    condition: float | None,
    seed: int,
    threads: int,
    out: Path,
    show: Callable[[str], object],
) -> Landscape:
    """Make a landscape, print its table, and write the files.

    Raises:
        ValueError: a mistake in the arguments.
        OSError: a file cannot be written.
    """
    if out.suffix and out.suffix not in SUFFIXES:
        raise ValueError(f"--out must be a folder, or a file that ends in {', '.join(SUFFIXES)}, got {out}")
    if out.suffix in (".png", ".svg") and find_spec("kaleido") is None:
        raise ValueError(NEEDS_KALEIDO.format(suffix=out.suffix))
    chosen = look_up(surface)
    names = split(",".join(optimizers)) if optimizers else None
    values: dict[str, Any] = {
        "lr": None if lr is None else rates(lr),
        "vary": None if vary is None else varied(vary),
        "start": None if start is None else numbers("--start", start, 2),
        "box": None if box is None else numbers("--box", box, 4),
    }
    torch.set_num_threads(threads)
    found = landscape(chosen, names, settings=settings, steps=steps, condition=condition, seed=seed, **values)
    show(str(found))

    # The names are spelt out because the default may change in a later version.
    default = ("AdamW",) if vary else OF_NETWORKS if isinstance(chosen, Workload) else OPTIMIZERS
    words = ["schuss", "landscape", surface, "--optimizers", ",".join(names or default)]
    given = {"--lr": lr, "--vary": vary, "--start": start, "--box": box, "--condition": condition}
    words += [f"{key}={value}" for key, value in given.items() if value is not None]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    command = shlex.join([*words, "--steps", str(steps), "--seed", str(seed)])
    for path in files(out, surface):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            found.save(path, command=command)
        except ModuleNotFoundError as error:
            if error.name != "kaleido":
                raise
            raise ValueError(str(error)) from error
        show(f"{KINDS[path.suffix]}: {path}")
    return found


def files(out: Path, surface: str) -> list[Path]:
    """The file, or those in the folder: the page and its numbers."""
    stem = surface.rpartition(":")[2]
    return [out] if out.suffix else [out / f"{stem}{suffix}" for suffix in (".html", ".json", ".csv")]


def rates(text: str) -> float | dict[str, float]:
    """`0.1` for all, or `SGD=0.01,Adam=0.1`."""
    try:
        if "=" not in text:
            return float(text)
        pairs = (word.rpartition("=") for word in split(text))
        return {name.strip(): float(value) for name, _, value in pairs}
    except ValueError:
        raise ValueError(f"--lr must be a number, or such as SGD=0.01,Adam=0.1, got {text!r}") from None


def varied(text: str) -> dict[str, list[Any]]:
    """`momentum=0,0.9`: a hyperparameter and its values."""
    name, equals, values = text.partition("=")
    try:
        if not equals or not values.strip():
            raise ValueError
        return {name.strip(): list(ast.literal_eval(f"[{values}]"))}
    except (ValueError, SyntaxError):
        raise ValueError(
            f"--vary must be a hyperparameter with its values, as in lr=0.001,0.01,0.1 or betas=(0.9,0.999),(0.5,0.9), "
            f"got {text!r}"
        ) from None


def numbers(option: str, text: str, count: int) -> tuple[float, ...]:
    """So many numbers, separated by commas."""
    try:
        found = tuple(float(word) for word in split(text))
        if len(found) != count:
            raise ValueError
    except ValueError:
        raise ValueError(f"{option} must be {count} numbers separated by commas, got {text!r}") from None
    return found


def split(text: str) -> list[str]:
    """Words that commas separate."""
    return [word for word in (part.strip() for part in text.split(",")) if word]
