"""The README's code runs, and its table of attacks is the registry."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from cases import Net, classifier, images
from firstorder.attacks import registry
from firstorder.evaluation import documents, packaged
from firstorder.evaluation.runs.plan import plan
from firstorder.evaluation.runs.specification import specify

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_every_snippet_runs(model: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    x, y = images(), torch.arange(6)
    scope: dict[str, Any] = {"torch": torch, "model": model, "x": x, "y": y, "images": x, "labels": y}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scope |= {"classifier": classifier(model, optimizer=optimizer), "x_test": x.numpy(), "y_test": y.numpy()}
    scope["other"] = nn.Sequential(nn.Flatten(), nn.Linear(360, 10))
    snippets = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    assert len(snippets) == 13
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), scope)
    assert scope["result"].success.shape == (6,)
    assert scope["nearest"].norm.shape == (6,)
    assert scope["robust"] <= scope["clean"]
    assert all(p.grad is not None for p in model.parameters())
    assert not torch.equal(scope["Mine"](eps=0.05)(model, x, y), x)


def test_the_specification_is_one() -> None:
    """The README's, and the packaged one: each names what there is."""
    (text,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.S)
    given = yaml.safe_load(text)
    whole, _ = documents.read(packaged.ASSETS / "evaluation.yaml")
    for values, attacks in ((given, 3), (whole, 6)):
        chosen = plan(specify({**values, "count": 4}))
        assert len(chosen.cells) == 2 * attacks * 2
        assert chosen.examples.count == 4


def test_the_table_lists_the_registry() -> None:
    table = README.split("## The attacks")[1].split("## ")[0]
    listed = dict(re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", table, flags=re.M))
    assert listed == {name: cls.__name__ for name, cls in registry().attacks.items()}
