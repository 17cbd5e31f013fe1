"""AutoAttack(version="fast"): a verdict over a data set, resumed, counted, the same through every host."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import foolbox
import numpy as np
import pytest
import torch
from art.estimators.classification import PyTorchClassifier
from torch import Tensor, nn

import firstorder.art
import firstorder.foolbox
import firstorder.torchattacks
from firstorder.attacks import Batched, TorchModel, Verdict, VerdictResult
from firstorder.autoattack import AutoAttack, Record
from firstorder.evaluation.names import packaged
from firstorder.robustbench import benchmark
from test_autoattack import Few, Killed, few_images, few_steps, small

EPS = 0.32
"""A little beyond the radius of the model's training: some of 60 images break late, some not at all."""


@pytest.fixture(scope="module")
def mnist() -> tuple[nn.Module, Tensor, Tensor]:
    """A network and 40 images, three of them with a label that is not theirs."""
    images = packaged.mnist()
    y = images.y[:40].clone()
    y[::17] = (y[::17] + 1) % 10
    return packaged.mnist_cnn(), images.x[:40], y


def fast(model: Any, **words: Any) -> AutoAttack:
    """With few restarts, unless asked otherwise."""
    words = {"eps": EPS, "seed": 0, "version": "fast", "verbose": False, **words}
    if words["version"] == "fast":
        given = words.get("parameters", {}).get("verdict", {})
        words["parameters"] = {**words.get("parameters", {}), "verdict": {"restarts": 2, **given}}
    return AutoAttack(model, **words)


def recorded(adversary: AutoAttack, x: Tensor, y: Tensor, **words: Any) -> Record:
    adversary.run_standard_evaluation(x, y, **words)
    assert adversary.record is not None
    return adversary.record


def verdict(record: Record) -> VerdictResult:
    assert record.verdict is not None
    return record.verdict


def same(one: Record, other: Record) -> bool:
    """Whether two evaluations found the same, at the same price."""
    facts = ("broken_by", "run", "accuracy", "gradients", "forwards", "unverified", "audits")
    if any(getattr(one, name) != getattr(other, name) for name in facts):
        return False
    if not torch.equal(one.adversarial, other.adversarial):
        return False
    names = ("stage", "margin", "complete", "forwards", "gradients", "logits", "success", "adversarial")
    return all(torch.equal(getattr(verdict(one), n), getattr(verdict(other), n)) for n in names)


class Counting(nn.Module):
    """A model that counts the examples that went forwards, and back."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forwards = self.backwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.forwards += len(x)
        logits: Tensor = self.model(x)
        if logits.requires_grad:
            logits.register_hook(self.back)
        return logits

    def back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


def test_every_batch_is_explored_and_the_survivors_closed_once(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    """What the record says is what the attack finds when it is run step by step."""
    model, x, y = mnist
    record = recorded(fast(model), x, y, bs=14)
    attack, generator = Verdict(eps=EPS, population=True, restarts=2), torch.Generator().manual_seed(0)
    parts = [attack.explore(model, a, b, generator=generator) for a, b in zip(x.split(14), y.split(14), strict=True)]
    found = VerdictResult.joined(parts)
    left = (~found.success).nonzero()[:, 0]
    closed = attack.close(Batched(TorchModel(model), 14), x[left], y[left], found.take(left), generator=generator)
    assert closed.success.any(), "the closing stages matter"
    assert torch.equal(record.robust[left], ~closed.success)
    assert record.robust.sum() == (~closed.success).sum()
    kept = verdict(record)
    for name in ("stage", "margin", "logits", "complete", "forwards", "gradients"):
        expected = getattr(found, name).index_copy(0, left, getattr(closed, name))
        assert torch.equal(getattr(kept, name), expected)
    assert kept.stages == attack.plan().names
    assert torch.equal(kept.stage >= 0, ~record.robust)
    assert torch.equal(kept.margin < 0, ~record.robust)
    names = [kept.stages[i] if i >= 0 else None for i in kept.stage.tolist()]
    assert [name == "input" for name in names] == [by == "clean" for by in record.broken_by]
    assert len({*names} - {None, "input"}) >= 3
    with torch.no_grad():
        assert torch.equal(model(record.adversarial).argmax(1) == y, record.robust)
    assert torch.equal(record.adversarial[record.robust], x[record.robust])


def test_the_closing_stages_give_up_over_the_whole_data_set(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    """At a radius where little breaks: the 20 nearest of all, whatever their batch."""
    model, x, y = mnist
    record = recorded(fast(model, eps=0.15), x, y, bs=10)
    kept = verdict(record)
    closing = 1 + len(Verdict().plan().first)
    assert (kept.stage < closing).all(), "or more are attacked to the end"
    far = kept.margin[record.given_up]
    assert len(far) == int(record.robust.sum()) - 20
    assert far.min() >= kept.margin[record.robust & kept.complete].max()
    assert kept.gradients[record.given_up].max() < kept.gradients[record.robust & kept.complete].min()
    everyone = recorded(fast(model, eps=0.15, parameters={"verdict": {"population": False}}), x, y, bs=10)
    assert not everyone.given_up.any()
    spent = 20 + 10 + 2 * (5 + 10)
    assert everyone.gradients["verdict"] - record.gradients["verdict"] == spent * len(far)


@pytest.mark.parametrize("population", [False, True])
@pytest.mark.parametrize("effort", [0, 1])
def test_the_passes_are_those_of_the_model(
    population: bool, effort: int, mnist: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record's passes are the model's, for a function too; asking again what is reported is not among them."""
    model, x, y = mnist
    x, y, words = x[:24], y[:24], {"parameters": {"verdict": {"population": population}}, "effort": effort}
    counted = Counting(model).eval()
    besides = 0
    predict = AutoAttack._predict

    def apart(self: AutoAttack, *args: Any) -> Tensor:
        nonlocal besides
        before = counted.forwards
        labels = predict(self, *args)
        besides += counted.forwards - before
        return labels

    monkeypatch.setattr(AutoAttack, "_predict", apart)
    record = recorded(fast(counted, **words), x, y, bs=10)
    assert record.forwards == {"verdict": counted.forwards - besides - 1}  # one to know the number of classes
    assert record.gradients == {"verdict": counted.backwards}
    assert int(verdict(record).forwards.sum()) == record.forwards["verdict"]
    assert int(verdict(record).gradients.sum()) == record.gradients["verdict"]
    monkeypatch.setattr(AutoAttack, "_predict", predict)
    assert same(record, recorded(fast(lambda z: model(z), **words), x, y, bs=10))


@pytest.mark.parametrize("survived", [0, 2, 4])
def test_killed_and_resumed(
    survived: int, mnist: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    """Within a batch and within the closing stages: the rest is done, and the same is found."""
    model, x, y = mnist
    state = tmp_path / "state.json"
    expected = recorded(fast(model), x, y, bs=10)
    explore, close = Verdict.explore, Verdict.close
    calls: list[str] = []

    def killed(name: str, original: Any) -> Any:
        def call(self: Verdict, *args: Any, **options: Any) -> VerdictResult:
            result: VerdictResult = original(self, *args, **options)
            calls.append(name)
            if len(calls) > survived:
                raise Killed
            return result

        return call

    monkeypatch.setattr(Verdict, "explore", killed("explore", explore))
    monkeypatch.setattr(Verdict, "close", killed("close", close))
    with pytest.raises(Killed):
        recorded(fast(model), x, y, bs=10, state_path=state)
    assert len(list(tmp_path.glob("state.json.verdict/*.pt"))) == survived
    calls.clear()
    survived_before, survived = survived, 99
    resumed = recorded(fast(model), x, y, bs=10, state_path=state)
    assert calls == ["explore"] * (4 - survived_before) + ["close"]
    assert same(resumed, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.json.examples.pt"]
    calls.clear()
    again = recorded(fast(model), x, y, bs=10, state_path=state)
    assert not calls
    assert same(again, resumed)


def test_what_another_evaluation_left_is_cleared(
    tmp_path: Path, mnist: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose state was deleted, but not the folder of what its batches had found."""
    model, x, y = mnist
    state, close = tmp_path / "state.json", Verdict.close

    def killed(*args: Any, **options: Any) -> VerdictResult:
        raise Killed

    monkeypatch.setattr(Verdict, "close", killed)
    with pytest.raises(Killed):
        recorded(fast(model), x, y, bs=10, state_path=state)
    monkeypatch.setattr(Verdict, "close", close)
    for name in ("state.json", "state.json.examples.pt"):
        (tmp_path / name).unlink()
    assert (tmp_path / "state.json.verdict").exists()
    record = recorded(fast(model, eps=0.15), x, y, bs=10, state_path=state)
    assert same(record, recorded(fast(model, eps=0.15), x, y, bs=10))


def cut(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def edited(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    saved = torch.load(path, weights_only=True)
    change(saved)
    torch.save(saved, path)


def flipped(path: Path) -> None:
    """A bit of an image: 0.5 becomes 1.7e38, or the like."""
    edited(path, lambda saved: saved["adversarial"][1, 0].view(torch.int32)[14, 14].bitwise_xor_(1 << 30))


def shared(path: Path) -> None:
    """A number in the facts."""
    edited(path, lambda saved: saved.update(facts=saved["facts"].replace('"clean": ', '"clean": 0')))


def copied(path: Path) -> None:
    path.write_bytes(path.with_name("00003.pt").read_bytes())


def unsealed(path: Path) -> None:
    edited(path, lambda saved: saved.pop("sha256"))


DAMAGES = [flipped, *(partial(cut, share=share) for share in (0, 0.001, 0.5, 0.99))]


@pytest.mark.parametrize("damage", [*DAMAGES, copied])
def test_a_batch_that_is_damaged_is_computed_anew(
    damage: Callable[[Path], None], mnist: tuple[nn.Module, Tensor, Tensor], tmp_path: Path, monkeypatch: Any
) -> None:
    model, x, y = mnist
    state, explore, close = tmp_path / "state.json", Verdict.explore, Verdict.close
    calls: list[int] = []

    def killed(*args: Any, **options: Any) -> VerdictResult:
        raise Killed

    def counted(self: Verdict, *args: Any, **options: Any) -> VerdictResult:
        calls.append(1)
        return explore(self, *args, **options)

    monkeypatch.setattr(Verdict, "close", killed)
    with pytest.raises(Killed):
        recorded(fast(model), x, y, bs=10, state_path=state)
    damage(tmp_path / "state.json.verdict" / "00001.pt")
    monkeypatch.setattr(Verdict, "close", close)
    monkeypatch.setattr(Verdict, "explore", counted)
    with pytest.warns(UserWarning, match=r"00001\.pt is damaged; what it held is computed anew"):
        resumed = recorded(fast(model), x, y, bs=10, state_path=state)
    assert len(calls) == 1
    assert same(resumed, recorded(fast(model), x, y, bs=10))


def test_a_record_that_is_damaged_is_refused(mnist: tuple[nn.Module, Tensor, Tensor], tmp_path: Path) -> None:
    model, x, y = mnist
    state, path = tmp_path / "state.json", tmp_path / "state.json.examples.pt"
    expected = recorded(fast(model), x, y, bs=10, state_path=state)
    whole = path.read_bytes()
    unsealed(path)  # as an earlier version wrote it
    assert same(recorded(fast(model), x, y, bs=10, state_path=state), expected)
    torch.save({"another": torch.zeros(1)}, path)
    foreign = path.read_bytes()
    for damage in (*DAMAGES, shared, lambda path: path.write_bytes(foreign)):
        path.write_bytes(whole)
        damage(path)
        with pytest.raises(
            ValueError, match=r"state\.json is damaged; delete it and state\.json\.examples\.pt beside it"
        ):
            recorded(fast(model), x, y, bs=10, state_path=state)
    for one in (state, path):
        one.unlink()
    assert same(recorded(fast(model), x, y, bs=10, state_path=state), expected)


@pytest.mark.parametrize("population", [False, True])
def test_every_host_gives_the_same_verdicts(population: bool, mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    """For the same images in one batch, misclassified ones among them, and the same seed."""
    model, x, y = mnist
    expected = Verdict(eps=EPS, population=population, restarts=2).run(
        model, x, y, generator=torch.Generator().manual_seed(0)
    )
    estimator = PyTorchClassifier(model, nn.CrossEntropyLoss(), (1, 28, 28), 10, clip_values=(0, 1), device_type="cpu")
    options = {"population": population, "restarts": 2}
    words: dict[str, Any] = {"population": population, "seed": 0}
    fool = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    record = recorded(fast(model, parameters={"verdict": options}), x, y, bs=40)
    listed: dict[str, Any] = {"x": x, "y": y, "eps": EPS, "seed": 0, "batch_size": 40, "details": True}
    _, _, other = benchmark(model, attacks=["verdict"], parameters={"verdict": options}, **listed)
    by_art = firstorder.art.Verdict(estimator, eps=EPS, num_random_init=2, batch_size=40, verbose=False, **words)
    found = {
        "torchattacks": firstorder.torchattacks.Verdict(model, eps=EPS, restarts=2, **words)(x, y),
        "art": torch.from_numpy(by_art.generate(x.numpy(), y.numpy().astype(np.int64))),
        "foolbox": firstorder.foolbox.Verdict(restarts=2, **words)(fool, x, y, epsilons=EPS)[0],
        "autoattack": record.adversarial,
        "robustbench": other.adversarial,
    }
    with torch.no_grad():
        for host, adversarial in found.items():
            assert torch.equal(model(adversarial).argmax(1) != y, expected.success), host
            hits = expected.success
            assert torch.allclose(adversarial[hits], expected.adversarial[hits], rtol=0, atol=1e-6), host
    assert same(record, other)
    for name in ("stage", "complete", "gradients"):
        assert torch.equal(getattr(verdict(record), name), getattr(expected, name))
    assert 0 < expected.success.sum() < len(x)


def test_robustbench_closes_over_all_survivors(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    words: dict[str, Any] = {"x": x, "y": y, "eps": 0.15, "seed": 0, "batch_size": 10, "details": True}
    clean, robust, record = benchmark(model, attacks=["verdict"], parameters={"verdict": {"restarts": 2}}, **words)
    assert same(record, recorded(fast(model, eps=0.15), x, y, bs=10))
    assert record.given_up.any()
    assert (clean, robust) == (record.accuracy["clean"], record.accuracy["verdict"])


def test_after_other_attacks_a_verdict_gets_what_they_left(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist
    words: dict[str, Any] = {"version": None, "parameters": {"pgd": {"steps": 3}, "verdict": {"effort": 0}}}
    record = recorded(fast(model, attacks_to_run=["pgd", "verdict", "fgsm"], **words), x, y, bs=10)
    before = torch.tensor([by in ("clean", "pgd") for by in record.broken_by])
    kept = verdict(record)
    assert before.any()
    assert (kept.gradients[before] == 0).all()
    assert (kept.stage[before] == -1).all()
    assert kept.margin[before].isnan().all()
    assert kept.complete[before].all()
    assert (kept.gradients[~before] > 0).all()
    assert torch.equal(kept.stage >= 0, torch.tensor([by == "verdict" for by in record.broken_by]))
    assert record.run[:2] == ["pgd", "verdict"]
    assert not fast(model, version=None, attacks_to_run=["fgsm"]).parameters


def test_what_cannot_be_verified_is_not_broken(
    mnist: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does any stage claim it; it was attacked to the end, and not given up."""
    model, x, y = mnist
    x, y = x[:20], y[:20]
    expected = verdict(recorded(fast(model, effort=0), x, y))
    monkeypatch.setattr(AutoAttack, "_feasible", lambda self, adversarial, x: torch.zeros(len(x), dtype=torch.bool))
    record = recorded(fast(model, effort=0), x, y)
    assert set(record.broken_by) == {"clean", None}
    assert record.unverified["verdict"] == int((expected.stage >= 0).sum())
    assert torch.equal(verdict(record).stage, torch.where(expected.stage == 0, 0, -1))
    assert torch.equal(verdict(record).success, expected.stage == 0)
    assert torch.equal(record.given_up, ~expected.complete)
    assert torch.equal(record.adversarial, x)


@pytest.mark.parametrize("norm", ["Linf", "L2"])
@pytest.mark.parametrize("classes", [2, 3, 5])
def test_few_classes(classes: int, norm: str) -> None:
    model = Few(classes)
    x, y = few_images(model)
    adversary = few_steps(AutoAttack(model, norm, 0.01 if norm == "Linf" else 0.1, seed=0, version="fast", audit=3))
    few_steps(adversary.auditor)
    record = recorded(adversary, x, y, bs=5)
    assert record.accuracy["clean"] == 1 > record.accuracy["verdict"]
    assert verdict(record).logits.shape == (8, classes)
    assert len(record.audits) == record.run.count("audit") == bool(verdict(record).stage.min() < 0)


def test_efforts(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    """0 is cheaper than 1, and 1 than 2."""
    model, x, y = mnist
    x, y = x[:16], y[:16]
    records = [recorded(small(fast(model, effort=effort)), x, y) for effort in (0, 1, 2)]
    assert records[0].gradients["verdict"] < records[1].gradients["verdict"] < records[2].gradients["verdict"]
    assert [record.run for record in records] == [["verdict"]] * 3
    assert len(verdict(records[0]).stages) < len(verdict(records[1]).stages) < len(verdict(records[2]).stages)
    assert not (records[2].robust & ~records[1].robust).any()
    assert fast(model).attacks_to_run == ["verdict"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "effort": ({"effort": 3}, "effort=3"),
    "effort twice": ({"effort": 1, "parameters": {"verdict": {"effort": 1}}}, "effort=1 is among the parameters"),
    "effort of nothing": ({"effort": 1, "version": "standard"}, r"parameters\['verdict'\]: that attack is not run"),
    "audit": ({"audit": 0}, "audit=0"),
    "audit of nothing": ({"audit": 10, "version": "standard"}, "audit=10 is of what a verdict gives up"),
    "L1": ({"norm": "L1"}, "version='fast' has no attack for norm='L1'"),
    "a list": ({"attacks_to_run": ["pgd"]}, "no effect with version='fast'"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments(bad: str, mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    words, message = BAD[bad]
    with pytest.raises(ValueError, match=message):
        fast(mnist[0], **words)


def test_half_images_go_with_the_verdict_alone(mnist: tuple[nn.Module, Tensor, Tensor]) -> None:
    model, x, y = mnist

    def half(z: Tensor) -> Tensor:
        logits: Tensor = model(z.float())
        return logits

    x = x[:8].bfloat16()
    record = recorded(fast(half, effort=0), x, y[:8])
    assert record.adversarial.dtype == torch.bfloat16
    with pytest.raises(ValueError, match=r"the images are torch\.bfloat16"):
        fast(half, audit=3).run_standard_evaluation(x, y[:8])
