"""RobustBench, working from published packages, with any registered attack in its benchmark.

    from firstorder.robustbench import benchmark, load_model
    model = load_model("Wong2020Fast", threat_model="Linf")
    clean, robust = benchmark(model, eps=8/255, attacks=["pqgd", "autoattack"])

Importing this makes `import robustbench` work where only pyautoattack is installed.
"""

from __future__ import annotations

from firstorder.attacks.distribution import pip_install
from firstorder.robustbench.compat import provide_autoattack

provide_autoattack()

try:
    from firstorder.robustbench.bench import benchmark
    from firstorder.robustbench.zoo import load_model
except ModuleNotFoundError as error:
    if error.name not in ("robustbench", "pkg_resources"):  # the extra has the setuptools that RobustBench imports
        raise
    raise ModuleNotFoundError(
        f"firstorder.robustbench needs {error.name}: {pip_install('robustbench')}", name=error.name
    ) from error
except ImportError as error:
    if error.name != "robustbench.eval":
        raise
    raise ImportError(
        "the robustbench that is installed has no benchmark: torchattacks brings a part of RobustBench, which was "
        "written over it; pip install --force-reinstall --no-deps robustbench",
        name=error.name,
    ) from error

__all__ = ["benchmark", "load_model", "provide_autoattack"]
