"""ENGM in Lightning: a mixin whose training_step returns per-example losses.

    class Classifier(ENGMModule, LightningModule):  # of lightning.pytorch or of pytorch_lightning
        def training_step(self, batch, index):
            x, y = batch
            x_adv = PGD(eps=8 / 255, alpha=2 / 255, steps=10, random_start=True)(self, x, y)
            return F.cross_entropy(self(x_adv), y, reduction="none")  # was: F.cross_entropy(self(x_adv), y)

Optimisers, accumulation, clipping, mixed precision, processes, checkpoints and loggers stay Lightning's.
"""

from firstorder.lightning.module import ENGMModule

__all__ = ["ENGMModule"]
