"""firstorder.transformers: classifiers from the hub's folders, and a Trainer with the gradients of a plain loop."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from firstorder.attacks import PGD
from firstorder.evaluation.names import packaged
from firstorder.training import AENGM, AWP, ENGM, TRADES, Objective, Vanilla, automatic

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from firstorder.transformers import ENGMTrainer, PixelClassifier, Pixels, classifier  # noqa: E402
from tiny_vit import MEAN, STD, folder, normalised, processor, vit  # noqa: E402

ATTACK = PGD(eps=0.05, alpha=0.03, steps=2, random_start=False)
STARTED = PGD(eps=0.05, alpha=0.03, steps=2, random_start=True)
CLIPPED = partial(ENGM, alpha=0.5)


def _loads() -> bool:
    try:
        transformers.utils.import_utils.check_torch_load_is_safe()
    except ValueError:
        return False
    return True


resumes = pytest.mark.skipif(not _loads(), reason="transformers resumes no checkpoint with torch 2.5")


class Images(Dataset[Any]):
    """24 CIFAR-10 images, normalised."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        images = packaged.cifar10()
        self.x, self.y = normalised(images.x[:24].to(dtype)), images.y[:24]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"pixel_values": self.x[index], "labels": self.y[index]}


class Recorded(ENGMTrainer):
    """Keeps the gradients after every backward, and does not shuffle."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.gradients: list[list[Tensor]] = []
        self.weights: list[Tensor] = []
        super().__init__(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        assert self.weighting is not None
        self.gradients.append([p.grad.clone() for p in self.model.parameters()])
        self.weights.append(self.weighting.weights)
        return loss

    def _get_train_sampler(self, *args: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def arguments(path: Path, **options: Any) -> Any:
    given: dict[str, Any] = {
        "output_dir": str(path), "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 0.1,
        "optim": "sgd", "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "report_to": [], "use_cpu": True,
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "seed": 3,
    }  # fmt: skip
    return transformers.TrainingArguments(**{**given, **options})


def trained(path: Path, *, kind: type[Recorded] = Recorded, resume: str | None = None, **options: Any) -> Any:
    own = {key: options.pop(key) for key in ("model", "method", "objective", "pixels") if key in options}
    images = processor() if "objective" in own and "pixels" not in own else None
    found = kind(
        model=own.pop("model", vit)().double(),
        args=arguments(path, **options),
        train_dataset=Images(),
        processing_class=images,
        **own,
    )
    found.train(resume_from_checkpoint=resume)
    return found


def loop(method: Any, objective: Objective | None = None, *, accumulate: int = 1, epochs: int = 1) -> Any:
    """The plain loop: what the Trainer must give."""
    model, data = vit().double(), Images()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    own = method(model)
    mean, std = (torch.tensor(values).double().reshape(3, 1, 1) for values in (MEAN, STD))  # float32, as buffers are
    gradients, weights = [], []

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Any:
            return model(pixel_values=(x - mean) / std).logits

    class Part:
        def scale(self, outputs: Tensor) -> Tensor:
            return outputs / accumulate

    torch.manual_seed(3)
    net = Net()
    for _ in range(epochs):
        for i in range(6):
            net.train()
            if i % accumulate == 0:
                optimizer.zero_grad()
            v, y = data.x[4 * i : 4 * i + 4], data.y[4 * i : 4 * i + 4]
            if objective is None:
                losses, used = F.cross_entropy(model(pixel_values=v).logits, y, reduction="none"), None
                weighting = own.backward(losses, used, scaler=Part())
            else:
                x = (v * std + mean).clamp(0, 1)
                used = objective.adversarial(net, x, y).requires_grad_(own.needs_inputs)
                with objective.perturbed(net, x, used, y):
                    weighting = own.backward(objective.losses(net, x, used, y), used, scaler=Part())
            gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
            weights.append(weighting.weights)
            if (i + 1) % accumulate == 0:
                optimizer.step()
    return model, gradients, weights


def convnext() -> Any:
    """Whose names in a checkpoint are those of its modules, as the Trainer's resumption needs."""
    torch.manual_seed(0)
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_labels": 10}
    return transformers.ConvNextForImageClassification(transformers.ConvNextConfig(**sizes))


def same(found: Any, expected: Any) -> bool:
    return len(found) == len(expected) and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


OBJECTIVES: dict[str, Objective | None] = {
    "natural": None,
    "vanilla": Vanilla(attack=ATTACK),
    "awp": AWP(base=Vanilla(attack=ATTACK), gamma=0.1),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_are_the_plain_loops(objective: str, accumulate: int, tmp_path: Path) -> None:
    chosen = OBJECTIVES[objective]
    found = trained(tmp_path, method=CLIPPED, objective=chosen, gradient_accumulation_steps=accumulate)
    model, gradients, weights = loop(CLIPPED, chosen, accumulate=accumulate)
    assert len(gradients) == 6
    assert any((one < 1).any() for one in weights)
    assert same(found.weights, weights)
    assert all(same(a, b) for a, b in zip(found.gradients, gradients, strict=True))
    assert same(list(found.model.parameters()), list(model.parameters()))


def test_methods_of_the_inputs(tmp_path: Path) -> None:
    method: Callable[[nn.Module], Any] = partial(AENGM, alpha=0.5, tau=2)
    found = trained(tmp_path, method=method, objective=Vanilla(attack=ATTACK))
    _, gradients, weights = loop(method, Vanilla(attack=ATTACK))
    assert all(same(a, b) for a, b in zip(found.gradients, gradients, strict=True))
    assert same(found.weights, weights)


def test_the_first_epoch_says_what_the_limit_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "LEAST", 1)
    objective, method = Vanilla(attack=ATTACK), partial(ENGM, alpha="auto", quantile=0.1)
    options = {"method": method, "objective": objective, "num_train_epochs": 2}
    found = trained(tmp_path, **options, gradient_accumulation_steps=2)
    model, gradients, weights = loop(partial(method, warmup=6), objective, accumulate=2, epochs=2)
    assert all(torch.equal(one, torch.ones_like(one)) for one in weights[:6])
    assert any((one < 1).any() for one in weights[6:])
    assert same(found.weights, weights)
    assert all(same(a, b) for a, b in zip(found.gradients, gradients, strict=True))
    assert same(list(found.model.parameters()), list(model.parameters()))


@pytest.mark.parametrize(
    ("options", "total"),
    [
        ({"num_train_epochs": 5}, 30),
        ({"num_train_epochs": 1.5}, 9),
        ({"num_train_epochs": 2, "gradient_accumulation_steps": 4}, 12),
        ({"max_steps": 3, "gradient_accumulation_steps": 4}, 10),
    ],
)
def test_a_training_that_ends_before_the_limit_is_refused(options: dict[str, Any], total: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"measures the first {total} backwards, and the training has {total}: noth"):
        trained(tmp_path, method=partial(ENGM, alpha="auto", warmup=total), **options)
    found = trained(tmp_path, method=partial(ENGM, alpha="auto", warmup=total - 1), **options)
    assert len(found.weights) == total
    assert found.weights[-1].min() < 1
    with pytest.raises(ValueError, match="nothing would be limited"):
        trained(tmp_path, method=partial(ENGM, alpha="auto"), **options)


def test_a_training_that_was_stopped_warns_that_nothing_was_limited(tmp_path: Path) -> None:
    class Stopped(Recorded):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.control.should_training_stop = True
            return super().training_step(*args, **kwargs)

    with pytest.warns(UserWarning, match='while alpha="auto" was still measuring: nothing was limited'):
        trained(tmp_path, kind=Stopped, method=partial(ENGM, alpha="auto"), num_train_epochs=20)


@resumes
def test_a_limit_that_is_being_measured_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(automatic, "LEAST", 1)
    method, objective = partial(ENGM, alpha="auto", quantile=0.5), Vanilla(attack=ATTACK)
    options = {"model": convnext, "method": method, "objective": objective, "num_train_epochs": 2}
    whole = trained(tmp_path / "run", **options, save_strategy="steps", save_steps=4)
    first = tmp_path / "run" / "checkpoint-4"
    kept = json.loads((first / "gradient_method.json").read_text())
    assert (kept["measured"], len(kept["norms"])) == (4, 16)
    again = trained(tmp_path / "again", resume=str(first), **options)
    assert any((one < 1).any() for one in whole.weights[6:])
    assert same(again.weights, whole.weights[4:])
    assert same(list(again.model.parameters()), list(whole.model.parameters()))


@resumes
def test_a_checkpoint_is_resumed(tmp_path: Path) -> None:
    method = partial(AENGM, alpha=0.5, tau=4)
    objective = Vanilla(attack=ATTACK)
    options = {
        "model": convnext,
        "method": method,
        "objective": objective,
        "num_train_epochs": 2,
        "save_strategy": "epoch",
    }
    whole = trained(tmp_path / "run", **options)
    first = tmp_path / "run" / "checkpoint-6"
    assert json.loads((first / "gradient_method.json").read_text())["batches"] == 6
    again = trained(tmp_path / "again", resume=str(first), **options)
    assert len(again.weights) == 6
    assert same(again.weights, whole.weights[6:])
    assert same(list(again.model.parameters()), list(whole.model.parameters()))


def test_the_reported_loss_is_the_trainers(tmp_path: Path) -> None:
    own = trained(tmp_path / "a", method="msgd", logging_strategy="epoch", gradient_accumulation_steps=2)
    plain = transformers.Trainer(
        model=vit().double(), train_dataset=Images(),
        args=arguments(tmp_path / "b", logging_strategy="epoch", gradient_accumulation_steps=2),
    )  # fmt: skip
    plain._get_train_sampler = lambda *_: torch.utils.data.SequentialSampler(plain.train_dataset)
    plain.train()
    assert own.state.log_history[0]["loss"] == pytest.approx(plain.state.log_history[0]["loss"], rel=1e-12)
    for a, b in zip(own.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_trades_starts_from_the_global_seed(tmp_path: Path) -> None:
    runs = [trained(tmp_path / str(i), method=CLIPPED, objective=TRADES(attack=STARTED)) for i in range(2)]
    assert same(runs[0].weights, runs[1].weights)


def test_sequences_by_an_own_loss(tmp_path: Path) -> None:
    class Squares(Recorded):
        def example_losses(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, None]:
            return model(pixel_values=inputs["pixel_values"]).logits.square().mean(1), None

    found = trained(tmp_path, kind=Squares, method="engm")
    model, data = vit().double(), Images()
    ENGM(model).backward(model(pixel_values=data.x[:4]).logits.square().mean(1))
    assert same(found.gradients[0], [p.grad for p in model.parameters()])


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="pass processing_class=the image processor, or pixels="):
        ENGMTrainer(model=vit(), args=arguments(tmp_path), train_dataset=Images(), objective=Vanilla(attack=ATTACK))
    with pytest.raises(ValueError, match="an objective has its own loss; set label_smoothing_factor=0"):
        trained(tmp_path, objective=Vanilla(attack=ATTACK), label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="override example_losses"):
        ENGMTrainer(model=vit(), args=arguments(tmp_path), compute_loss_func=lambda *_: 0)
    with pytest.raises(ValueError, match="unknown gradient method 'nothing'"):
        ENGMTrainer(model=vit(), args=arguments(tmp_path), method="nothing")

    class Unlabelled(Images):
        def __getitem__(self, index: int) -> dict[str, Tensor]:
            return {"pixel_values": self.x[index]}

    with pytest.raises(ValueError, match=r"the batch has no labels \(N,\)"):
        ENGMTrainer(model=vit().double(), args=arguments(tmp_path), train_dataset=Unlabelled()).train()


@pytest.mark.parametrize("wrong", [(0.1307, 0.3081), (0.0, 1 / 255), (0.5 - 1e-4, 0.5)])
def test_images_outside_their_bounds_are_refused(wrong: tuple[float, float], tmp_path: Path) -> None:
    class Wrong(Images):
        def __init__(self) -> None:
            super().__init__()
            images = packaged.cifar10().x[:24].double()
            images[:, :, 0, 0], images[:, :, 0, 1] = 0, 1
            self.x = (images - wrong[0]) / wrong[1]

    def train(mean: float, std: float, *, attacked: bool = True) -> None:
        objective = Vanilla(attack=ATTACK) if attacked else None
        pixels = Pixels(mean=(mean,) * 3, std=(std,) * 3)
        ENGMTrainer(
            vit().double(), arguments(tmp_path), train_dataset=Wrong(), objective=objective, pixels=pixels
        ).train()

    with pytest.raises(ValueError, match=r"span \[.*\], outside \[0, 1\], .* mean=\(0.5, .*; pass pixels=Pixels\("):
        train(0.5, 0.5)
    train(*wrong)
    train(0.5, 0.5, attacked=False)  # they are not attacked


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_rounding_of_a_normalisation_is_not_outside(dtype: torch.dtype, tmp_path: Path) -> None:
    own = ENGMTrainer(
        vit(), arguments(tmp_path), train_dataset=Images(), objective=Vanilla(attack=ATTACK),
        pixels=Pixels(mean=MEAN, std=STD),
    )  # fmt: skip
    images = (torch.arange(256) / 255).to(dtype).expand(1, 3, 1, 256)
    target = PixelClassifier(own.model, own.pixels)
    for values in (normalised(images), normalised(images.float()).to(dtype)):
        found = own._images(target.pixels(values))
        assert (found.amin(), found.amax()) >= (0, 0.99)
        assert found.amax() <= 1
        torch.testing.assert_close(found.double(), images.double(), rtol=0, atol=4 * torch.finfo(dtype).eps + 1e-6)


def test_a_classifier_from_a_folder(tmp_path: Path) -> None:
    found = classifier(folder(tmp_path / "vit"))
    x = packaged.cifar10().x[:4]
    expected = vit()(pixel_values=normalised(x)).logits
    torch.testing.assert_close(found(x), expected)
    values = processor()((255 * x).round().to(torch.uint8), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(found(x), vit()(pixel_values=values).logits, rtol=1e-3, atol=1e-4)
    larger = F.interpolate(x, size=(64, 48), mode="bilinear", align_corners=False)
    assert found(larger).shape == (4, 10)
    adversarial = PGD(eps=8 / 255, alpha=2 / 255, steps=2)(found, x, expected.argmax(1))
    assert (found(adversarial).argmax(1) != expected.argmax(1)).any()
    assert classifier(tmp_path / "vit", classes=4)(x).shape == (4, 4)


def test_pixels_of_processors() -> None:
    assert Pixels.of(processor()) == Pixels(mean=MEAN, std=STD, size=(32, 32))
    assert Pixels.of(transformers.ViTImageProcessor(do_normalize=False, do_resize=False)) == Pixels()
    crop = transformers.CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 24})
    assert Pixels.of(crop).size == (32, 24)
    crop.do_center_crop = False
    assert Pixels.of(crop).size == (40, 40)
    raw = transformers.ViTImageProcessor(do_rescale=False, image_mean=127.5, image_std=127.5)
    assert Pixels.of(raw).mean == (0.5,)
    assert Pixels.of(raw).std == (0.5,)


def test_code_of_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    path = folder(tmp_path / "vit")
    config = json.loads((path / "config.json").read_text())
    config["model_type"] = "stranger"
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForImageClassification": "own.Model"}
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises((ValueError, OSError)):
        classifier(path)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_does_not_run(tmp_path: Path) -> None:
    path = folder(tmp_path / "vit")
    (path / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> Any:
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only|unsupported"):
        classifier(path)
    assert not (tmp_path / "ran").exists()


def test_the_wrapper_has_no_weights_of_its_own() -> None:
    model = vit()
    wrapped = PixelClassifier(model, Pixels.of(processor()))
    assert {name.removeprefix("model.") for name in wrapped.state_dict()} == set(model.state_dict())
