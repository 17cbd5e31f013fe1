"""Every test, the long ones too, in parts: `make test-long`.

A part is a file of tests, run in a process of its own, as many at once as there are processors. Parts that passed are
noted in build/test-long.json, so that a call which was interrupted goes on with the others; a part that failed runs
again. Another state of the sources, of the tests or of the installed packages begins anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

NOTES = Path("build") / "test-long.json"
FOLDERS = ("plugins", "adapters", "evaluation", "tests", "docs", ".github")
SETTINGS = (".toml", ".ini", ".txt", ".md", ".yaml", ".cff")


def state(root: Path) -> str:
    """A digest of what the outcome of the tests depends on."""
    files = [path for path in root.iterdir() if path.suffix in SETTINGS or path.name == "Makefile"]
    for folder in FOLDERS:
        files += [path for path in (root / folder).rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    whole = hashlib.sha256(sys.version.encode())
    for package in sorted(f"{one.name} {one.version}" for one in distributions()):
        whole.update(package.encode())
    for path in sorted(files):
        whole.update(f"{path.relative_to(root)} {hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return whole.hexdigest()


def notes(root: Path, now: str) -> dict[str, Any]:
    """What passed in this state, part by part, in seconds."""
    path = root / NOTES
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if found["state"] == now:
            return found
    return {"state": now, "passed": {}}


def run(root: Path, part: str, running: list[subprocess.Popen[str]]) -> tuple[int, str, float]:
    """The exit status of a part, what it wrote, and its seconds; its process is among `running` meanwhile."""
    began = time.monotonic()
    command = [sys.executable, "-m", "pytest", "-m", "", "-p", "no:cacheprovider", f"tests/{part}"]
    child = subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    running.append(child)
    text, _ = child.communicate()
    running.remove(child)
    return child.returncode, text, time.monotonic() - began


def main(root: Path) -> int:
    """Run what has not passed; the exit status."""
    known = notes(root, state(root))
    parts = sorted(path.name for path in (root / "tests").glob("test_*.py"))
    left = [part for part in parts if part not in known["passed"]]
    say(f"{len(parts)} parts, {len(parts) - len(left)} passed before")
    failed: list[str] = []
    running: list[subprocess.Popen[str]] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        under_way = {pool.submit(run, root, part, running): part for part in left}
        try:
            for future in as_completed(under_way):
                part, (status, text, seconds) = under_way[future], future.result()
                say(f"{'passed' if status == 0 else 'FAILED'} {part} ({seconds:.0f} s)")
                if status != 0:
                    failed.append(part)
                    say(text)
                    continue
                known["passed"][part] = round(seconds, 1)
                write(root / NOTES, json.dumps(known, indent=2) + "\n")
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(running):
                child.terminate()
            say("stopped; call again to go on")
            return 130
    if failed:
        say(f"failed: {', '.join(failed)}")
        return 1
    say(f"all {len(parts)} parts passed; to run them again, remove {NOTES}")
    return 0


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_suffix(".new")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(Path(__file__).resolve().parent.parent))
