"""Distributional attacks on a whole data set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from cases import Net, images, predicted
from firstorder.attacks import BIM, BLOBQG, DAABLOB, MIFGSM, PGD, Clipped, ClippedNG
from firstorder.evaluation.names import packaged
from firstorder.evaluation.studies import interaction
from firstorder.evaluation.studies.population import Merged, attack_data

EPS = 0.03


@pytest.fixture
def data(model: Net) -> TensorDataset:
    x = images(30)
    return TensorDataset(x, predicted(model, x))


def test_without_randomness_it_is_the_attack_itself(data: TensorDataset, model: Net) -> None:
    """Segments of I-FGSM add up to I-FGSM, whatever the batches and the last, shorter, segment."""
    attack = BIM(eps=EPS, steps=7, alpha=0.006)
    x, y = data.tensors
    expected = attack.run(model, x, y).success
    for every, batch_size in ((3, 7), (10, 30), (1, 11)):
        merged = attack_data(attack, model, data, every=every, batch_size=batch_size)
        assert torch.equal(merged.success, expected[None])
    assert 0 < expected.sum() < 30


def test_restarts_are_merged(data: TensorDataset, model: Net) -> None:
    attack = PGD(eps=0.06, steps=1, alpha=0.02)
    merged = attack_data(attack, model, data, restarts=4, seed=5)
    singles = [attack_data(attack, model, data, seed=5 + r).success[0] for r in range(4)]
    assert torch.equal(merged.success, torch.stack(singles))
    assert len({tuple(run.tolist()) for run in singles}) > 1
    assert merged.worst == pytest.approx(1 - float(merged.success.any(0).double().mean()))
    assert merged.average == pytest.approx(1 - float(merged.success.double().mean()))
    assert merged.worst < merged.average
    assert Merged(success=torch.tensor([[True, False], [False, False]])).worst == 0.5


def test_batches_are_reshuffled_between_segments(model: Net) -> None:
    """Every image carries its number; the model writes down who shares a batch."""
    x = images(12)
    x[:, 0, 0, 0] = torch.arange(12) / 100
    together: list[tuple[int, ...]] = []

    def forward(z: Tensor) -> Tensor:
        if len(z) == 4:
            together.append(tuple(sorted((100 * z[:, 0, 0, 0]).round().int().tolist())))
        return model(z)

    attack_data(BIM(eps=0.0001, steps=4), forward, TensorDataset(x, torch.zeros(12).long()), batch_size=4, every=2)
    first, second = together[:6:2], together[6::3]  # two gradients a batch, then two and a last look
    assert sorted(i for batch in first for i in batch) == list(range(12))
    assert set(first) != set(second)


def test_populations_interact_across_the_data_set(data: TensorDataset, model: Net) -> None:
    attack = DAABLOB(eps=EPS, steps=6, alpha=0.002, c=40)
    small, large = (attack_data(attack, model, data, batch_size=b, every=2).success for b in (2, 30))
    assert not torch.equal(small, large)


@pytest.mark.parametrize("attack", [MIFGSM(), ClippedNG(), PGD(direction=Clipped())])
def test_attacks_with_a_memory_are_refused(attack: Any, data: TensorDataset, model: Net) -> None:
    with pytest.raises(ValueError, match="take an attack without, such as DAABLOB"):
        attack_data(attack, model, data)


@pytest.mark.parametrize("attack", [PGD(restarts=2), PGD(early_stop=True)])
def test_what_belongs_to_a_single_batch_is_refused(attack: Any, data: TensorDataset, model: Net) -> None:
    with pytest.raises(ValueError, match="take restarts= here"):
        attack_data(attack, model, data)


def test_bad_counts_are_refused(data: TensorDataset, model: Net) -> None:
    for words in ({"every": 0}, {"batch_size": 0}, {"restarts": 0}):
        with pytest.raises(ValueError, match="=0 must be an integer"):
            attack_data(PGD(), model, data, **words)
    with pytest.raises(ValueError, match="examples=0"):
        attack_data(PGD(), model, TensorDataset(images(0), torch.arange(0)))


def test_any_data_set_is_streamed(model: Net) -> None:
    """Items are read when their batch is attacked and at no other time, so none is kept."""
    asked: list[int] = []

    class Lazy:
        def __len__(self) -> int:
            return 9

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            asked.append(index)
            return images(9)[index], index

    progress: list[int] = []
    attack_data(BLOBQG(eps=EPS, steps=4), model, Lazy(), batch_size=4, every=2, progress=progress.append)
    assert sorted(i for i in asked if i)[:2] == [1, 1]
    assert all(asked.count(i) == 2 for i in range(1, 9))
    assert progress == [4, 4, 1] * 2


def test_the_table(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from typer import Typer
    from typer.testing import CliRunner

    shown = packaged.mnist()
    monkeypatch.setattr(interaction, "images", lambda cls, root, count: (shown.x[:count], shown.y[:count]))
    app = Typer()
    app.command()(interaction.main)
    words = ["--data", str(tmp_path), "--count", "20", "--steps", "3", "--seeds", "2", "--out", str(tmp_path / "out")]
    done = CliRunner(env={"COLUMNS": "100"}).invoke(app, words)
    assert done.exit_code == 0, done.output
    rows = (tmp_path / "out" / "interaction.csv").read_text().splitlines()
    assert rows[0] == "data,attack,run,accuracy"
    assert len(rows) == 1 + 2 * 6 * 2
    assert {row.split(",")[1] for row in rows[1:]} == set(interaction.contenders(0.3, 0.01, 3))
