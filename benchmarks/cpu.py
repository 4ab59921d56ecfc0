"""Steps of every optimizer against torch.optim, on the CPU. Prints tables in Markdown.

    python benchmarks/cpu.py [--quick] [--only AdamW,SGD] [--threads N]

Each comparison alternates schuss and torch step by step in one process and takes medians; figures of different rows
are minutes apart on a machine that may be busy, ratios within a row are not. The bandwidth limit is an in-place
`a += s * b` over the same number of bytes, measured between the steps of the same row. The optimizers of a row update
the same parameters with the same gradients; each has its own state.
"""

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import torch

import schuss
from schuss import optim

RULES: dict[str, dict[str, object]] = {
    "SGD": {},
    "SGD momentum": {"momentum": 0.9},
    "SGD Nesterov": {"momentum": 0.9, "nesterov": True},
    "Adagrad": {},
    "Adadelta": {},
    "RMSprop": {},
    "RMSprop centered": {"centered": True, "momentum": 0.9},
    "Adam": {},
    "AMSGrad": {"amsgrad": True},
    "AdamW": {},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "ASGD": {},
    "Rprop": {},
    "ADOPT": {},
    "Lion": {},
    "NAdamW": {},
    "AdaBelief": {},
    "Adan": {},
    "AdEMAMix": {},
    "LaProp": {},
    "Signum": {},
    "ScheduleFreeSGD": {},
    "ScheduleFreeAdamW": {},
    "ScheduleFreeRAdam": {},
}
CLASSES = {"AMSGrad": "Adam"}


def gpt2() -> list[tuple[int, ...]]:
    """The 148 shapes of GPT-2 small."""
    d = 768
    block = [(d,), (d,), (d, 3 * d), (3 * d,), (d, d), (d,), (d,), (d,), (d, 4 * d), (4 * d,), (4 * d, d), (d,)]
    return [(50257, d), (1024, d), *(block * 12), (d,), (d,)]


SETS: dict[str, list[tuple[int, ...]]] = {
    "big": [(1024, 1024)] * 32,
    "small": [(64,)] * 1000,
    "gpt2": gpt2(),
}


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters with gradients."""
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = (0.1 * torch.randn_like(p)).detach()
    return params


def interleaved(functions: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median milliseconds of each function, called in turn for about `seconds`."""
    for f in functions:
        f()
        f()
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(times[0]) < 7 or (time.perf_counter() < end and len(times[0]) < 200):
        for f, t in zip(functions, times, strict=True):
            start = time.perf_counter()
            f()
            t.append(time.perf_counter() - start)
    return [1e3 * statistics.median(t) for t in times]


def torch_variants(
    name: str, settings: dict[str, object], params: Callable[[], list[torch.nn.Parameter]]
) -> dict[str, object]:
    """torch's optimizer of this name: its default loop, foreach, and fused where there is one."""
    cls = getattr(torch.optim, CLASSES.get(name, name.split()[0]), None)
    variants: dict[str, object] = {}
    if cls is None:
        return variants
    for label, more in (("loop", {}), ("foreach", {"foreach": True}), ("fused", {"fused": True})):
        try:
            variants[label] = cls(params(), **settings, **more)
        except (TypeError, RuntimeError):
            continue
    return variants


class Triad:
    """The bandwidth limit: a += s * b over `bytes_moved` bytes, a third of them written."""

    def __init__(self, bytes_moved: int) -> None:
        count = max(bytes_moved // 12, 1)
        self.a, self.b = torch.zeros(count), torch.ones(count)

    def __call__(self) -> None:
        self.a.add_(self.b, alpha=0.5)


def rules_table(which: str, dtype: torch.dtype, only: list[str], seconds: float) -> None:
    """One row per rule: ms of schuss and of torch's variants, ratios, and the fraction of the bandwidth limit."""
    shapes = SETS[which]
    print(f"\n### {which}: {len(shapes)} tensors, {str(dtype).removeprefix('torch.')}, ms per step\n")
    print("| rule | schuss | torch loop | foreach | fused | best / schuss | loop / schuss | of bandwidth limit |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for name, settings in RULES.items():
        if only and name.split()[0] not in only:
            continue
        cls = getattr(optim, CLASSES.get(name, name.split()[0]))

        shared = parameters(shapes, dtype)  # where tensors happen to lie in memory must not decide

        def make(shared: list[torch.nn.Parameter] = shared) -> list[torch.nn.Parameter]:
            return shared

        ours = cls(make(), **settings)
        variants = torch_variants(name, settings, make)
        if which != "small":
            variants.pop("foreach", None) if which == "gpt2" else None
        ours.step()
        traffic = ours.plan().traffic_bytes
        triad = Triad(traffic) if which != "small" else None
        functions = [ours.step, *(v.step for v in variants.values())]  # type: ignore[attr-defined]
        results = interleaved([*functions, *([triad] if triad else [])], seconds)
        mine, others = results[0], dict(zip(variants, results[1:], strict=False))
        cells = [f"{mine:.2f}", *(f"{others[k]:.2f}" if k in others else "-" for k in ("loop", "foreach", "fused"))]
        cells.append(f"{min(others.values()) / mine:.2f}" if others else "-")
        cells.append(f"{others['loop'] / mine:.1f}" if others else "-")
        cells.append(f"{results[-1] / mine:.2f}" if triad else "-")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        del ours, variants, functions, triad
        gc.collect()


SUMS: dict[str, tuple[str, dict[str, object], str]] = {
    "LARS": ("LARS", {}, "LARS"),
    "LAMB": ("LAMB", {}, "Lamb"),
    "StableAdamW": ("StableAdamW", {}, "StableAdamW"),
    "MARS": ("MARS", {}, "MARS"),
    "Prodigy": ("Prodigy", {}, "Prodigy"),
    "Adafactor": ("Adafactor", {}, "AdaFactor"),
    "Schedule-Free AdamW": ("ScheduleFreeAdamW", {}, "ScheduleFreeAdamW"),
    "AdamW, cautious": ("AdamW", {"cautious": True}, ""),
}
"""Rules that need more than one pass, or that torch lacks: class, settings, and pytorch_optimizer's name."""


def peer(name: str, params: list[torch.nn.Parameter], **settings: object) -> Any:
    """pytorch_optimizer's optimizer, if that library happens to be installed."""
    try:
        import pytorch_optimizer
    except ImportError:
        return None
    return getattr(pytorch_optimizer, name)(params, **settings) if name else None


def sums_table(seconds: float) -> None:
    """Rules with sums against AdamW, torch's form, and pytorch_optimizer's if it is installed."""
    print("\n### Rules with sums: 32 tensors of 1024x1024 and 1000 tensors of 64, ms per step\n")
    print(
        "| rule | bytes per element | schuss | AdamW | of bandwidth limit | torch | pytorch_optimizer | small | AdamW |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    shared, small = parameters(SETS["big"], torch.float32), parameters(SETS["small"], torch.float32)
    adamw, small_adamw = optim.AdamW(shared), optim.AdamW(small)
    for label, (name, settings, theirs) in SUMS.items():
        ours, ours_small = (getattr(optim, name)(params, **settings) for params in (shared, small))
        in_torch = getattr(torch.optim, name, None) if not settings else None
        other = in_torch(shared) if in_torch is not None else None
        third = peer(theirs, shared)
        ours.step()
        moved = ours.plan().traffic_bytes
        functions = [ours.step, adamw.step, Triad(moved), *(o.step for o in (other, third) if o is not None)]
        results = interleaved(functions, seconds)
        rest = iter(results[3:])
        cells = [f"{next(rest):.1f}" if o is not None else "-" for o in (other, third)]
        tiny = interleaved([ours_small.step, small_adamw.step], seconds / 2)
        limit = f"{results[2] / results[0]:.2f}"
        per_element = moved / sum(p.numel() for p in shared)
        row = [f"{per_element:.0f}", *(f"{t:.1f}" for t in results[:2]), limit, *cells, *(f"{t:.2f}" for t in tiny)]
        print(f"| {label} | {' | '.join(row)} |", flush=True)
        del ours, ours_small, other, third, functions
        gc.collect()


MATRICES: dict[str, tuple[list[dict[str, object]], str, dict[str, object]]] = {
    "Muon": ([{}], "", {}),
    "NorMuon": ([{}], "", {}),
    "SOAP": ([{}, {"precision": "bfloat16"}], "SOAP", {}),
    "Shampoo": (
        [{"block_size": 512, "start_preconditioning_step": 1, "grafting": "sgd", "momentum": 0.9, "nesterov": True}],
        "ScalableShampoo",
        {"block_size": 512, "start_preconditioning_step": 1, "preconditioning_compute_steps": 10},
    ),
}
"""Rules with functions of matrices: settings, pytorch_optimizer's name, and its settings for the same work."""


def matrices_table(only: list[str], cycles: int) -> None:
    """Muon and its kin against torch, or pytorch_optimizer if it is installed."""
    d, frequency = 768, 10
    layer = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d)]
    print("\n### Rules with functions of matrices: the 4 of a layer of GPT-2 small, ms\n")
    print(
        f"Step: the median without new bases or roots. Cycle: the mean of {frequency} steps, one of them with new ones."
    )
    print()
    print("| rule | against | step, schuss | other | other / schuss | cycle, schuss | other | other / schuss |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for name, (variants, theirs, settings) in MATRICES.items():
        if only and name not in only:
            continue
        shared = parameters(layer, torch.float32)
        in_torch = getattr(torch.optim, name, None)
        other = in_torch(shared) if in_torch is not None else peer(theirs, shared, **settings)
        optimizers = [*(getattr(optim, name)(shared, **more) for more in variants), *([other] if other else [])]
        plain, mean = [], []
        times: list[list[float]] = [[] for _ in optimizers]
        for count in range(2 + cycles * frequency):  # the first steps make state, and find the first bases
            for p in shared:
                p.grad.normal_(0, 0.1)  # or all bases would be those of one gradient
            for optimizer, t in zip(optimizers, times, strict=True):
                start = time.perf_counter()
                optimizer.step()
                if count >= 2:
                    t.append(1e3 * (time.perf_counter() - start))
        for t in times:
            plain.append(statistics.median(t))
            renewing = statistics.median(max(t[k : k + frequency]) for k in range(0, len(t), frequency))
            mean.append((renewing + (frequency - 1) * plain[-1]) / frequency if theirs else plain[-1])
        against = "-" if other is None else f"{type(other).__module__.partition('.')[0]} {type(other).__name__}"
        for k, more in enumerate(variants):
            label = ", ".join([name, *(str(value) for key, value in more.items() if key == "precision")])
            cells = [against]
            for values in (plain, mean):
                cells.append(f"{values[k]:.0f}")
                cells += [f"{values[-1]:.0f}", f"{values[-1] / values[k]:.2f}"] if other else ["-", "-"]
            print(f"| {label} | {' | '.join(cells)} |", flush=True)
        del optimizers, other
        gc.collect()


STORAGES: dict[str, tuple[torch.dtype, dict[str, object]]] = {
    "float32": (torch.float32, {}),
    "state bfloat16": (torch.float32, {"state_dtype": "bfloat16"}),
    "state int8": (torch.float32, {"state_dtype": "int8"}),
    "bfloat16": (torch.bfloat16, {}),
    "bfloat16, state float32": (torch.bfloat16, {"state_dtype": "float32"}),
    "bfloat16, state int8": (torch.bfloat16, {"state_dtype": "int8"}),
    "bfloat16, kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "bfloat16, stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "bfloat16, stochastic, state int8": (torch.bfloat16, {"rounding": "stochastic", "state_dtype": "int8"}),
}


def storage_table(seconds: float) -> None:
    """AdamW with every storage and rounding against torch's fused form on float32."""
    print("\n### AdamW, 32 tensors of 1024x1024: storages, ms per step\n")
    print("| parameters, state | state bytes per element | schuss | torch fused, float32 | schuss, float32 | ratios |")
    print("|---|---:|---:|---:|---:|---:|")
    shared = parameters(SETS["big"], torch.float32)
    base, fused = optim.AdamW(shared), torch.optim.AdamW(shared, fused=True)
    for label, (dtype, options) in STORAGES.items():
        ours = optim.AdamW(parameters(SETS["big"], dtype), **options)
        mine, theirs, float32 = interleaved([ours.step, fused.step, base.step], seconds)
        kept = ours.plan().state_bytes / sum(e.p.numel() for e in ours.plan().entries)
        ratios = f"{theirs / mine:.2f}, {float32 / mine:.2f}"
        print(f"| {label} | {kept:.2f} | {mine:.2f} | {theirs:.2f} | {float32:.2f} | {ratios} |", flush=True)
        del ours
        gc.collect()


def around_table(seconds: float) -> None:
    """Clipping and averaging in the step, against torch's functions around its fused step."""
    print("\n### AdamW with clipping and averaging, GPT-2 small, ms per step\n")
    print("| with | schuss | torch: clip_grad_norm_, fused AdamW, AveragedModel | torch / schuss |")
    print("|---|---:|---:|---:|")
    params = parameters(SETS["gpt2"], torch.float32)
    model = torch.nn.Module()
    model.params = torch.nn.ParameterList(params)
    fused = torch.optim.AdamW(params, fused=True)
    for label, clips, averages in (
        ("nothing", False, False), ("max_norm", True, False), ("ema_decay", False, True), ("both", True, True)
    ):  # fmt: skip
        options = ({"max_norm": 1.0} if clips else {}) | ({"ema_decay": 0.999} if averages else {})
        ours = optim.AdamW(params, **options)
        average = optim.swa_utils.AveragedModel(model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.999))

        def theirs(clips: bool = clips, averages: bool = averages, average: Any = average) -> None:
            if clips:
                torch.nn.utils.clip_grad_norm_(params, 1.0)
            fused.step()
            if averages:
                average.update_parameters(model)

        mine, others = interleaved([ours.step, theirs], 2 * seconds)
        print(f"| {label} | {mine:.1f} | {others:.1f} | {others / mine:.2f} |", flush=True)
        del ours, average
        gc.collect()
    print("\n### Around the step, 1000 tensors of 64, AdamW, and a schedule of 200 groups\n")
    params = parameters(SETS["small"], torch.float32)
    plain, ahead = optim.AdamW(params), schuss.Lookahead(optim.AdamW(params), k=10**9)
    alone, wrapped = interleaved([plain.step, ahead.step], seconds)
    many = optim.SGD([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1e-3 * i} for i in range(1, 201)])
    schedule = schuss.Schedule(many, lr=schuss.schedules.warmup(schuss.schedules.cosine(10**6), 100))
    (step,) = interleaved([schedule.step], 0.2)
    print(f"Lookahead between two syncs {wrapped:.3f} ms, its inner optimizer alone {alone:.3f} ms;")
    print(f"a step of the schedule {1e3 * step:.1f} µs.")


def groups_table(seconds: float) -> None:
    """400 tensors in 200 groups against the same tensors in one."""
    shapes = [(128, 64), (128,)] * 200
    print("\n### 200 groups of 2 tensors against one group, ms per step\n")
    print("| rule | schuss, 200 groups | schuss, one | ratio | torch loop, 200 | torch fused, 200 |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in ("SGD", "AdamW", "RMSprop"):

        def groups() -> list[dict[str, object]]:
            params = parameters(shapes, torch.float32)
            return [{"params": params[2 * i : 2 * i + 2], "lr": 1e-3 * (1 + i)} for i in range(200)]

        many = getattr(optim, name)(groups())
        one = getattr(optim, name)(parameters(shapes, torch.float32))
        variants = torch_variants(name, {}, groups)  # type: ignore[arg-type]
        variants.pop("foreach")
        functions = [many.step, one.step, *(v.step for v in variants.values())]  # type: ignore[attr-defined]
        a, b, *rest = interleaved(functions, seconds)
        others = dict(zip(variants, rest, strict=True))
        cells = [f"{others[k]:.2f}" if k in others else "-" for k in ("loop", "fused")]
        print(f"| {name} | {a:.3f} | {b:.3f} | {a / b:.2f} | {' | '.join(cells)} |", flush=True)


def memory() -> None:
    """What a step allocates once the plan is made: Python's allocations, and torch's."""
    optimizer = optim.AdamW(parameters(SETS["big"], torch.float32))
    for _ in range(3):
        optimizer.step()
    tracemalloc.start()
    optimizer.step()
    python_peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    torch_peak = sum(max(e.self_cpu_memory_usage, 0) for e in profile.key_averages())
    print("\n### Memory during a step of AdamW on 32 tensors of 1024x1024\n")
    print(f"Python and NumPy at most {python_peak / 1e3:.0f} kB, torch allocations {torch_peak / 1e3:.0f} kB")


STARTUP = """
import sys, time
t0 = time.perf_counter()
import torch
t1 = time.perf_counter()
import schuss
import schuss
from schuss import optim
t2 = time.perf_counter()
p = [torch.nn.Parameter(torch.randn(1000, 1000)) for _ in range(4)]
for q in p:
    q.grad = torch.randn_like(q)
o = getattr(optim, sys.argv[1])(p)
t3 = time.perf_counter()
o.step()
t4 = time.perf_counter()
print(t1 - t0, t2 - t1, t3 - t2, t4 - t3)
"""


def startup() -> None:
    """Import time and the first step, with an empty and with a filled cache folder."""
    print("\n### Start, seconds\n")
    print("| rule | import schuss, after torch | first optimizer made | first step, cold | first step, warm |")
    print("|---|---:|---:|---:|---:|")
    for name in ("SGD", "AdamW", "ADOPT"):
        cold, warm, imports, made = [], [], [], []
        for _ in range(3):
            with tempfile.TemporaryDirectory() as folder:
                for steps in (cold, warm):
                    environment = os.environ | {"SCHUSS_CACHE_DIR": folder}
                    command = [sys.executable, "-c", STARTUP, name]
                    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
                    _, imported, constructed, first = map(float, output.split())
                    imports.append(imported)
                    made.append(constructed)
                    steps.append(first)
        medians = [f"{statistics.median(values):.2f}" for values in (imports, made, cold, warm)]
        print(f"| {name} | {' | '.join(medians)} |")


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    parser.add_argument("--only", default="", help="classes, comma-separated")
    parser.add_argument(
        "--tables", default="big,small,gpt2,bfloat16,sums,matrices,storage,around,groups,memory,startup"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    only = [n for n in arguments.only.split(",") if n]
    tables = arguments.tables.split(",")
    seconds = 0.5 if arguments.quick else 2.5
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {arguments.threads} threads")
    for which in SETS:
        if which in tables:
            rules_table(which, torch.float32, only, seconds)
    if "bfloat16" in tables:
        rules_table("big", torch.bfloat16, only, seconds)
    if "sums" in tables:
        sums_table(seconds)
    if "matrices" in tables:
        matrices_table(only, 1 if arguments.quick else 3)
    if "storage" in tables:
        storage_table(seconds)
    if "around" in tables:
        around_table(seconds)
    if "groups" in tables:
        groups_table(seconds)
    if "memory" in tables:
        memory()
    if "startup" in tables:
        startup()


if __name__ == "__main__":
    main()
