"""The study of the verdict on published nets: what it reads, that it goes on, its table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer import Typer
from typer.testing import CliRunner

from firstorder.evaluation.runs.limits import Limit
from firstorder.evaluation.runs.store import read
from firstorder.evaluation.studies.published import limits, nets
from firstorder.evaluation.studies.verdict import AUTOATTACK, HEADER, lines, main

EPS = 0.05
HEAD = "net,spec,test_index,eps_pixels,verdict\n"
LIBRARY = """
import torch
from safetensors.torch import load_file


def load(path):
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    net.load_state_dict(load_file(path))
    return net.eval()
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A net, images of which it takes most for their labels, and what is known of two."""
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(1)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
    weights = {name: torch.randn(value.shape, generator=generator) for name, value in net.state_dict().items()}
    net.load_state_dict(weights)
    facts = {"data": "mnist", "norm": "linf", "eps": EPS}
    (tmp_path / "dir" / "verdicts").mkdir(parents=True)
    save_file(weights, "dir/mnist-balunovic2020-colt-0.1.safetensors", {"zoo": json.dumps(facts)})
    save_file(weights, "dir/cifar10-other.safetensors", {"zoo": json.dumps({**facts, "data": "cifar10"})})
    Path("dir/architectures.py").write_text(LIBRARY)
    x = torch.rand(40, 1, 4, 4, generator=generator)
    y = net(x).argmax(1)
    y[::9] = (y[::9] + 1) % 3
    np.savez("images.npz", x=x.numpy(), y=y.numpy())
    return tmp_path


def study(*words: str) -> str:
    app = Typer()
    app.command()(main)
    words = ("--models", "dir", "--mnist", "images.npz", "--count", "30", "--threads", "1", "--out", "out", *words)
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, words)
    assert done.exit_code == 0, done.output + repr(done.exception)
    return done.output


def test_the_table(folder: Path) -> None:
    """It goes on with other attacks; what the sets and means are is counted from the rows."""
    study("--attack", "Verdict 1", "--attack", "PGD-100 x 10")
    run = next(Path("out/runs").iterdir())
    first = read(run).table().drop(columns="seconds")
    assert all(line.missed is None for line in lines(read(run)))
    broken = first[(first.attack == "Verdict 1") & first.success & (first.clean_label == first.label)].example.tolist()
    robust = first[(first.attack == "Verdict 1") & ~first.success].example.tolist()
    known = [f"{robust[0]},{EPS},unsat", f"{broken[0]},{EPS},unsat"]
    Path("dir/verdicts/vnncomp2020-colt-mnist-0.1.csv").write_text("test_index,eps,verdict\n" + "\n".join(known))
    message = study("--attack", "Verdict 1", "--attack", "AutoAttack")
    assert f"error: {AUTOATTACK} on mnist-balunovic2020-colt-0.1 breaks examples that are proven robust" in message
    assert "error: Verdict 1 on" in message
    table = read(run).table().drop(columns="seconds")
    assert set(table.attack) == {AUTOATTACK, "Verdict 1", "PGD-100 x 10"}
    again = table[table.attack != AUTOATTACK].reset_index(drop=True)
    one, other = (frame.sort_values(["attack", "example"]).reset_index(drop=True) for frame in (first, again))
    assert one.equals(other)
    with Path("out/verdict.csv").open() as file:
        rows = {row["attack"]: row for row in csv.DictReader(file)}
    own = {name: part.set_index("example") for name, part in table.groupby("attack")}
    for name, row in rows.items():
        mine, best = own[name], own[AUTOATTACK]
        assert float(row["robust"]) == pytest.approx((~mine.success).mean(), rel=1e-5)
        assert int(row["only AutoAttack"]) == (best.success & ~mine.success).sum()
        assert int(row["only this"]) == (~best.success & mine.success).sum()
        assert float(row["forwards"]) == pytest.approx(mine.forwards.mean(), rel=1e-5)
        passes = [(part.forwards + part.backwards).sum() for part in (best, mine)]
        assert float(row["passes ratio"]) == pytest.approx(passes[0] / passes[1], rel=1e-5)
        assert float(row["proven"]) == pytest.approx(2 / 30, rel=1e-5)
    text = Path("out/verdict.md").read_text()
    assert text.startswith(f"| {' | '.join(HEADER)} |")
    assert "error: Verdict 1" in text
    assert Path("out/verdict.png").read_bytes().startswith(b"\x89PNG")


def test_images_by_their_place_in_the_test_set(folder: Path) -> None:
    y = np.load("images.npz")["y"]
    places = [31, 7, 12]
    Path("some.csv").write_text("set,position,test_index,label\n" + "".join(
        f"mnist_some,{i},{place},{y[place]}\n" for i, place in enumerate(places)))  # fmt: skip
    Path("dir/verdicts/vnncomp2020-colt-mnist-0.1.csv").write_text("test_index,eps,verdict\n7,0.1,unsat\n8,0.1,unsat\n")
    study("--attack", "Verdict 1", "--indices", "some.csv")
    run = read(next(Path("out/runs").iterdir()))
    assert run.table().label.tolist() == y[places].tolist()
    np.testing.assert_array_equal(run.examples(0, 3), np.load("images.npz")["x"][places])
    assert run.facts["limits"] == [[1, 0.1, True, False]]


def test_radii_are_those_of_the_specifications(tmp_path: Path) -> None:
    """Not the column beside it, which may be rounded up; unless the specification itself has three digits."""
    (tmp_path / "vnncomp2022-oval21.csv").write_text(
        f"{HEAD}cifar_base_kw.onnx,cifar_base_kw-img2578-eps0.021176470588235297.vnnlib,2578,0.021177,unsat\n"
        "cifar_wide_kw.onnx,cifar_wide_kw-img1909-eps0.0033986928104575162.vnnlib,1909,0.003399,sat\n"
    )
    (tmp_path / "vnncomp2021-cifar10-resnet.csv").write_text(
        f"{HEAD}resnet_2b.onnx,resnet2b_pgd_filtered/prop_0_eps_0.008.vnnlib,8661,0.007843,unknown\n"
    )
    assert limits(tmp_path) == {
        "cifar10-oval-base-kw": [Limit(2578, 0.021176470588235297, True, False)],
        "cifar10-oval-wide-kw": [Limit(1909, 0.0033986928104575162, False, True)],
        "cifar10-wang2021-resnet2b": [Limit(8661, 2 / 255, False, False)],
    }


def test_nets_by_name(folder: Path) -> None:
    assert [net.name for net in nets(Path("dir"))] == ["cifar10-other", "mnist-balunovic2020-colt-0.1"]
    with pytest.raises(ValueError, match="dir has no net tiny; choose mnist-cnn, fashion-cnn, cifar10-other, mnist-"):
        nets(Path("dir"), ["tiny"])
    assert [(net.name, net.path, net.eps) for net in nets(Path("dir"), ["fashion-cnn"])] == [("fashion-cnn", None, 0.2)]
    save_file({"a": torch.zeros(1)}, "dir/bare.safetensors")
    with pytest.raises(ValueError, match="do not name data, norm, eps; write them under zoo"):
        nets(Path("dir"), ["bare"])
