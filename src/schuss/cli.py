"""The `schuss` command. A subcommand parses, calls the library and prints; heavy imports wait until it runs."""

import ast
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

NEEDS_LAB = 'schuss: the command line needs the lab extra: pip install "schuss[lab]"'
LAB = {"optuna", "plotly", "rich", "scipy", "sklearn", "tensorboard"}

try:
    import typer
    from typer.exceptions import TyperException
except ModuleNotFoundError:
    # The console script imports this module before it can call main().
    raise SystemExit(NEEDS_LAB) from None

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line. A mistake in the arguments is one line on stderr and exit code 2."""
    try:
        code = app(args=arguments, prog_name="schuss", standalone_mode=False)
    except TyperException as error:
        print(f"schuss: {error.format_message()}", file=sys.stderr)
        code = error.exit_code
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in LAB:
            raise
        print(NEEDS_LAB, file=sys.stderr)
        code = 1
    sys.exit(code)


@contextmanager
def bad_values() -> Iterator[None]:
    """Report a ValueError as a mistake in the arguments."""
    try:
        yield
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


@app.callback(invoke_without_command=True)
def options(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Optimizers for PyTorch, each written once as a formula."""
    if version:
        from schuss import __version__

        typer.echo(__version__)
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def compare(
    workload: Annotated[
        list[str] | None,
        typer.Option(
            help="What to train, separated by commas or repeated: a workload of schuss, or module:function for one of "
            "yours. Default: digits.",
            show_default=False,
        ),
    ] = None,
    optimizers: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, separated by commas or repeated: AdamW is schuss's, torch:AdamW is torch's, module:Class "
            "anybody's. Default: torch:AdamW and schuss's SGD, Adam, AdamW, RAdam, NAdam, ADOPT and Lion.",
            show_default=False,
        ),
    ] = None,
    lrs: Annotated[
        str | None,
        typer.Option(help="Initial learning rates for all optimizers, separated by commas. Default: a grid for each."),
    ] = None,
    seeds: Annotated[str, typer.Option(help="A count (3 means seeds 0, 1 and 2) or a list (0,7 or 7,).")] = "3",
    confirm: Annotated[
        int,
        typer.Option(
            min=0,
            help="Seeds more that each optimizer is trained from at its best learning rate. If there are any, the "
            "ranking is on these alone.",
        ),
    ] = 0,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Passes over the training data in each run. Default: the workload's.", show_default=False
        ),
    ] = None,
    warmup: Annotated[
        float, typer.Option(help="Share of a run in which the learning rate rises, before it falls to zero.")
    ] = 0.0,
    extend: Annotated[
        int, typer.Option(min=0, help="Learning rates that are added at most where the best is at the edge of a grid.")
    ] = 2,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that train side by side.")] = 1,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads of torch in each. One is the fastest on a shared machine.")
    ] = 1,
    out: Annotated[Path, typer.Option(help="Folder for the report, compare.html, and its numbers.")] = Path("out"),
    store: Annotated[
        Path | None,
        typer.Option(
            help="SQLite file that keeps finished runs, which are not made again. Default: runs.sqlite in that folder.",
            show_default=False,
        ),
    ] = None,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write the curves of every run to the folder tensorboard in it.")
    ] = False,
) -> None:
    """Train workloads with several optimizers, learning rates and seeds, and rank what came out."""
    from schuss.lab import command

    with bad_values():
        try:
            complete = command.compare(
                workloads=workload, optimizers=optimizers, lrs=lrs, seeds=seeds, confirm=confirm, epochs=epochs,
                warmup=warmup, extend=extend, jobs=jobs, threads=threads, out=out, store=store, tensorboard=tensorboard,
                show=typer.echo,
            )  # fmt: skip
        except OSError as error:
            raise ValueError(str(error)) from error
    if not complete:
        raise typer.Exit(130)


@app.command()
def workloads(
    name: Annotated[
        str | None,
        typer.Argument(
            help="Check one: a workload of schuss, or module:function for one of yours.", show_default=False
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch. One is the fastest on a shared machine.")] = 1,
) -> None:
    """What optimizers are compared on: name, what it is, size, steps of a run, metric, target and time."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from schuss.lab.check import HEADER, check
    from schuss.lab.workloads import WORKLOADS, find

    torch.set_num_threads(threads)
    sys.path.insert(0, "")  # module:function is looked for in this folder, as `python -m` does
    with bad_values():
        found = [check(workload) for workload in (WORKLOADS.values() if name is None else [find(name)])]

    shown = Table(box=None, pad_edge=False)
    for title in HEADER:
        left = title in ("workload", "what it is", "target")
        shown.add_column(title, justify="left" if left else "right", no_wrap=title != "what it is")
    for facts in found:
        shown.add_row(*facts.cells())
    console = Console(highlight=False, markup=False)
    console.print(shown)
    if name is not None:
        [facts] = found
        before = ", ".join(f"{key} {value:.4g}" for key, value in facts.scores.items())
        task = facts.task
        console.print(
            f"Checked with seed 0: {task.epochs} epochs of {len(task.batches)} batches of {task.batch_size}. "
            f"Before training: {before}.",
            soft_wrap=True,
        )


@app.command("find-lr")
def find_learning_rate(
    workload: Annotated[str, typer.Argument(help="A workload of schuss, or module:function for one of yours.")],
    optimizer: Annotated[str, typer.Option(help="AdamW is schuss's, torch:AdamW is torch's.")] = "AdamW",
    low: Annotated[float, typer.Option(help="First learning rate.")] = 1e-7,
    high: Annotated[float, typer.Option(help="Last learning rate.")] = 10.0,
    steps: Annotated[int, typer.Option(help="Steps from one to the other.")] = 100,
    rule: Annotated[str, typer.Option(help="The suggestion that is marked.")] = "minimum",
    seed: Annotated[int, typer.Option(min=0, help="Of the workload.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch. One is the fastest on a shared machine.")] = 1,
    out: Annotated[
        Path | None, typer.Option(help="Also write this file: .html, .csv, .json or .png.", show_default=False)
    ] = None,
) -> None:
    """The learning-rate range test of an optimizer on a workload: the curve, and what every rule suggests."""
    import torch
    from rich.console import Console

    from schuss.lab.candidate import candidates
    from schuss.lab.check import check
    from schuss.lab.find_lr import SUFFIXES, TITLE, find_lr
    from schuss.lab.workloads import find

    torch.set_num_threads(threads)
    sys.path.insert(0, "")  # module:function is looked for in this folder, as `python -m` does
    with bad_values():
        if out is not None and out.suffix not in SUFFIXES:
            raise ValueError(f"--out must end in {', '.join(SUFFIXES)}, got {out}")
        [entrant] = candidates([optimizer], [1.0])  # so that no default rate is needed
        chosen = find(workload)
        check(chosen, seed=seed, seconds=0)
        torch.manual_seed(seed)
        task = chosen(seed)
        try:
            made = entrant.built(task.model, 1.0)
            found = find_lr(
                task.model, made, task.batches, lambda model, batch: task.loss(model, batch),
                low=low, high=high, steps=steps, rule=rule,
            )  # fmt: skip
        except (TypeError, RuntimeError) as error:
            raise ValueError(str(error)) from error

    console = Console(highlight=False, markup=False, soft_wrap=True)
    width = min(console.width, 100) - 12 if console.is_terminal else 72
    sketch = found.sketch(width=max(width, 24), dots="utf" in console.encoding.lower())
    console.print(sketch, style="cyan")
    console.print(f"{optimizer} on {chosen.name}, smoothed loss against the learning rate\n")
    console.print(str(found))
    if out is not None:
        try:
            found.save(out, title=f"{TITLE}: {optimizer} on {chosen.name}")
        except OSError as error:
            raise typer.BadParameter(f"cannot write {out}: {error.strerror}") from error
        console.print(f"Curve: {out}")


@app.command()
def tune(
    workload: Annotated[str, typer.Argument(help="A workload of schuss, or module:function for one of yours.")],
    optimizer: Annotated[
        str, typer.Option(help="AdamW is schuss's, torch:AdamW is torch's, module:Class or module:function is yours.")
    ] = "AdamW",
    trials: Annotated[int, typer.Option(help="Settings that are tried. With more of them more is tuned.")] = 20,
    seeds: Annotated[int, typer.Option(help="Trainings of the best setting and of the default, to confirm it.")] = 3,
    epochs: Annotated[
        int | None, typer.Option(help="Of a complete run. Default: the workload's.", show_default=False)
    ] = None,
    rungs: Annotated[
        int | None,
        typer.Option(
            help="Lengths of training, each a third of the next; 1: all trials are complete runs. Default: up to 3.",
            show_default=False,
        ),
    ] = None,
    names: Annotated[
        str | None,
        typer.Option(
            "--tune", help="What to tune, as lr,weight_decay,beta1. Default: by --trials.", show_default=False
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="What is fixed, as in --set weight_decay=0.1; may be repeated.", show_default=False),
    ] = None,
    limits: Annotated[
        list[str] | None,
        typer.Option("--range", help="Where to search, as --range lr=1e-4:1e-1; may be repeated.", show_default=False),
    ] = None,
    sampler: Annotated[str, typer.Option(help="tpe, halton or grid.")] = "tpe",
    extend: Annotated[int, typer.Option(help="How often each end of a range is moved if the best lies there.")] = 2,
    seed: Annotated[int, typer.Option(help="Of the sampler, and of the workload in every trial.")] = 0,
    budget: Annotated[
        str | None, typer.Option(help='When to stop: 90s, 10m, 2h or "500 epochs".', show_default=False)
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(help="A URL that Optuna takes; machines share it. Default: tune.db in --out.", show_default=False),
    ] = None,
    study: Annotated[
        str | None, typer.Option(help="Its name in the storage. Default: made of the rest.", show_default=False)
    ] = None,
    jobs: Annotated[int, typer.Option(help="Processes.")] = 1,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch in each process.")] = 1,
    out: Annotated[Path, typer.Option(help="Folder for tune.json and tune.csv.")] = Path("out"),
) -> None:
    """Search the learning rate, averages and weight decay of an optimizer on a workload. The same command goes on."""
    import torch
    from rich.console import Console

    from schuss.lab import spaces
    from schuss.lab.storage import beside
    from schuss.lab.tune import Search
    from schuss.lab.workloads import find

    torch.set_num_threads(threads)
    sys.path.insert(0, "")  # module:function is looked for in this folder, as `python -m` does
    with bad_values():
        search = Search(
            find(workload), optimizer, trials=trials, seeds=seeds, epochs=epochs, rungs=rungs,
            settings=dict(map(_setting, setting or [])), ranges=spaces.limits(limits or []),
            names=None if names is None else names.split(","), sampler=sampler, extend=extend, seed=seed, budget=budget,
            storage=storage or beside(out / "tune.db"), study=study, jobs=jobs,
        )  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {out}: {error.strerror}") from error
    progress = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
    search.tell = progress.print
    code = 0
    try:
        with bad_values():
            search.run()
    except KeyboardInterrupt:
        progress.print("Stopped. The same command goes on from here.")
        code = 130
    found = search.result()
    search.close()
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(str(found))
    try:
        numbers, rows = found.save(out)
    except OSError as error:
        raise typer.BadParameter(f"cannot write into {out}: {error.strerror}") from error
    console.print(f"Study: {found.study!r} in {found.storage}\nNumbers: {numbers}, {rows}")
    raise typer.Exit(code or int(not found.ranked))


@app.command()
def landscape(
    surface: Annotated[
        str,
        typer.Argument(
            help="rosenbrock, beale, himmelblau, rastrigin, quadratic or linear; a workload of schuss; or "
            "module:function for one of yours, of two tensors x and y, or of a seed for a workload.",
        ),
    ],
    optimizers: Annotated[
        list[str] | None,
        typer.Option(
            help="Names, separated by commas or repeated: AdamW is schuss's, torch:AdamW is torch's, module:Class "
            "anybody's. Default: SGD, RMSprop, Adam, Lion and LBFGS; of a workload SGD, AdamW and Lion.",
            show_default=False,
        ),
    ] = None,
    vary: Annotated[
        str | None,
        typer.Option(
            help="A hyperparameter of one optimizer and its values, as in lr=0.001,0.01,0.1.", show_default=False
        ),
    ] = None,
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rate of all, or of some as in SGD=0.01,Adam=0.1. Default: the best of a grid for each.",
            show_default=False,
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A hyperparameter of all, as in --set momentum=0.9; may be repeated."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Of each optimizer.")] = 200,
    start: Annotated[
        str | None, typer.Option(help="Where they begin, as in --start=-1.5,2.", show_default=False)
    ] = None,
    box: Annotated[
        str | None,
        typer.Option(
            help="What is shown: from and to of x, from and to of y, as in --box=-2,2,-1,3.", show_default=False
        ),
    ] = None,
    condition: Annotated[
        float | None, typer.Option(help="Condition number of the quadratic. Default: 50.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of batches, and of a network's first weights.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch. One is the fastest on a shared machine.")] = 1,
    out: Annotated[
        Path, typer.Option(help="Folder for page and numbers, or one file: .html, .json, .csv, .png or .svg.")
    ] = Path("out"),
) -> None:
    """Contour lines of a loss with the trajectories of optimizers, or of one with a hyperparameter varied."""
    from rich.console import Console

    from schuss.lab.landscape import command

    sys.path.insert(0, "")  # module:function is looked for in this folder, as `python -m` does
    with bad_values(), Console(stderr=True).status("Stepping"):
        try:
            command.run(
                surface, optimizers=optimizers, lr=lr, vary=vary, settings=dict(map(_setting, setting or [])),
                steps=steps, start=start, box=box, condition=condition, seed=seed, threads=threads, out=out,
                show=typer.echo,
            )  # fmt: skip
        except OSError as error:
            raise ValueError(f"cannot write {out}: {error.strerror}") from error


@app.command("list")
def list_optimizers() -> None:
    """The optimizers: name, what it is, bytes of float32 state per element, source."""
    from rich.console import Console
    from rich.table import Table

    from schuss import describe

    shown = Table(box=None, pad_edge=False)
    for name in ("optimizer", "what it is", "state", "source"):
        shown.add_column(name, justify="right" if name == "state" else "left", no_wrap=name == "optimizer")
    for row in describe.table():
        shown.add_row(row.name, row.summary, row.state, row.source)
    Console(highlight=False, markup=False).print(shown)


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="An optimizer of schuss, or module:Class for one of yours.")],
    backend: Annotated[
        str | None,
        typer.Option(
            help="Print what runs there instead of the formula: numba or triton (kernels), reference (the rule)."
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="A hyperparameter or an option, as in --set amsgrad=True --set state_dtype=int8; may be repeated.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Dtype of the parameters, for a kernel.")] = "float32",
    ptx: Annotated[
        str | None,
        typer.Option(help="With --backend triton, compile the kernel for this architecture, sm_90 say; needs no GPU."),
    ] = None,
    latex: Annotated[bool, typer.Option("--latex", help="Print the formula as LaTeX.")] = False,
) -> None:
    """Print an optimizer's formula, from the rule itself, or the kernel that is generated from it."""
    from schuss import describe

    sys.path.insert(0, "")  # module:Class is looked for in this folder, as `python -m` does
    with bad_values():
        if backend not in (None, "numba", "triton", "reference"):
            raise ValueError(f"--backend must be numba, triton or reference, got {backend!r}")
        if ptx is not None and backend != "triton":
            raise ValueError("--ptx is for --backend triton")
        cls = describe.find(name)
        settings = dict(map(_setting, setting or []))
        try:
            text = describe.show(cls, settings, backend=backend, dtype=dtype, latex=latex, ptx=ptx)
        except (TypeError, RuntimeError, ModuleNotFoundError) as error:
            raise ValueError(str(error)) from error
    print(text)


@app.command()
def explain(
    name: Annotated[str, typer.Argument(help="An optimizer of schuss, or module:Class for one of yours.")],
) -> None:
    """What an optimizer is: formula, hyperparameters, when to use it, its cost, its source and its trap."""
    from rich.console import Console
    from rich.markdown import Markdown

    from schuss import explain as explaining

    sys.path.insert(0, "")  # module:Class is looked for in this folder, as `python -m` does
    with bad_values():
        page = explaining.explain(name)
    console = Console()
    if not console.is_terminal:
        print(page.to_markdown(), end="")
        return
    console.print(Markdown(page.head), "")
    print(f"{page.formula}\n" if page.formula else "", end="")  # as wide as it is
    console.print(Markdown(page.body))


@app.command()
def plan(
    model: Annotated[
        str,
        typer.Argument(
            help="gpt2, gpt2-medium, gpt2-large, gpt2-xl, or module:factory for one of yours: a callable that returns "
            "a Module or tensors."
        ),
    ],
    optimizer: Annotated[str, typer.Option(help="An optimizer of schuss, or module:Class for one of yours.")] = "AdamW",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Dtype of the parameters: float32 or bfloat16. Default: as the model is.", show_default=False
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="A hyperparameter, as in --set amsgrad=True; may be repeated.", show_default=False),
    ] = None,
    bandwidth: Annotated[
        float | None,
        typer.Option(help="Of the memory, in GB/s (1e9 bytes). Default: measured on this machine.", show_default=False),
    ] = None,
) -> None:
    """What training a model takes: bytes of weights, gradients and state in each storage, and how long a step is."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from schuss import describe, footprint, shapes

    sys.path.insert(0, "")  # module:factory is looked for in this folder, as `python -m` does
    with bad_values():
        if bandwidth is not None and not 0 < bandwidth < float("inf"):
            raise ValueError(f"--bandwidth must be in (0, inf), got {bandwidth:g}")
        dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
        if dtype is not None and dtype not in dtypes:
            raise ValueError(f"--dtype must be float32 or bfloat16, got {dtype!r}")
        cls = describe.find(optimizer)
        settings = dict(map(_setting, setting or []))
        params = shapes.find(model)
        try:
            rows = footprint.footprint(params, cls, settings, dtype=None if dtype is None else dtypes[dtype])
        except TypeError as error:
            raise ValueError(str(error)) from error
    speed = footprint.measure() if bandwidth is None else footprint.Bandwidth(1e9 * bandwidth, "as given")

    shown = Table(box=None, pad_edge=False)
    for name in footprint.HEADER:
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    for cells in footprint.table(rows, speed.rate):
        shown.add_row(*cells)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    first = rows[0]
    trained = "" if first.trained == first.parameters else f", {first.trained:,} of them trained"
    tensors = f"{len(params):,} tensor{'' if len(params) == 1 else 's'}"
    console.print(f"{cls.__name__} on {model}: {first.parameters:,} parameters in {tensors}{trained}\n")
    console.print(shown)
    for line in footprint.remarks(rows):
        console.print(f"- {line}")
    console.print(
        f"- ms per step: bytes moved at {speed.rate / 1e9:,.1f} GB/s, {speed.source}. "
        "A step that waits for arithmetic too takes longer."
    )


@app.command()
def schedule(
    expression: Annotated[
        str,
        typer.Argument(
            help='Such as "warmup(cosine(1000), 100)". There are constant, linear, cosine, polynomial, one_minus_sqrt, '
            "exponential, step, multi_step, inverse_sqrt, one_cycle, cyclical, cosine_restarts, wsd, join, scale, "
            "warmup and absolute.",
        ),
    ],
    steps: Annotated[int, typer.Option(min=1, max=10**12, help="Steps to draw, from step 0.")] = 1000,
    lr: Annotated[
        float | None, typer.Option(help="Learning rate that the factors multiply. Default: 1.", show_default=False)
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write an interactive picture to this .html file.", show_default=False)
    ] = None,
) -> None:
    """Draw a schedule, given as an expression."""
    from rich.console import Console

    from schuss.schedules import absolute, parse, picture

    with bad_values():
        if lr is not None and not 0 < lr < float("inf"):
            raise ValueError(f"--lr must be in (0, inf), got {lr:g}")
        if out is not None and out.suffix != ".html":
            raise ValueError(f"--out must end in .html, got {out}")
        curve = parse(expression)
        if lr is not None and isinstance(curve, absolute):
            raise ValueError("--lr is for a schedule of factors; absolute(...) is one of values")
        try:
            t, values = picture.sample(curve, steps)
        except ArithmeticError:
            raise ValueError(f"{curve} gets too large within {steps} steps") from None
    values *= 1 if lr is None else lr
    console = Console(highlight=False, markup=False, soft_wrap=True)
    width = min(console.width, 100) - 12 if console.is_terminal else 72
    dots = "utf" in console.encoding.lower()
    console.print(picture.text(values, width=max(width, 8), dots=dots), style="cyan")
    top = int(values.argmax())
    console.print(f"{curve}: {values[0]:.4g} at step 0, {values[-1]:.4g} at step {t[-1]}")
    console.print(f"highest: {values[top]:.4g} at step {t[top]}")
    if out is not None:
        page = picture.page(curve, steps, lr=1 if lr is None else lr)
        try:
            out.write_text(page, encoding="utf-8")
        except OSError as error:
            raise typer.BadParameter(f"cannot write {out}: {error.strerror}") from error
        console.print(f"Picture: {out}")


def _setting(text: str) -> tuple[str, object]:
    from schuss.options import Options

    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError(f"--set must be name=value, got {text!r}")
    if name.strip() in Options.__annotations__ and value.strip().isidentifier():
        return name.strip(), value.strip()  # the names of options' values need no quotes
    try:
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        raise ValueError(f"--set {name.strip()}: not a Python number, boolean, None or tuple: {value!r}") from None


if __name__ == "__main__":
    main()
