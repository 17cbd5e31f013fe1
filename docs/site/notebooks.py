"""The notebooks of docs/: run them without Jupyter, keep what they give, and turn them into pages of the site.

`python docs/site/notebooks.py` runs all of them and writes their outputs into them.
"""

from __future__ import annotations

import ast
import base64
import io
import json
import os
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"

Output = dict[str, Any]


def read(path: Path) -> dict[str, Any]:
    """A notebook as it is in its file."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def code(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    """The cells with code, in order."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def execute(notebook: dict[str, Any]) -> list[list[Output]]:
    """What every cell with code gives, in order, in one scope; an exception is raised as it is.

    What is printed, the value of the last expression, and the figures of matplotlib are outputs, as in Jupyter.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    scope: dict[str, Any] = {"__name__": "__main__"}
    return [_outputs("".join(cell["source"]), scope) for cell in code(notebook)]


def _outputs(source: str, scope: dict[str, Any]) -> list[Output]:
    from matplotlib import pyplot

    body = ast.parse(source)
    last = body.body.pop() if body.body and isinstance(body.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with redirect_stdout(printed):
        exec(compile(body, "<cell>", "exec"), scope)
        if isinstance(last, ast.Expr):
            value = eval(compile(ast.Expression(last.value), "<cell>", "eval"), scope)
    found: list[Output] = []
    if printed.getvalue():
        found.append({"name": "stdout", "output_type": "stream", "text": _lines(printed.getvalue())})
    if value is not None:
        found.append(_shown("execute_result", {"text/plain": _lines(repr(value))}, execution_count=None))
    for number in pyplot.get_fignums():
        file = io.BytesIO()
        pyplot.figure(number).savefig(file, format="png", bbox_inches="tight", metadata={"Software": None})
        picture = base64.b64encode(file.getvalue()).decode() + "\n"
        found.append(_shown("display_data", {"image/png": picture, "text/plain": ["<Figure>"]}))
    pyplot.close("all")
    return found


def _shown(kind: str, data: dict[str, Any], **more: Any) -> Output:
    return {"data": data, "metadata": {}, "output_type": kind, **more}


def _lines(text: str) -> list[str]:
    return text.splitlines(keepends=True)


def text(output: Output) -> str:
    """What an output says; empty for a picture."""
    if "image/png" in output.get("data", {}):
        return ""
    return "".join(output["text"] if output["output_type"] == "stream" else output["data"]["text/plain"])


def picture(output: Output) -> bytes:
    """The PNG file of an output; empty where it has none."""
    return base64.b64decode(output.get("data", {}).get("image/png", ""))


def write(path: Path) -> None:
    """Run a notebook and write its outputs into it."""
    notebook = read(path)
    for cell, outputs in zip(code(notebook), execute(notebook), strict=True):
        cell["outputs"], cell["execution_count"] = outputs, None
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def page(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page in Markdown, and its pictures by file name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in read(path)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if png := picture(output):
                name = f"{path.stem}-{len(pictures) + 1}.png"
                pictures[name] = png
                parts.append(f"![Figure {len(pictures)}]({name})")
            else:
                parts.append(f"```text\n{text(output).rstrip()}\n```")
    parts.append(f"This page is a notebook: {{download}}`{path.name} <{path.name}>`.")
    return "\n\n".join(parts) + "\n", pictures


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    for found in [Path(word) for word in sys.argv[1:]] or sorted(FOLDER.glob("*.ipynb")):
        write(found)
