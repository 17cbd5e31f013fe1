"""`firstorder evaluate` on a GPU: the rows that the CPU gives, and batches that do not fit."""

# ruff: noqa: E402 - what is missing skips the file

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cuda_device import CUDA, DEVICE, needs_cuda, note

for needed in ("typer", "pydantic", "pandas", "pyarrow", "yaml"):
    pytest.importorskip(needed)

import cuda_models
import numpy as np
from typer.testing import CliRunner

import evaluate_models
from firstorder.evaluation.cli import app
from firstorder.evaluation.runs import work
from firstorder.evaluation.runs.store import Run, read

pytestmark = pytest.mark.cuda


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.savez("images.npz", **evaluate_models.arrays(23))
    work._worker.cache_clear()
    return tmp_path


def run(out: str, device: str, *words: str, code: int = 0, **given: Any) -> Run:
    """A run through the command line."""
    base = {"models": ["evaluate_models:linear"], "data": "images.npz", "eps": [0.08], "shard": 10, "prepare": False,
            "pictures": 0, "device": device}  # fmt: skip
    Path("spec.yaml").write_text(json.dumps({**base, **given}))
    call = ["evaluate", "spec.yaml", "--trust-code", "--out", out, "-q", *words]
    if words:  # workers outlive a command that does not end with its process
        paths = [str(Path(evaluate_models.__file__).parent), os.environ.get("PYTHONPATH", "")]
        process = subprocess.run(
            [sys.executable, "-m", "firstorder.evaluation", *call],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert process.returncode == code, process.stdout + process.stderr
    else:
        done = CliRunner().invoke(app, call)
        assert done.exit_code == code, done.output + repr(done.exception)
    return read(Path(out))


def test_rows_are_those_of_the_cpu(here: Path) -> None:
    pgd = {"attack": "pgd", "steps": 6, "early_stop": True, "random_start": False}  # whose draws are the device's own
    attacks = [pgd, {"attack": "mi-fgsm", "steps": 6}, "fgsm"]
    there, own = (run(device, device, attacks=attacks) for device in (DEVICE.type, "cpu"))
    assert there.facts["device"] == DEVICE.type
    found, expected = (one.table().sort_values(["attack", "example"]).reset_index() for one in (there, own))
    assert list(found.attack) == list(expected.attack)
    assert (found.success == expected.success).mean() > 0.98
    assert found.success.any()
    assert not found.success.all()
    for name in ("linf", "l2"):
        np.testing.assert_allclose(found[name], expected[name], rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_prepared_models_and_autoattacks_words(here: Path, precision: str) -> None:
    """The packaged MNIST network loses as many of 60 images as on the CPU, one more or less."""
    given: dict[str, Any] = {"models": ["mnist-cnn"], "data": "mnist", "count": 60, "eps": [0.3], "shard": 60}
    attacks = [{"attack": "pgd", "steps": 20, "early_stop": True}]
    there = run(DEVICE.type, DEVICE.type, attacks=attacks, prepare=True, precision=precision, **given)
    own = run("own", "cpu", attacks=attacks, **given)
    broken = [int(one.table().success.sum()) for one in (there, own)]
    assert abs(broken[0] - broken[1]) <= 1
    assert 0 < broken[0] < 60
    note(f"evaluate {precision}: {there.facts['models'][0]['preparation']}, {broken[0]} of 60 broken")


def test_draws_go_on_after_a_restart(here: Path) -> None:
    attacks = [{"attack": "pgd", "steps": 3, "random_start": True}]
    one = run("one", DEVICE.type, attacks=attacks, seeds=[0, 1])
    again = run("again", DEVICE.type, attacks=attacks, seeds=[0])
    again = run("again", DEVICE.type, attacks=attacks, seeds=[0, 1])
    tables = [found.table().sort_values(["seed", "example"]) for found in (one, again)]
    np.testing.assert_allclose(tables[0].l2, tables[1].l2, rtol=1e-5)
    first, second = (tables[0][tables[0].seed == seed].l2.to_numpy() for seed in (0, 1))
    assert not np.allclose(first, second)


def test_two_workers_share_the_device(here: Path) -> None:
    pytest.importorskip("joblib")
    attacks = [{"attack": "pgd", "steps": 3, "early_stop": False}]
    one = run("one", DEVICE.type, attacks=attacks)
    two = run("two", DEVICE.type, "--jobs", "2", attacks=attacks)
    tables = [found.table().sort_values("example") for found in (one, two)]
    np.testing.assert_allclose(tables[0].linf, tables[1].linf, atol=1e-5)


def test_two_workers_of_ray_take_half_a_device_each(here: Path) -> None:
    pytest.importorskip("ray")
    if not CUDA:
        pytest.skip("of CUDA alone")
    attacks = [{"attack": "pgd", "steps": 3}]
    found = run("two", DEVICE.type, "--engine", "ray", "--jobs", "2", "--gpus", "0.5", attacks=attacks)
    assert len(found.done()) == len(found.cells)


@needs_cuda
def test_batches_that_do_not_fit_are_halved(here: Path) -> None:
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    free = torch.cuda.memory_reserved() + cuda_models.LARGEST * cuda_models.BYTES + 2**26
    torch.cuda.set_per_process_memory_fraction(free / total)
    try:
        found = run(
            "out",
            DEVICE.type,
            models=["cuda_models:greedy"],
            attacks=[{"attack": "pgd", "steps": 2}],
            batch_size=20,
            shard=23,
        )
        with pytest.raises(torch.OutOfMemoryError):
            cuda_models.greedy().to(DEVICE)(torch.zeros(20, 1, 4, 4, device=DEVICE))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert not found.failures()
    assert len(found.table()) == 23
