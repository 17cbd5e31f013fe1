"""All that is to be done on a machine with a GPU, in less than nine minutes: `make cuda`.

python tests/cuda/all.py [--out FOLDER] [--data IMAGES] [--minutes 4] [--wheels FOLDER]

Set-up, tests/cuda, the bench table, and a training run where `--data` names images. It needs no installation and no
network: the tree's metadata is written to a temporary folder, and what is missing is taken from the wheels in a folder
or skipped by name. Results are written as they come, so that a run which is cut keeps what it has: summary.md,
setup.txt, tests.txt, device.md, device.csv, training.csv, training.md and log.txt. Without a GPU what can be checked
is, the pretended device included. `FIRSTORDER_TEST_DEVICE=cpu` tries this very script on the CPU, with small sizes.
"""

# ruff: noqa: T201 - a script prints

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata as installed
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

from metadata import write as write_metadata

LIMIT = 520.0
"""Seconds that all of it may take, so that the machine's ten minutes are never reached."""
START = 15.0
"""For a script to import what it needs and read its images."""
BENCH = 150.0
"""Of these, for the bench table."""
GRACE = 10.0
"""For pytest to say what failed, when its time is up."""

RESULTS = (
    "summary.md", "setup.txt", "tests.txt", "device.md", "device.csv", "training.csv", "training.md", "log.txt",
)  # fmt: skip

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ON_CPU = os.environ.get("FIRSTORDER_TEST_DEVICE") == "cpu"

NEEDED = ("torch", "torchvision", "numpy", "pytest", "hypothesis", "typer", "rich")
OPTIONAL = {
    "pandas": "evaluation", "pyarrow": "evaluation", "pydantic": "evaluation", "yaml": "evaluation",
    "joblib": "evaluation by two processes", "ray": "evaluation by Ray", "jinja2": "reports", "matplotlib": "reports",
    "safetensors": "packaged models, training", "lightning_fabric": "training", "timm": "its models",
    "torchattacks": "attacks and times through it", "art": "attacks and times through it",
    "foolbox": "attacks through it", "pytest_timeout": "the limit of a single test",
}  # fmt: skip
"""Modules, and what is skipped without them."""


def main() -> int:
    """The exit status: 0 unless something that could be checked is wrong."""
    parser = argparse.ArgumentParser(description="Tests, times and a training run on a GPU.")
    parser.add_argument("--out", default="", help="folder of the results: runs/cuda")
    parser.add_argument("--data", default="", help="CIFAR-10 as `firstorder train --data` takes it")
    parser.add_argument("--minutes", default="", help="of the training run: 4, at most 6")
    parser.add_argument("--wheels", default="", help="folder with wheels of what is not installed")
    given = parser.parse_args()
    try:
        minutes = min(max(float(given.minutes or 4), 0.0), 6.0)
    except ValueError:
        parser.error(f"MINUTES={given.minutes} is no number")
    if given.wheels and not list(Path(given.wheels).glob("*.whl")):
        parser.error(f"CUDA_WHEELS={given.wheels} holds no wheel")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="firstorder-cuda-") as folder:
        return Session(Path(folder), Path(given.out or ROOT / "runs" / "cuda")).run(given.data, minutes, given.wheels)


class Session:
    """One run of everything.

    Args:
        scratch: for what is not kept.
        out: of the results.
    """

    def __init__(self, scratch: Path, out: Path) -> None:
        self.scratch, self.out = scratch, out
        self.began = time.monotonic()
        self.lines: list[str] = []
        self.failed = False
        out.mkdir(parents=True, exist_ok=True)
        for old in RESULTS:
            (out / old).unlink(missing_ok=True)

    @property
    def left(self) -> float:
        return LIMIT - (time.monotonic() - self.began)

    def say(self, line: str, *, failed: bool = False) -> None:
        """A line of the summary, which is written anew."""
        print(line, flush=True)
        self.lines.append(f"- {line}")
        self.failed |= failed
        replace(self.out / "summary.md", "\n".join(self.lines) + "\n")

    def run(self, data: str, minutes: float, wheels: str) -> int:
        if not self.set_up(wheels):
            return 1
        if not (ON_CPU or self.cuda()):
            self.pretend()
            return int(self.failed)
        if data and (refused := self.python("-c", READ, data)).returncode:
            self.say(f"DATA={data}: {refused.stderr.splitlines()[-1]}", failed=True)
            return 1
        minutes = minutes if data else 0.0
        self.tests(self.left - 60 * minutes - BENCH - GRACE)
        sizes = ["--batch-size", "8", "--steps", "2", "--rounds", "1"] if ON_CPU else []
        bench = ["-m", "firstorder.evaluation", "bench", "--device", "cpu" if ON_CPU else "cuda", "--out", self.out]
        self.stage("bench", [*bench, *sizes], min(BENCH, self.left), "device.md")
        if not data:
            self.say("training: skipped, as DATA= names no images")
        elif find_spec("lightning_fabric") is None:
            self.say("training: skipped, as lightning_fabric is missing")
        else:
            seconds = min(60 * minutes, self.left)
            script = [
                HERE / "robust_training.py",
                "--data",
                data,
                "--seconds",
                f"{max(seconds - START, 1):.0f}",
                "--out",
                self.out,
            ]
            self.stage("training", script, seconds, "training.md")
        self.say(f"all: {time.monotonic() - self.began:.0f} s; results in {self.out}")
        return int(self.failed)

    def set_up(self, wheels: str) -> bool:
        """Entry points, wheels, versions; whether the rest can run."""
        paths = [self.scratch / "metadata", *(ROOT / name for name in ("plugins", "adapters", "evaluation"))]
        write_metadata(paths[0])
        if wheels:
            paths.append(unpacked(Path(wheels), self.scratch / "wheels"))
            sys.path.append(str(paths[-1]))
        self.environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        lines = [f"Python {sys.version.split()[0]}", *(f"{name} {known(name)}" for name in (*NEEDED, *OPTIONAL))]
        done = self.python("-c", CHECK)
        lines += done.stdout.splitlines() or done.stderr.splitlines()[-1:]
        replace(self.out / "setup.txt", "\n".join(lines) + "\n")
        missing = [name for name in NEEDED if find_spec(name) is None]
        if missing or done.returncode:
            reason = f"missing {', '.join(missing)}" if missing else lines[-1]
            self.say(f"set-up: failed, {reason}", failed=True)
            return False
        self.say(f"set-up: {done.stdout.splitlines()[0]}")
        absent = [f"{name} ({what})" for name, what in OPTIONAL.items() if find_spec(name) is None]
        if absent:
            self.say(f"missing, so skipped: {', '.join(absent)}")
        return True

    def cuda(self) -> bool:
        done = self.python("-c", "import torch; print(torch.cuda.is_available())")
        return done.stdout.strip() == "True"

    def pretend(self) -> None:
        """What can be checked without a GPU."""
        words = "everything_is_on_the_device or planted or never_waits or early_stopping or prepared or ensembles"
        code, text = self.pytest([ROOT / "tests" / "test_devices.py"], self.left, "-m", "not long", "-k", words)
        self.say(
            f"no CUDA device: checked the imports, the registry and the pretended device ({text})", failed=bool(code)
        )

    def tests(self, seconds: float) -> None:
        parts = min(max((os.cpu_count() or 1) // 2, 1), 8)
        code, text = self.pytest(sorted(HERE.glob("test_*.py")), seconds, "-m", "cuda", parts=parts)
        self.say(f"tests/cuda: {text}", failed=bool(code))

    def pytest(self, files: Sequence[Path], seconds: float, *words: str, parts: int = 1) -> tuple[int, str]:
        """Test files, in so many processes with a part of the tests each; the exit status, and what was counted."""
        call = ["-m", "pytest", "-q", "-rfEs", "--tb=short", "-p", "no:cacheprovider", "-o", "addopts=", *words, *files]
        outputs = [self.scratch / f"tests-{part}.txt" for part in range(parts)]
        end, cut = time.monotonic() + seconds, False
        with ended({}) as running:
            for part, path in enumerate(outputs):
                with path.open("wb") as output:
                    running[path] = self.start(call, output, FIRSTORDER_PART=f"{part}/{parts}")
            while time.monotonic() < end + GRACE:
                codes = [process.poll() for process in running.values()]
                texts = [path.read_text(errors="replace") for path in outputs]
                replace(self.out / "tests.txt", "\n".join(texts))
                if None not in codes:
                    break
                if time.monotonic() > end and not cut:
                    cut = True
                    for process in running.values():
                        process.send_signal(signal.SIGINT)  # pytest then says what failed so far
                time.sleep(0.5)
        lines = [text.strip().splitlines()[-1].strip("= ") for text in texts if text.strip()]
        total = ", ".join(f"{n} {word}" for word in COUNTED if (n := counted(lines, word))) or "; ".join(lines)
        failed = cut or any(code not in (0, 5) for code in codes)  # 5: no test is left in this part
        return int(failed), total + (f", cut after {seconds:.0f} s" if cut else "")

    def stage(self, name: str, call: Sequence[object], seconds: float, shown: str) -> None:
        """A script of its own, whose table is part of the summary."""
        began = time.monotonic()
        with (self.out / "log.txt").open("ab") as log, ended({}) as running:
            running[Path(name)] = process = self.start(call, log)
            try:
                code = process.wait(max(seconds, 1))
                text = (
                    f"{time.monotonic() - began:.0f} s" if not code else f"failed, the end of log.txt says why ({code})"
                )
            except subprocess.TimeoutExpired:
                code, text = 1, f"cut after {seconds:.0f} s"
        self.say(f"{name}: {text}", failed=bool(code))
        if (self.out / shown).exists():
            table = (self.out / shown).read_text()
            print(table, flush=True)
            self.lines.append(f"\n{table}")

    def start(self, call: Sequence[object], output: Any, **more: str) -> subprocess.Popen[bytes]:
        words, environment = [sys.executable, *map(str, call)], {**self.environment, **more}
        return subprocess.Popen(
            words, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=interruptible,
        )  # fmt: skip

    def python(self, *words: str) -> subprocess.CompletedProcess[str]:
        call = [sys.executable, *words]
        return subprocess.run(call, cwd=ROOT, env=self.environment, capture_output=True, text=True, check=False)


def interruptible() -> None:
    """End by SIGINT, which what a shell started in its background ignores."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


CHECK = """
import torch
from firstorder.attacks import registry, rules
from firstorder.training import METHODS
found, name = registry(), torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
counts = f"{len(found.classes)} attacks, {len(rules().classes)} rules, {len(METHODS)} methods registered"
print(f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {counts}")
for entry, reason in found.failures.items():
    print(f"{entry} cannot be used: {reason}")
if found.failures or not (found.classes and rules().classes and METHODS):
    print("the registry is empty or damaged")
    raise SystemExit(3)
"""

READ = "import sys; from firstorder.evaluation.names import data; next(data.stream(sys.argv[1], train=True).parts)"

COUNTED = ("failed", "errors", "passed", "skipped")


def counted(lines: Sequence[str], word: str) -> int:
    """The sum of the numbers before a word in the last lines of pytest."""
    words = [line.replace(",", "").replace("error ", "errors ").split() for line in lines]
    pairs = [pair for line in words for pair in pairwise(line)]
    return sum(int(n) for n, said in pairs if said == word and n.isdigit())


def known(name: str) -> str:
    """The version of a module's distribution, as far as it has one."""
    if find_spec(name) is None:
        return "missing"
    names = {"yaml": "PyYAML", "art": "adversarial-robustness-toolbox", "lightning_fabric": "lightning"}
    with suppress(installed.PackageNotFoundError):
        return installed.version(names.get(name, name))
    return "found"


def unpacked(wheels: Path, folder: Path) -> Path:
    """The folder with the contents of those wheels that are not installed."""
    for wheel in sorted(wheels.glob("*.whl")):
        with suppress(installed.PackageNotFoundError):
            installed.version(wheel.name.partition("-")[0])
            continue
        with zipfile.ZipFile(wheel) as file:
            file.extractall(folder)
    return folder


def replace(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


@contextmanager
def ended(running: dict[Path, subprocess.Popen[bytes]]) -> Iterator[dict[Path, subprocess.Popen[bytes]]]:
    """A context that leaves none of these processes behind, nor what they started."""
    try:
        yield running
    finally:
        for process in running.values():
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


if __name__ == "__main__":
    sys.exit(main())
