"""How well 8-bit codes hold the state of AdamW: closed-form code maps, linear absmax and the dynamic map.

    python benchmarks/state_maps.py [--quick] [--tables errors,training] [--threads N]

State is stored in blocks of 256 elements in memory order, each with its largest magnitude as a float32, and a value is
map(code) * magnitude. The first moment m has signed codes -127..127, the second moment v >= 0 has codes 0..255. Maps:

- x^k: (code / 127)^k and (code / 255)^k, to the nearest code; k = 1 is linear absmax.
- never 0: no positive value has code 0.
- falling: a code so small that the decay of m moves it by less than half a code is rounded down instead, or m would
  stay where it is long after its gradients have vanished.
- dithered: a code is rounded up with a probability that is the remainder.
- x(a + bx): linear near zero and quadratic above, one square root to encode.
- E octaves: the leading bits of the float32 number value + 2^-E; linear below 2^-E and logarithmic above.
- dynamic: a table, as in Dettmers et al., 8-bit Optimizers via Block-wise Quantization, arXiv 2110.02861.

Two models are trained: an MLP on scikit-learn's digits and a small causal transformer on the characters of Python's
help topics. A tensor of fewer than 4096 elements keeps float32 state. Tables, in Markdown:

- errors: ten times during a float32 training, the mean of these is printed. m error is mean |error| / rms, v error the
  mean relative error where v is not 0, and "to 0" the share of non-zero values that come back as 0. u error is the rms
  error of the update m / (sqrt(v) + eps), bias-corrected, over the rms of the update: "once" of the exact state stored
  and read, "followed" of a state that has seen the same gradients but was stored after every step. "v followed" is the
  10th to the 90th percentile of such a v over the exact one.
- training: state is stored after every step. Loss and accuracy on held-out data after the last step, with standard
  errors over seeds; "over float32" is the difference to float32 training from the same seed.
"""

import argparse
import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pydoc_data import topics

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

BLOCK = 256
SMALLEST = 4096  # a tensor with fewer elements keeps float32 state
BETAS = (0.9, 0.999)
EPS = 1e-8
TINY = torch.finfo(torch.float32).tiny

Store = Callable[[Tensor], Tensor]  # what comes back of values between -1 and 1


# Code maps


def coded(magnitude: Tensor, top: int, never_0: bool = False, dithered: bool = False) -> Tensor:
    """The code, a whole number from 0 to `top`, next to `magnitude` * `top`."""
    code = (top * magnitude + (torch.rand_like(magnitude) if dithered else 0.5)).trunc_()
    return torch.where(magnitude > 0, code.clamp_min(1), code) if never_0 else code


def root(x: Tensor, k: float) -> Tensor:
    """x^(1/k), with square roots where they do."""
    return x if k == 1 else root(x.sqrt(), k / 2) if k in (2, 4) else x.pow(1 / k)


def power(k: float, top: int, never_0: bool = False, dithered: bool = False) -> Store:
    """|x| = (code / top)^k."""
    return lambda y: (coded(root(y.abs(), k), top, never_0, dithered) / top).pow(k).copysign(y)


def falling_power(k: float, top: int, rise: float = 1.035) -> Store:
    """As `power`, rounded down where `rise` adds less than half a code: no code then survives `beta` < rise^-k."""

    def store(y: Tensor) -> Tensor:
        w = top * root(y.abs(), k)
        return (torch.minimum(w + 0.5, rise * w).trunc_() / top).pow(k).copysign(y)

    return store


def chords(k: int, top: int, rise: float = math.inf, never_0: bool = False) -> Store:
    """|x| = (code / top)^k, drawn as chords: the float32 bits of the code are those of x, shifted, and a constant."""
    shift = k.bit_length() - 1
    origin = int(torch.tensor(float(top)).view(torch.int32)) - (0x3F800000 >> shift)

    def store(y: Tensor) -> Tensor:
        w = ((y.abs().view(torch.int32) >> shift) + origin).view(torch.float32)
        code = torch.minimum(w + 0.5, rise * w).trunc_()
        code = torch.where(y != 0, code.clamp_min(1), code) if never_0 else code
        bits = (code.view(torch.int32).clamp_min(origin) - origin) << shift
        return bits.view(torch.float32).copysign(y)

    return store


def quadratic(a: float, top: int) -> Store:
    """|x| = t (a + (1 - a) t) with t = code / top."""
    b = 1 - a

    def store(y: Tensor) -> Tensor:
        t = coded(((a * a + 4 * b * y.abs()).sqrt() - a) / (2 * b), top) / top
        return (t * (a + b * t)).copysign(y)

    return store


def octaves(count: int, top: int, never_0: bool = False) -> Store:
    """|x| = f - 2^-count, rescaled; the leading bits of the float32 number f are those of 2^-count, plus the code."""
    low, steps = 2.0**-count, (top + 1) // count
    span = 1 - 0.5 / steps - low  # from code 0 to `top`
    shift = 24 - steps.bit_length()
    first = (127 - count) << 23

    def store(y: Tensor) -> Tensor:
        bits = (y.abs() * span + low).view(torch.int32) - first
        code = ((bits + (1 << (shift - 1))) >> shift).clamp_(max=top)
        code = torch.where(y != 0, code.clamp_min(1), code) if never_0 else code
        return (((code << shift) + first).view(torch.float32) - low).div_(span).copysign(y)

    return store


def table(values: Tensor) -> Store:
    """The value of a table that is nearest."""
    middles = (values[1:] + values[:-1]) / 2
    return lambda y: values[torch.bucketize(y, middles)]


def dynamic(signed: bool) -> Tensor:
    """The 256 values of the dynamic map: seven decades, each with twice the values of the decade below."""
    decades = []
    for e in range(7):
        count = 2 ** (6 - e if signed else 7 - e)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float64)
        decades.append((edges[1:] + edges[:-1]) / 2 * 10.0**-e)
    positive = torch.cat(decades)
    values = torch.cat([positive, -positive] if signed else [positive])
    return torch.cat([values, torch.tensor([0.0, 1.0])]).sort().values.float()


def exact(y: Tensor) -> Tensor:
    """Float32 state."""
    return y


def stored(x: Tensor, store: Store) -> Tensor:
    """What comes back of `x` when each block is stored divided by its largest magnitude."""
    if store is exact:
        return x.detach()
    flat = F.pad(x.detach().flatten(), (0, -x.numel() % BLOCK)).view(-1, BLOCK)
    scale = flat.abs().amax(dim=1, keepdim=True)
    return (store(flat / scale.clamp_min(TINY)) * scale).flatten()[: x.numel()].view_as(x)


SIGNED: dict[str, Store] = {
    "float32": exact,
    "linear": power(1, 127),
    "dynamic": table(dynamic(signed=True)),
    "x^1.5": power(1.5, 127),
    "x^2": power(2, 127),
    "x^2, falling": falling_power(2, 127),
    "x^2, dithered": power(2, 127, dithered=True),
    "x^2, chords": chords(2, 127),
    "x^2, chords, falling": chords(2, 127, rise=1.035),
    "x^3": power(3, 127),
    "x^4": power(4, 127),
    "x(1/4 + 3x/4)": quadratic(1 / 4, 127),
    "8 octaves": octaves(8, 127),
}
UNSIGNED: dict[str, Store] = {
    "float32": exact,
    "linear": power(1, 255),
    "dynamic": table(dynamic(signed=False)),
    "x^2": power(2, 255),
    "x^2, never 0": power(2, 255, never_0=True),
    "x^3": power(3, 255),
    "x^3, never 0": power(3, 255, never_0=True),
    "x^4": power(4, 255),
    "x^4, never 0": power(4, 255, never_0=True),
    "x^4, never 0, dithered": power(4, 255, never_0=True, dithered=True),
    "x^4, chords, never 0": chords(4, 255, never_0=True),
    "x^6": power(6, 255),
    "x^6, never 0": power(6, 255, never_0=True),
    "16 octaves": octaves(16, 255),
    "16 octaves, never 0": octaves(16, 255, never_0=True),
}
Pair = tuple[str, str]  # names of the maps of m and v
PAIRS: list[Pair] = [
    ("float32", "float32"),
    ("linear", "linear"),
    ("dynamic", "dynamic"),
    ("x^2", "x^2, never 0"),
    ("x^2, falling", "x^2, never 0"),
    ("x^2, falling", "x^4, never 0"),
    ("x^2, chords, falling", "x^4, chords, never 0"),
    ("x^4", "x^4, never 0"),
]


def check_maps() -> None:
    """Known figures of the dynamic map, and the errors of maps on normal numbers."""
    signed, unsigned = dynamic(signed=True), dynamic(signed=False)
    assert len(signed) == len(unsigned) == 256
    for value, known in (
        (signed.min(), -0.99297),
        (signed.max(), 1.0),
        (signed[signed > 0].min(), 5.5e-7),
        (signed.diff().max(), 0.0140625),
        (unsigned[unsigned > 0].min(), 3.25e-7),
    ):
        assert math.isclose(value, known, rel_tol=1e-4), (value, known)
    x = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    largest = x.view(-1, BLOCK).abs().amax(dim=1).mean().item()
    for name, known in (("dynamic", 0.00854), ("linear", largest / 127 / 4)):
        error = (stored(x, SIGNED[name]) - x).abs().mean().item()
        assert math.isclose(error, known, rel_tol=0.01), (name, error, known)


# Models


@dataclass(frozen=True)
class Task:
    """What to train, on which batches, for how long, and how to judge it."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[torch.Generator], tuple[Tensor, Tensor]]
    held_out: tuple[Tensor, Tensor]
    lr: float
    steps: int
    seeds: int


class Characters(nn.Module):
    """A causal transformer of two layers."""

    def __init__(self, vocabulary: int, context: int, d: int = 128) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, d)
        self.position = nn.Parameter(0.02 * torch.randn(context, d))
        layer = nn.TransformerEncoderLayer(d, 4, 4 * d, dropout=0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(d), enable_nested_tensor=False)
        self.head = nn.Linear(d, vocabulary)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(context))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x) + self.position, mask=self.mask, is_causal=True))


def digits(steps: int, seeds: int) -> Task:
    """An MLP on 1297 digits of 8x8 pixels, 500 held out."""
    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    x, y = torch.tensor(data.data, dtype=torch.float32)[order] / 8 - 1, torch.tensor(data.target)[order]

    def model() -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 256),
            nn.ReLU(),
            nn.Linear(256, 256),
            nn.ReLU(),
            nn.Linear(256, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )

    def batch(random: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(500, len(y), (64,), generator=random)
        return x[rows] + 0.5 * torch.randn(64, 64, generator=random), y[rows]

    return Task("digits", model, batch, (x[:500], y[:500]), 2e-3, steps, seeds)


def characters(steps: int, seeds: int, context: int = 64) -> Task:
    """A transformer on 440 000 characters of Python's help topics, the last twentieth held out."""
    text = "".join(topics.topics.values())
    code = {c: i for i, c in enumerate(sorted(set(text)))}
    data = torch.tensor([code[c] for c in text])
    end = len(data) * 19 // 20

    def windows(starts: Tensor) -> tuple[Tensor, Tensor]:
        rows = data[starts[:, None] + torch.arange(context + 1)]
        return rows[:, :-1], rows[:, 1:]

    def batch(random: torch.Generator) -> tuple[Tensor, Tensor]:
        return windows(torch.randint(end - context, (8,), generator=random))

    held_out = windows(torch.linspace(end, len(data) - context - 1, 128).long())
    return Task("characters", lambda: Characters(len(code), context), batch, held_out, 2e-3, steps, seeds)


AfterStep = Callable[[torch.optim.Optimizer], None]


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def train(task: Task, seed: int, after_step: AfterStep) -> nn.Module:
    """The model after `task.steps` steps of AdamW whose learning rate falls linearly to 0."""
    torch.manual_seed(seed)
    random = torch.Generator().manual_seed(seed)
    model = task.model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.lr, betas=BETAS, eps=EPS)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, task.steps)
    for _ in range(task.steps):
        optimizer.zero_grad()
        loss_of(model, *task.batch(random)).backward()
        optimizer.step()
        after_step(optimizer)
        schedule.step()
    return model


def large(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters whose state is stored in 8 bits."""
    return [p for group in optimizer.param_groups for p in group["params"] if p.numel() >= SMALLEST]


# Measurements


@dataclass
class State:
    """The moments of the large tensors after `step` steps."""

    m: list[Tensor]
    v: list[Tensor]
    step: int

    def follow(self, grads: list[Tensor]) -> "State":
        """After one more gradient."""
        m = [m.lerp(g, 1 - BETAS[0]) for m, g in zip(self.m, grads, strict=True)]
        v = [v.lerp(g * g, 1 - BETAS[1]) for v, g in zip(self.v, grads, strict=True)]
        return State(m, v, self.step + 1)

    def through(self, pair: Pair) -> "State":
        """What comes back when it is stored with this pair of maps."""
        m = [stored(m, SIGNED[pair[0]]) for m in self.m]
        v = [stored(v, UNSIGNED[pair[1]]) for v in self.v]
        return State(m, v, self.step)

    def update(self) -> Tensor:
        """The update of all elements, without learning rate and decay."""
        correct_m, correct_v = 1 - BETAS[0] ** self.step, 1 - BETAS[1] ** self.step
        pairs = zip(self.m, self.v, strict=True)
        return torch.cat([(m / correct_m / ((v / correct_v).sqrt() + EPS)).flatten() for m, v in pairs])


def state_of(optimizer: torch.optim.Optimizer) -> State:
    """The moments that the optimizer holds, not a copy."""
    states = [optimizer.state[p] for p in large(optimizer)]
    return State([s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], int(states[0]["step"]))


def joined(tensors: list[Tensor]) -> Tensor:
    """All elements in one tensor."""
    return torch.cat([t.flatten() for t in tensors])


def to_0(got: list[Tensor], true: list[Tensor]) -> float:
    """The share of the non-zero values that came back as 0."""
    a, b = joined(got), joined(true)
    return ((a == 0) & (b != 0)).sum().item() / max(b.count_nonzero().item(), 1)


def m_error(got: State, true: State) -> float:
    """Mean |error| / rms, the mean of all tensors."""
    errors = [(a - b).abs().mean() / b.square().mean().sqrt() for a, b in zip(got.m, true.m, strict=True)]
    return statistics.mean(e.item() for e in errors)


def v_ratio(got: State, true: State) -> Tensor:
    """Each v over the true one, where that is not 0."""
    a, b = joined(got.v), joined(true.v)
    return (a / b)[b != 0]


def u_error(got: State, true: State) -> float:
    """The rms error of the update over its rms."""
    u = true.update()
    return ((got.update() - u).square().mean() / u.square().mean()).sqrt().item()


class Errors:
    """Follows a float32 training with states that are stored after every step, and measures them now and then."""

    def __init__(self, every: int) -> None:
        alone = [(m, "float32") for m in SIGNED] + [("float32", v) for v in UNSIGNED]
        self.pairs = list(dict.fromkeys([*alone, *PAIRS]))
        self.every = every
        self.followers: dict[Pair, State] = {}
        self.rows: dict[Pair, list[list[float]]] = {pair: [] for pair in self.pairs}

    def __call__(self, optimizer: torch.optim.Optimizer) -> None:
        """After a step."""
        grads = [p.grad for p in large(optimizer) if p.grad is not None]
        true = state_of(optimizer)
        for pair in self.pairs:
            before = self.followers.get(pair) or State(*([torch.zeros_like(g) for g in grads] for _ in "mv"), step=0)
            self.followers[pair] = before.follow(grads).through(pair)
            if true.step % self.every == 0:
                self.rows[pair].append(self.measure(true.through(pair), self.followers[pair], true))

    @staticmethod
    def measure(once: State, followed: State, true: State) -> list[float]:
        """One value for each column of `errors_tables`."""
        m = [m_error(once, true), to_0(once.m, true.m)]
        v = [(v_ratio(once, true) - 1).abs().mean().item(), to_0(once.v, true.v)]
        limits = v_ratio(followed, true).quantile(torch.tensor([0.1, 0.9])).tolist()
        return [*m, *v, u_error(once, true), u_error(followed, true), *limits]

    def mean(self, pair: Pair) -> list[float]:
        """The means of the columns."""
        return [statistics.mean(column) for column in zip(*self.rows[pair], strict=True)]


def errors_tables(task: Task) -> None:
    """Errors of the maps of m, of those of v, and of pairs."""
    errors = Errors(max(task.steps // 10, 1))
    train(task, 0, errors)
    print(f"\n### {task.name}: m in 8 bits, v in float32\n")
    print("| map | m error | to 0 | u error, once | followed |")
    print("|---|---:|---:|---:|---:|")
    for name in list(SIGNED)[1:]:
        m, zero, _, _, once, followed, *_ = errors.mean((name, "float32"))
        print(f"| {name} | {m:.4f} | {zero:.2%} | {once:.4f} | {followed:.4f} |")
    print(f"\n### {task.name}: v in 8 bits, m in float32\n")
    print("| map | v error | to 0 | u error, once | followed | v followed |")
    print("|---|---:|---:|---:|---:|---:|")
    for name in list(UNSIGNED)[1:]:
        _, _, v, zero, once, followed, low, high = errors.mean(("float32", name))
        print(f"| {name} | {v:.3g} | {zero:.3%} | {once:.3g} | {followed:.3g} | {low:.2f} to {high:.2f} |")
    print(f"\n### {task.name}: both in 8 bits\n")
    print("| m | v | u error, once | followed |")
    print("|---|---|---:|---:|")
    for pair in PAIRS[1:]:
        once, followed = errors.mean(pair)[4:6]
        print(f"| {pair[0]} | {pair[1]} | {once:.3g} | {followed:.3g} |", flush=True)


def storing(pair: Pair) -> AfterStep:
    """Stores the state of the large tensors after a step."""

    def after_step(optimizer: torch.optim.Optimizer) -> None:
        true = state_of(optimizer)
        got = true.through(pair)
        for old, new in zip([*true.m, *true.v], [*got.m, *got.v], strict=True):
            old.copy_(new)

    return after_step


@torch.no_grad()
def judged(task: Task, model: nn.Module) -> tuple[float, float]:
    """Loss and accuracy on the held-out data."""
    x, y = task.held_out
    return loss_of(model, x, y).item(), (model(x).argmax(dim=-1) == y).float().mean().item()


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and standard error."""
    sample = torch.tensor(values, dtype=torch.float64)
    return f"{sample.mean():.{digits}f} ± {sample.std() / math.sqrt(len(values)):.{digits}f}"


def training_table(task: Task) -> None:
    """Final losses with state stored after every step."""
    print(f"\n### {task.name}: {task.steps} steps with stored state, {task.seeds} seeds\n")
    print("| m | v | loss | over float32 | accuracy, % |")
    print("|---|---|---:|---:|---:|")
    reference: list[float] = []
    for pair in PAIRS:
        results = [judged(task, train(task, seed, storing(pair))) for seed in range(task.seeds)]
        losses = [loss for loss, _ in results]
        reference = reference or losses
        more = [a - b for a, b in zip(losses, reference, strict=True)]
        accuracy = spread([100 * a for _, a in results], digits=2)
        print(f"| {pair[0]} | {pair[1]} | {spread(losses)} | {spread(more)} | {accuracy} |", flush=True)


def main() -> None:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="shorter trainings, fewer seeds")
    parser.add_argument("--tables", default="errors,training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tables = arguments.tables.split(",")
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {arguments.threads} threads")
    check_maps()
    tasks = [digits(60, 2), characters(20, 2)] if arguments.quick else [digits(400, 8), characters(250, 3)]
    for task in tasks:
        if "errors" in tables:
            errors_tables(task)
        if "training" in tables:
            training_table(task)


if __name__ == "__main__":
    main()
