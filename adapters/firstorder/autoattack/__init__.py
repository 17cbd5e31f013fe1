"""AutoAttack's interface with every registered attack among its attacks.

    from firstorder.autoattack import AutoAttack
    adversary = AutoAttack(model, eps=8/255, attacks_to_run=["pqgd", "apgd-ce", "apgd-t"], device="cpu")
    x_adv = adversary.run_standard_evaluation(x, y, bs=250)
    adversary.record.broken_by

It works over the original `autoattack` as well as over `pyautoattack`.
"""

from __future__ import annotations

from firstorder.attacks.distribution import pip_install

try:
    from firstorder.autoattack.attack import AutoAttack
    from firstorder.autoattack.record import Audit, Record
except ModuleNotFoundError as error:
    if error.name not in ("autoattack", "pyautoattack"):
        raise
    raise ModuleNotFoundError(
        f"firstorder.autoattack needs AutoAttack: {pip_install('robustbench')}", name=error.name
    ) from error

__all__ = ["Audit", "AutoAttack", "Record"]
