"""Hugging Face's image classifiers, attacked and trained: pixels in [0, 1] in, logits out; ENGM in their Trainer.

    model = classifier("FOLDER")  # a checkpoint with its processor's size, mean and std
    adv = PGD(eps=8 / 255, alpha=2 / 255, steps=10)(model, x, y)

    trainer = ENGMTrainer(
        model=vit,
        processing_class=processor,
        objective=Vanilla(attack=PGD(eps=8 / 255, alpha=2 / 255, steps=10, random_start=True)),
        args=TrainingArguments(...),
        train_dataset=images,
    )
    trainer.train()

Without an objective the trainer trains on the examples as they are.
"""

from __future__ import annotations

from firstorder.attacks.distribution import pip_install

try:
    from firstorder.transformers.classifiers import PixelClassifier, Pixels, classifier
    from firstorder.transformers.trainer import ENGMTrainer
except ModuleNotFoundError as error:
    if error.name not in ("transformers", "accelerate"):
        raise
    raise ModuleNotFoundError(
        f"firstorder.transformers needs transformers: {pip_install('transformers')}", name=error.name
    ) from error

__all__ = ["ENGMTrainer", "PixelClassifier", "Pixels", "classifier"]
