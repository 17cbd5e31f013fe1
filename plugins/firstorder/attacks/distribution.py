"""The name under which this package is installed, and what follows from it.

The import is `firstorder`; the distribution is `firstorder-attacks`, since the package index takes `firstorder` for the
existing `first-order`. Results call the package firstorder.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION = "firstorder-attacks"

EXTRAS = {
    "report": ("jinja2", "matplotlib", "numpy", "PIL", "rich", "safetensors", "torchvision", "typer"),
    "evaluate": ("joblib", "pandas", "pyarrow", "pydantic", "yaml"),
    "ray": ("ray",),
    "train": ("lightning_fabric", "tensorboard"),
    "lightning": ("pytorch_lightning",),
    "transformers": ("accelerate", "transformers"),
    "onnx": ("onnx", "onnx2torch"),
    "art": ("art",),
    "torchattacks": ("torchattacks",),
    "robustbench": ("autoattack", "pyautoattack", "robustbench"),
    "imagenet": ("efficientnet_lite_pytorch",),
    "keras": ("h5py",),
}
"""The modules that each extra brings; an extra may include those before it."""


def extra_of(module: str) -> str:
    """The extra that brings a module, by its top-level name; "all" for one that none is known to bring."""
    return next((extra for extra, modules in EXTRAS.items() if module.partition(".")[0] in modules), "all")


def pip_install(extra: str) -> str:
    """The command that installs this package with an extra: what messages about a missing package name."""
    return f'pip install "{DISTRIBUTION}[{extra}]"'


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The version of firstorder, and those of `packages` that are installed, by name: what results record.

    Raises:
        PackageNotFoundError: firstorder itself is not installed, so that no attack is registered either.
    """
    found = {"firstorder": version(DISTRIBUTION)}
    for name in packages:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
