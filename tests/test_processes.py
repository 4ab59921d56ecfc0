"""Processes: the cache of generated code, forks, threads, signals, and the memory of a whole process."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import schuss
from schuss.engine import cache as code_cache

PRELUDE = """
import hashlib, json, os, random, signal, sys, threading, time
import torch
from schuss import optim

def parameters(sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    params = [torch.nn.Parameter(torch.randn(n, generator=generator)) for n in sizes]
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator)
    return params

def digest(params):
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in params)).hexdigest()

def train(sizes, steps=3, cls=optim.AdamW, seed=0):
    params = parameters(sizes, seed)
    optimizer = cls(params, lr=0.01)
    for _ in range(steps):
        optimizer.step()
    return digest(params)

SMALL, LARGE = [10, 1000, 7], [400_000, 1000]
"""


def start(script: str, cache: Path, **environment: str) -> subprocess.Popen[str]:
    """A Python process that runs PRELUDE and a script, with this cache folder."""
    path = [str(Path(schuss.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "SCHUSS_CACHE_DIR": str(cache), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result(process: subprocess.Popen[str]) -> Any:
    """What the process printed last, as JSON; it must end well, and within two minutes."""
    try:
        out, errors = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        process.kill()
        pytest.fail(f"hangs: {process.communicate()[1]}")
    assert process.returncode == 0, errors
    return json.loads(out.splitlines()[-1])


def run(script: str, cache: Path, **environment: str) -> Any:
    return result(start(script, cache, **environment))


@pytest.fixture(scope="module")
def expected() -> dict[str, str]:
    """What this process computes."""
    scope: dict[str, Any] = {}
    exec(PRELUDE, scope)
    train, torch = scope["train"], scope["torch"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {"small": train(scope["SMALL"]), "large": train(scope["LARGE"])}
    finally:
        torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """The files below a folder: when each was written, and what is in it."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def assert_whole(folder: Path, *labels: str) -> None:
    """The generated files are there, and each is the text that its name says, and no other file beside them."""
    files = [path for path in folder.iterdir() if path.name != "__pycache__"]
    for path in files:
        label, name = path.stem.split("_")
        assert path.suffix == ".py"
        assert label in labels
        assert hashlib.sha256(path.read_bytes()).hexdigest()[:16] == name
    assert len(files) == len(labels)


STEP = """
assert "numba" not in sys.modules  # it loads with the first step
small = train(SMALL)
from schuss.engine import numba
loops = numba.driver()
kernels = [m.kernel for name, m in sys.modules.items() if name.startswith("schuss.generated.adamw")]
print(json.dumps({
    "small": small,
    "large": train(LARGE),
    "kernel hits": [k.cache_hits for k in kernels],
    "misses": sum(sum(f.stats.cache_misses.values()) for f in vars(loops).values() if hasattr(f, "stats")),
}))
"""


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory, expected: dict[str, str]) -> Path:
    """A cache folder that one process has filled, starting cold."""
    folder = tmp_path_factory.mktemp("warm") / "made" / "by the first step"
    cold = run(STEP, folder)
    assert cold["kernel hits"] == [0]
    assert cold["misses"] > 3
    assert {size: cold[size] for size in expected} == expected
    assert_whole(folder, "adamw", "driver")
    return folder


# --- the cache folder -------------------------------------------------------------------------------------------------


def test_the_second_process_compiles_and_writes_nothing(warm: Path, expected: dict[str, str]) -> None:
    before = contents(warm)
    assert any(name.endswith(".nbc") for name in before)
    assert run(STEP, warm, PYTHONHASHSEED="7") == {**expected, "kernel hits": [1], "misses": 0}
    assert contents(warm) == before


def test_four_processes_that_start_at_once_share_an_empty_folder(tmp_path: Path, expected: dict[str, str]) -> None:
    folder = tmp_path / "cache"
    processes = [start(STEP, folder) for _ in range(4)]
    for process in processes:
        answer = result(process)
        assert {size: answer[size] for size in expected} == expected
    assert_whole(folder, "adamw", "driver")
    again = run(STEP, folder)
    assert again["kernel hits"] == [1]
    assert {size: again[size] for size in expected} == expected


def test_generated_files_that_are_damaged_are_repaired(warm: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    folder = tmp_path / "cache"
    shutil.copytree(warm, folder)
    sources = {path.name: path.read_bytes() for path in folder.glob("*.py")}
    for path in folder.glob("adamw*.py"):
        path.write_bytes(path.read_bytes()[:700])
    for path in folder.glob("driver*.py"):
        path.write_bytes(b"\xff\xfe garbage")
    answer = run(STEP, folder)
    assert {size: answer[size] for size in expected} == expected
    assert {path.name: path.read_bytes() for path in folder.glob("*.py")} == sources


def test_machine_code_that_is_damaged_is_compiled_anew(warm: Path, tmp_path: Path, expected: dict[str, str]) -> None:
    """A full disk or a power cut leaves files that are empty or end early."""
    folder = tmp_path / "cache"
    shutil.copytree(warm, folder)
    damaged = [*folder.rglob("driver*.nbi"), *folder.rglob("adamw*.nbc")]
    assert len(damaged) > 3
    for i, path in enumerate(damaged):
        path.write_bytes(path.read_bytes()[: 100 * (i % 2)])
    answer = run(STEP, folder)
    assert {size: answer[size] for size in expected} == expected


READ_ONLY = """
import tempfile
folder = os.environ["SCHUSS_CACHE_DIR"]
def refuse(real, mode):
    def call(path, *args, **kwargs):
        place = kwargs.get("dir", path)
        if str(place).startswith(folder) and (mode is None or mode(*args)):
            raise PermissionError(13, "Permission denied", str(place))
        return real(path, *args, **kwargs)
    return call
access = os.access
os.access = lambda path, mode, **k: not (str(path).startswith(folder) and mode & os.W_OK) and access(path, mode, **k)
writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT
os.open = refuse(os.open, lambda flags, *_: flags & writes)
os.mkdir = refuse(os.mkdir, None)
os.replace = refuse(os.replace, None)
tempfile._os.open = os.open
"""  # chmod does not stop root, so what a step calls to write is made to fail


def test_a_read_only_folder_is_left_alone_and_a_step_goes_well(
    warm: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    folder, other = tmp_path / "cache", tmp_path / "elsewhere"
    shutil.copytree(warm, folder)
    other.mkdir()
    before = contents(folder)
    answer = run(READ_ONLY + STEP, folder, TMPDIR=str(other))
    assert {size: answer[size] for size in expected} == expected
    assert contents(folder) == before


def test_a_path_that_is_a_file_is_replaced_by_a_temporary_folder(tmp_path: Path, expected: dict[str, str]) -> None:
    file, other = tmp_path / "file", tmp_path / "elsewhere"
    file.write_text("in the way")
    other.mkdir()
    answer = run(STEP, file / "below", TMPDIR=str(other))
    assert {size: answer[size] for size in expected} == expected
    assert file.read_text() == "in the way"
    [substitute] = other.glob("schuss-*")
    assert_whole(substitute, "adamw", "driver")


TEXT = "VALUE = 41 + 1\n"
NAME = f"answer_{hashlib.sha256(TEXT.encode()).hexdigest()[:16]}"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Path], Path]:
    """Loads TEXT as with this cache folder; returns the file that it came from. Substitutes go to tmp_path / "tmp"."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(code_cache, "_substitute", None)

    def loaded(folder: Path) -> Path:
        monkeypatch.setenv("SCHUSS_CACHE_DIR", str(folder))
        monkeypatch.delitem(sys.modules, f"schuss.generated.{NAME}", raising=False)
        module = code_cache.load("answer", TEXT)
        assert module.VALUE == 42
        assert module is code_cache.load("answer", TEXT)
        return Path(str(module.__file__))

    return loaded


def test_a_file_is_written_once_and_named_by_its_text(load: Callable[[Path], Path], tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    path = load(folder)
    assert path == folder / f"{NAME}.py"
    before = path.stat()
    assert load(folder) == path
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    assert [p.name for p in folder.iterdir() if p.name != "__pycache__"] == [f"{NAME}.py"]


@pytest.mark.parametrize(
    "content", [b"", TEXT.encode()[:-3], b"VALUE = 0\n", b"\xff\xfe\x00", b"raise SystemExit\n"],
    ids=["empty", "truncated", "another value", "not UTF-8", "raises"],
)  # fmt: skip
def test_another_text_under_the_right_name_is_replaced(
    content: bytes, load: Callable[[Path], Path], tmp_path: Path
) -> None:
    path = tmp_path / f"{NAME}.py"
    path.write_bytes(content)
    assert load(tmp_path) == path
    assert path.read_text() == TEXT


def a_file(place: Path) -> Path:
    place.write_text("in the way")
    return place


def a_name_taken_by_a_folder(place: Path) -> Path:
    (place / f"{NAME}.py").mkdir(parents=True)
    return place


@pytest.mark.parametrize(
    "make",
    [
        a_file,
        lambda place: a_file(place) / "below",
        lambda place: Path("/proc/schuss"),
        a_name_taken_by_a_folder,
        lambda place: place / ("long" * 100),
    ],
    ids=["is a file", "below a file", "in /proc", "name taken by a folder", "too long"],
)
def test_where_nothing_can_be_written_a_temporary_folder_takes_its_place(
    make: Callable[[Path], Path], load: Callable[[Path], Path], tmp_path: Path
) -> None:
    assert load(make(tmp_path / "cache")).parent.parent == tmp_path / "tmp"


def test_a_folder_that_has_become_read_only_is_not_used(
    load: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file could be read, but Numba could not keep machine code beside it."""
    folder = tmp_path / "cache"
    load(folder)
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder and access(path, mode))
    assert load(folder).parent.parent == tmp_path / "tmp"


def test_without_any_place_the_error_says_what_to_do(
    load: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "mkstemp", refuse)
    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(RuntimeError, match=r"No space left on device.*set SCHUSS_CACHE_DIR .* backend='foreach'"):
        load(tmp_path / "cache")
    assert f"schuss.generated.{NAME}" not in sys.modules


def test_an_interrupted_write_leaves_nothing(
    load: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupt)
        with pytest.raises(KeyboardInterrupt):
            load(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert load(tmp_path / "cache").parent == tmp_path / "cache"


# --- forks ------------------------------------------------------------------------------------------------------------

FORKS = """
import warnings
warnings.simplefilter("ignore")  # of forking with threads, which is what this is about

def in_child(work):
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(10)  # ends a child that hangs
        try:
            os.write(write, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(write)
    text = os.fdopen(read).read()
    status = os.waitpid(child, 0)[1]
    return json.loads(text) if status == 0 and text else f"the child ended with status {status}"

def from_scratch():
    torch.set_num_threads(1)  # torch's own parallel loops hang in a child; DataLoader's workers do the same
    return {"small": train(SMALL), "large": train(LARGE)}

def steps(optimizer, params):
    def work():
        for _ in range(2):
            optimizer.step()
        return digest(params)
    return work

torch.set_num_threads(2)
torch.randn(500, 500) @ torch.randn(500, 500)
untouched = parameters(LARGE)  # a step of SGD calls nothing of torch's that is parallel
first = lambda: steps(optim.SGD(untouched, lr=0.01), untouched)()
answers = {"first step of all": in_child(first), "from scratch": in_child(from_scratch)}
train(SMALL)
answers["after a small step"] = in_child(from_scratch)
train(LARGE)
answers["after a large step"] = in_child(from_scratch)
params = parameters(LARGE)
optimizer = optim.AdamW(params, lr=0.01)
optimizer.step()
answers["half way"] = in_child(steps(optimizer, params))
answers["half way, in a grandchild"] = in_child(lambda: in_child(steps(optimizer, params)))
answers["parent"] = [steps(optimizer, params)(), first()]
print(json.dumps(answers))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_forked_child_steps_to_the_same_bits(warm: Path, expected: dict[str, str]) -> None:
    answers = run(FORKS, warm)
    large, sgd = answers.pop("parent")
    assert large == expected["large"]
    assert answers == {
        "first step of all": sgd,
        "from scratch": expected,
        "after a small step": expected,
        "after a large step": expected,
        "half way": large,
        "half way, in a grandchild": large,
    }


LOADER = """
import warnings
warnings.simplefilter("ignore")

class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, i):
        return torch.full((100_000,), 0.001 * i)

def steps(workers):
    torch.manual_seed(0)
    model = torch.nn.Linear(100_000, 1)
    optimizer = optim.AdamW(model.parameters())
    model(torch.ones(1, 100_000)).sum().backward()
    optimizer.step()  # in parallel, before the workers are forked
    context = "fork" if workers else None
    loader = torch.utils.data.DataLoader(Numbers(), batch_size=8, num_workers=workers, multiprocessing_context=context)
    for epoch in range(2):
        for batch in loader:
            optimizer.zero_grad()
            (model(batch) ** 2).mean().backward()
            optimizer.step()
    return digest(model.parameters()), optimizer.state[model.weight]["step"].item()

torch.set_num_threads(2)
print(json.dumps([steps(0), steps(2)]))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_data_loader_with_forked_workers_goes_on_between_steps(warm: Path) -> None:
    alone, with_workers = run(LOADER, warm)
    assert with_workers == alone
    assert with_workers[1] == 17.0


# --- threads ----------------------------------------------------------------------------------------------------------

THREADS = """
torch.set_num_threads(2)
jobs = [([120_000, 1000, 3], optim.AdamW, 1), ([90_000, 70_000], optim.NAdam, 2)]
answers = {}

def work(key, sizes, cls, seed):
    answers[key] = train(sizes, 200, cls, seed)

threads = [threading.Thread(target=work, args=(i, *job)) for i, job in enumerate(jobs)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
alone = [train(sizes, 200, cls, seed) for sizes, cls, seed in jobs]
import numba
print(json.dumps({"at once": [answers.get(i) for i in range(2)], "alone": alone, "layer": numba.threading_layer()}))
"""


@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_two_threads_with_an_optimizer_each_step_to_the_same_bits(layer: str, warm: Path) -> None:
    answer = run(THREADS, warm, NUMBA_THREADING_LAYER=layer)
    assert answer["layer"] == layer
    assert answer["at once"] == answer["alone"]
    assert len(set(answer["alone"])) == 2


# --- signals ----------------------------------------------------------------------------------------------------------

INTERRUPTS = """
torch.set_num_threads(2)
armed = False

def on_alarm(*_):
    global armed
    if armed:
        armed = False
        signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGALRM, on_alarm)
params = [torch.nn.Parameter(torch.zeros(n)) for n in [100_000, *[5] * 50]]
params += [torch.nn.Parameter(torch.zeros(5, dtype=torch.float64)) for _ in range(10)]
grads = [torch.ones_like(p) for p in params]
# With these betas the step of each element is exactly lr, so a parameter counts its steps.
optimizer = optim.Adam(params, lr=2.0**-10, betas=(0.0, 0.0), eps=0.0)

def counts():
    found = []
    for p in params:
        values = (-p.detach() * 2.0**10).unique().tolist()
        found.append((values, float(optimizer.state[p]["step"]) if p in optimizer.state else 0.0))
    return found

choice, interrupts, wrong = random.Random(0), 0, []

def toggle():
    for i in choice.sample(range(len(params)), 5):
        params[i].grad = None if params[i].grad is not None else grads[i]

for p, g in zip(params, grads):
    p.grad = g
for _ in range(3):  # everything is compiled here
    optimizer.step()
    toggle()
end = time.monotonic() + 5
while interrupts < 200 and time.monotonic() < end and not wrong:
    try:
        signal.setitimer(signal.ITIMER_REAL, choice.uniform(1e-4, 4e-3), 1e-3)
        armed = True
        while True:
            toggle()
            optimizer.step()
    except BaseException:
        if armed:  # else the signal did it: NumPy turns a KeyboardInterrupt inside np.unique into a TypeError
            raise
        interrupts += 1
    wrong = [(values, step) for values, step in counts() if values != [step]][:3]
signal.setitimer(signal.ITIMER_REAL, 0)

before = counts()
for p, g in zip(params, grads):
    p.grad = g
for _ in range(3):
    optimizer.step()
gone_on = [b[1] + 3 == a[1] and a[0] == [a[1]] for b, a in zip(before, counts())]
most = max(step for _, step in before)
print(json.dumps({"interrupts": interrupts, "wrong": wrong, "gone on": all(gone_on), "most": most}))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no interval timer")
def test_control_c_again_and_again_leaves_whole_steps(warm: Path) -> None:
    """Parameters and `step` agree after each, and training goes on. test_engine tries every moment one by one."""
    answer = run(INTERRUPTS, warm)
    assert answer["wrong"] == []
    assert answer["gone on"]
    assert answer["interrupts"] >= 15
    assert answer["most"] >= 15


AT_THE_START = """
import numba  # an import that is broken off is Python's affair, and so is torch's

torch.optim.SGD([torch.nn.Parameter(torch.zeros(5))]).step()
params = [torch.nn.Parameter(torch.zeros(5)) for _ in range(20)]
for p in params:
    p.grad = torch.ones(5)
interrupted = False

def trace(frame, event, argument):
    global interrupted
    if not interrupted and event == "call" and frame.f_code.co_name == "stream_list":
        interrupted = True
        os.kill(os.getpid(), signal.SIGINT)

sys.settrace(trace)
try:
    optim.Adam(params).step()
    interrupted = False  # the signal must arrive, if late
except KeyboardInterrupt:
    pass
sys.settrace(None)
optimizer = optim.Adam(params, lr=0.5, betas=(0.0, 0.0), eps=0.0)
for _ in range(3):
    optimizer.step()
print(json.dumps([interrupted, torch.cat(params).unique().tolist()]))
"""


def test_control_c_while_machine_code_is_loaded_does_not_break_later_steps(warm: Path) -> None:
    """Numba's registries are generators: one that an exception has ended makes every later compilation fail."""
    assert run(AT_THE_START, warm) == [True, [-1.5]]


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
def peak():  # of this program alone: getrusage begins with what the parent had when it was forked
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith("VmHWM"))

train([20_000] * 20, steps=4)  # loads all that a step of many tensors calls, and starts the threads
params = [torch.nn.Parameter(torch.ones(1024, 1024)) for _ in range(8)]
ours, foreach = optim.AdamW(params), optim.AdamW(params, backend="foreach")
for p in params:
    p.grad = torch.ones(1024, 1024)
    state = {"step": torch.tensor(1.0), "exp_avg": torch.ones(1024, 1024), "exp_avg_sq": torch.ones(1024, 1024)}
    ours.state[p], foreach.state[p] = state, state

def growth(optimizer):
    before = peak()  # nothing of this size has been given back, so this is what is in use
    for _ in range(3):
        optimizer.step()
    return peak() - before

print(json.dumps({"ours": growth(ours), "with temporaries": growth(foreach)}))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a program's peak memory")
def test_the_process_does_not_grow_by_a_step(warm: Path) -> None:
    """Under 2 MB beside 128 MB of tensors, of 4 MB each: room for how coarsely systems count, not for a temporary."""
    answer = run(MEMORY, warm)
    assert answer["ours"] < 2_000_000
    assert answer["with temporaries"] > 4_000_000
