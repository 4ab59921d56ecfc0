"""Steps of every optimizer on a CUDA device against torch's, and against the bandwidth of a copy. Prints Markdown.

    python benchmarks/gpu.py [--quick] [--only AdamW,SGD] [--tables rules,storage,small,groups,capture]
    python benchmarks/gpu.py --ptx sm_90

Device times are taken with CUDA events around single steps, alternating between the optimizers of a row, medians; the
host's time is that of the call, with an idle device. "of copy" is the bytes that the step must move, over its time,
over the bandwidth of `b.copy_(a)` on as many bytes in the same row. The optimizers of a row update the same parameters
with the same gradients; each has its own state. optimi and bitsandbytes take part where they are installed.

The second form needs no GPU: it compiles the kernels of every rule, and prints what is in their machine code.
"""

import argparse
import gc
import importlib
import platform
import re
import statistics
import time
from collections.abc import Callable

import torch
from cpu import CLASSES, RULES, STORAGES, gpt2

from schuss import optim

DEVICE = torch.device("cuda")
SETS: dict[str, list[tuple[int, ...]]] = {
    "GPT-2 small, 124 M elements": gpt2(),
    "64 tensors of 4096x4096, 1.07 G elements": [(4096, 4096)] * 64,
}
Step = Callable[[], object]


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Parameters on the device, with gradients."""
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE, dtype=dtype)) for shape in shapes]
    for p in params:
        p.grad = (0.1 * torch.randn_like(p)).detach()
    return params


def device_times(steps: list[Step], seconds: float) -> list[float]:
    """Median milliseconds on the device of each step, taken in turn for about `seconds`."""
    for step in steps * 3:
        step()
    torch.cuda.synchronize()
    times: list[list[float]] = [[] for _ in steps]
    end = time.perf_counter() + seconds
    while len(times[0]) < 7 or (time.perf_counter() < end and len(times[0]) < 300):
        for step, measured in zip(steps, times, strict=True):
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            step()
            stop.record()
            stop.synchronize()
            measured.append(start.elapsed_time(stop))
    return [statistics.median(t) for t in times]


def host_time(step: Step, count: int = 50) -> float:
    """Median milliseconds that the host spends in a step, with nothing queued."""
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    torch.cuda.synchronize()
    return statistics.median(times)


class Copy:
    """The bandwidth limit: a copy that reads and writes `bytes_moved` bytes in all."""

    def __init__(self, bytes_moved: int) -> None:
        self.a = torch.zeros(max(bytes_moved // 2, 1), dtype=torch.uint8, device=DEVICE)
        self.b = torch.empty_like(self.a)

    def __call__(self) -> None:
        self.b.copy_(self.a)


def others(name: str, settings: dict[str, object], params: list[torch.nn.Parameter]) -> dict[str, Step]:
    """The steps of other libraries' optimizers of this name, as far as they are there."""
    plain, found = name.split()[0], {}
    made = CLASSES.get(name, plain)
    for label, more in (("torch fused", {"fused": True}), ("torch foreach", {"foreach": True})):
        cls = getattr(torch.optim, made, None)
        if cls is not None:
            try:
                found[label] = cls(params, **settings, **more).step
            except (TypeError, RuntimeError):
                continue
    for module in ("optimi", "bitsandbytes.optim"):
        try:
            cls = getattr(importlib.import_module(module), made)
            found[module.partition(".")[0]] = cls(params, lr=1e-3, **settings).step
        except (ImportError, AttributeError, TypeError, ValueError, RuntimeError):
            continue
    return found


LABELS = ("torch fused", "torch foreach", "optimi", "bitsandbytes")


def rules_table(title: str, shapes: list[tuple[int, ...]], only: list[str], seconds: float) -> None:
    """A row per rule: ms of schuss and of the others, and the share of the copy's bandwidth."""
    print(f"\n### {title}, float32, ms per step\n")
    print(f"| rule | schuss | {' | '.join(LABELS)} | fastest other / schuss | of copy | schuss on the host |")
    print(f"|---|---:|{'---:|' * len(LABELS)}---:|---:|---:|")
    for name, settings in RULES.items():
        if only and name.split()[0] not in only:
            continue
        params = parameters(shapes, torch.float32)
        ours = getattr(optim, CLASSES.get(name, name.split()[0]))(params, **settings)
        ours.step()
        rivals = others(name, settings, params)
        copy = Copy(ours.plan().traffic_bytes)
        mine, *rest, limit = device_times([ours.step, *rivals.values(), copy], seconds)
        times = dict(zip(rivals, rest, strict=True))
        cells = [f"{times[label]:.3f}" if label in times else "-" for label in LABELS]
        cells.append(f"{min(times.values()) / mine:.2f}" if times else "-")
        print(
            f"| {name} | {mine:.3f} | {' | '.join(cells)} | {limit / mine:.2f} | {host_time(ours.step):.3f} |",
            flush=True,
        )
        del ours, rivals, copy, params
        free()


def storage_table(seconds: float) -> None:
    """AdamW with every storage and rounding."""
    title, shapes = next(iter(SETS.items()))
    print(f"\n### AdamW, {title}: storages, ms per step\n")
    print("| parameters, state | bytes moved per element | ms | float32 / this | of copy |")
    print("|---|---:|---:|---:|---:|")
    for label, (dtype, options) in STORAGES.items():
        base = optim.AdamW(parameters(shapes, torch.float32))
        ours = optim.AdamW(parameters(shapes, dtype), **options)
        ours.step()
        moved = ours.plan().traffic_bytes
        elements = sum(e.p.numel() for e in ours.plan().entries)
        mine, float32, limit = device_times([ours.step, base.step, Copy(moved)], seconds)
        cells = [f"{moved / elements:.1f}", f"{mine:.3f}", f"{float32 / mine:.2f}", f"{limit / mine:.2f}"]
        print(f"| {label} | {' | '.join(cells)} |", flush=True)
        del base, ours
        free()


def many_table(title: str, shapes: list[tuple[int, ...]], groups: int, seconds: float) -> None:
    """Many tensors, in many groups: the host decides."""
    print(f"\n### {title}, ms per step\n")
    print("| rule | schuss | on the host | torch fused | on the host | torch foreach | on the host |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in ("SGD momentum", "AdamW", "RMSprop", "NAdam"):
        settings = RULES[name]

        def grouped() -> list[dict[str, object]]:
            params = parameters(shapes, torch.float32)
            size = -(-len(params) // groups)
            return [{"params": params[i : i + size], "lr": 1e-3 * (1 + i)} for i in range(0, len(params), size)]

        ours = getattr(optim, name.split()[0])(grouped(), **settings)
        rivals = others(name, settings, grouped())  # type: ignore[arg-type]
        chosen = {"schuss": ours.step} | {label: rivals[label] for label in LABELS[:2] if label in rivals}
        times = dict(zip(chosen, device_times(list(chosen.values()), seconds), strict=True))
        cells = [
            f"{times[label]:.3f} | {host_time(chosen[label]):.3f}" if label in times else "- | -"
            for label in ("schuss", *LABELS[:2])
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def capture_table(seconds: float) -> None:
    """Steps inside a CUDA graph, which cost the host one launch."""
    print("\n### AdamW inside a CUDA graph, ms per replay\n")
    print("| tensors | schuss | torch, capturable foreach | torch, capturable fused |")
    print("|---|---:|---:|---:|")
    for title, shapes in (("GPT-2 small", gpt2()), ("1000 of 64", [(64,)] * 1000)):
        replays = []
        for cls, more in (
            (optim.AdamW, {}),
            (torch.optim.AdamW, {"foreach": True}),
            (torch.optim.AdamW, {"fused": True}),
        ):
            optimizer = cls(parameters(shapes, torch.float32), capturable=True, **more)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    optimizer.step()
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            replays.append((graph, optimizer))
        times = device_times([graph.replay for graph, _ in replays], seconds)
        print(f"| {title} | {' | '.join(f'{t:.3f}' for t in times)} |", flush=True)
        del replays
        free()


def machine_table(arch: str, only: list[str]) -> None:
    """Compile every rule's kernel, with state in float32 and in 8 bits, and look at the result."""
    from schuss import describe
    from schuss.engine import triton

    print(f"\n### Kernels for {arch}: 128-bit loads, 128-bit stores, registers per thread, bytes spilled\n")
    print("| rule | state float32 | | | | state int8 | | | |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, settings in RULES.items():
        if only and name.split()[0] not in only:
            continue
        cells = []
        for storage in ({}, {"state_dtype": "int8"}):
            try:
                made = describe.kernel(
                    getattr(optim, CLASSES.get(name, name.split()[0])), settings | storage, backend="triton"
                )
            except ValueError:  # a state that must be exact
                cells += ["-"] * 4
                continue
            machine = triton.compiled(made.label, made.source, made.layout, arch)
            wide = [len(re.findall(rf"{word}\.global(?:\.\w+)*\.v4\.\w?32", machine.ptx)) for word in ("ld", "st")]
            used = triton.resources(machine)
            cells += [*map(str, wide), str(used.registers), str(used.spilled_bytes)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def free() -> None:
    """Give the memory of what was deleted back."""
    gc.collect()
    torch.cuda.empty_cache()


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter measurements")
    parser.add_argument("--only", default="", help="classes, comma-separated")
    parser.add_argument("--tables", default="rules,storage,small,groups,capture")
    parser.add_argument("--ptx", metavar="ARCH", help="compile for this architecture, sm_90 say, and run nothing")
    arguments = parser.parse_args()
    if arguments.ptx:
        machine_table(arguments.ptx, [n for n in arguments.only.split(",") if n])
        return
    if not torch.cuda.is_available():
        parser.exit(1, "gpu.py: torch sees no CUDA device\n")
    torch.manual_seed(0)
    only = [n for n in arguments.only.split(",") if n]
    tables, seconds = arguments.tables.split(","), 0.3 if arguments.quick else 1.5
    triton = importlib.import_module("triton").__version__
    device, python = torch.cuda.get_device_name(), platform.python_version()
    print(f"{device}, torch {torch.__version__}, triton {triton}, Python {python}")
    if "rules" in tables:
        for title, shapes in SETS.items():
            rules_table(title, shapes, only, seconds)
    if "storage" in tables:
        storage_table(seconds)
    if "small" in tables:
        many_table("1000 tensors of 64", [(64,)] * 1000, 1, seconds)
    if "groups" in tables:
        many_table("465 groups of 2 tensors", [(128, 64), (128,)] * 465, 465, seconds)
    if "capture" in tables:
        capture_table(seconds)


if __name__ == "__main__":
    main()
