"""The README and docs/: code runs, commands parse, links lead somewhere; the table of attacks is the registry."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
import yaml
from torch import nn

from cases import Net, classifier, images
from firstorder.attacks import registry
from firstorder.evaluation.cli import app
from firstorder.evaluation.names import documents, packaged
from firstorder.evaluation.names.attacks import RECOMMENDED
from firstorder.evaluation.runs.plan import plan
from firstorder.evaluation.runs.specification import specify

ROOT = Path(__file__).parent.parent
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (ROOT / "docs").rglob("*.md")}
PAGES |= {
    name: (ROOT / name).read_text("utf-8") for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
}
PAGES |= {
    path.relative_to(ROOT).as_posix(): "\n\n".join(
        "".join(cell["source"])
        for cell in json.loads(path.read_text("utf-8"))["cells"]
        if cell["cell_type"] == "markdown"
    )
    for path in (ROOT / "docs" / "notebooks").glob("*.ipynb")
}
README = PAGES["README.md"]
WITHOUT_COMMANDS = {
    *("docs/hosts.md", "docs/faster.md", "docs/design.md", "docs/extending.md", "docs/how-to/migrate.md"),
    *("docs/tutorials/torchattacks.md", "docs/tutorials/art.md", "docs/how-to/choose-an-attack.md"),
    *("CHANGELOG.md", "SECURITY.md", "docs/notebooks/attack-and-look.ipynb", "docs/notebooks/engm.ipynb"),
}
"""Pages about code alone."""

every_page = pytest.mark.parametrize("page", sorted(PAGES))


@every_page
def test_every_snippet_runs(page: str, model: Net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snippets = re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.S)
    monkeypatch.chdir(tmp_path)
    x, y = images(), torch.arange(6)
    scope: dict[str, Any] = {"torch": torch, "model": model, "x": x, "y": y, "images": x, "labels": y}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    scope |= {"classifier": classifier(model, optimizer=optimizer), "x_test": x.numpy(), "y_test": y.numpy()}
    scope["other"] = nn.Sequential(nn.Flatten(), nn.Linear(360, 10))
    for snippet in snippets:
        exec(compile(snippet, page, "exec"), scope)
    if page == "README.md":
        assert len(snippets) == 7  # a framework each, plain PyTorch, training
        assert scope["result"].success.shape == (6,)
        assert scope["robust"] <= scope["clean"]
        assert all(p.grad is not None for p in model.parameters())
    if page == "docs/catalogue.md":
        assert scope["nearest"].norm.shape == (6,)
    if page == "docs/tutorials/own-attack.md":
        assert not torch.equal(scope["Mine"](eps=0.05)(model, x, y), x)


def test_the_readme_is_short() -> None:
    assert len(README.encode()) <= 8192


def test_pages_have_snippets_where_a_reader_writes_code() -> None:
    for page in PAGES:
        if page.startswith("docs/tutorials/") or page in {"docs/hosts.md", "docs/training.md", "docs/pitfalls.md"}:
            assert "```python\n" in PAGES[page], page


def commands(text: str) -> list[list[str]]:
    """The words of every command line of a page: in shell blocks, in indented ones and within sentences."""
    shell = re.findall(r"^```sh\n(.*?)^```", text, flags=re.S | re.M)
    rest = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M).replace("\\\n", " ")
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    lines += [line.strip() for line in rest.splitlines() if line.startswith("    ")]
    lines += [" ".join(match.split()) for match in re.findall(r"`([^`]+)`", rest)]
    command = re.compile(r"(firstorder|python -m firstorder\.\S+|python tests/\S+|pytest|make)( |$)")
    found = [shlex.split(line, comments=True) for line in lines if command.match(line)]
    return [words for words in found if len(words) > 1]


def check(words: list[str]) -> None:
    """Raise a ValueError where a command line names a command, an option or a value that is not there."""
    try:
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        elif words[0] == "pytest" or words[1].startswith("tests/"):
            script = ROOT / words[1]
            assert script.exists()
            assert not words[2:] or all(word in script.read_text() for word in words[2:] if word.startswith("--"))
        elif words[0] == "python":
            module = typer.Typer()
            module.command()(importlib.import_module(words[2]).main)
            typer.main.get_command(module).make_context(words[2], words[3:])
        else:
            group: Any = typer.main.get_command(app)
            command = group.get_command(None, words[1])
            assert command is not None
            if words[2:] not in ([], ["--help"]):
                command.make_context(words[1], words[2:])
    except Exception as error:
        raise ValueError(f"{shlex.join(words)}: {type(error).__name__}: {error}") from error


@every_page
def test_every_command_parses(page: str) -> None:
    found = commands(PAGES[page])
    assert found or page in WITHOUT_COMMANDS
    for words in found:
        check(words)


@pytest.mark.parametrize(
    "text",
    [
        "```sh\nfirstorder demos --out X\n```",
        "```sh\nfirstorder curve --model mnist-cnn \\\n  --stepz 5\n```",
        "    firstorder curve --steps many   # a comment",
        "as `firstorder curve\n--nothing` does",
        "    python -m firstorder.evaluation.nothing --data DIR",
        "    python -m firstorder.evaluation.studies.interaction",
        "    make nothing",
        "    pytest tests/nothing",
        "    python tests/cuda/engm.py --batches 3",
    ],
)
def test_a_command_that_does_not_parse_is_found(text: str) -> None:
    (words,) = commands(text)
    with pytest.raises(ValueError, match=re.escape(shlex.join(words))):
        check(words)


def anchors(text: str) -> set[str]:
    """Of the headings, as the pages are shown."""
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_every_link_leads_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", PAGES[page]):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def test_every_page_is_linked() -> None:
    """From the README to the index, from the index to every page."""
    named = set(re.findall(r"\]\(([^)#]+)", README))
    assert {"docs/index.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"} <= named
    linked = {
        f"docs/{link}" for link in re.findall(r"\]\(((?:[\w-]+/)?\w[\w-]*\.(?:md|ipynb))\)", PAGES["docs/index.md"])
    }
    assert linked == {page for page in PAGES if page.startswith("docs/")} - {"docs/index.md"}


def unexplained(page: str, text: str) -> list[str]:
    """The headings of sections that have figures and no command; on pages of numbers any table is of figures."""
    measured = r"^\|.*\| [^|`]*\d+\.\d+|\d+\.\d+ (?:%|times|points)" + (r"|^\|" if "/numbers/" in page else "")
    sections = {section.splitlines()[0]: section for section in re.split(r"^##+ ", text, flags=re.M)}
    plain = {title: re.sub(r"^```.*?^```", "", section, flags=re.S | re.M) for title, section in sections.items()}
    found = [title for title in sections if re.search(measured, plain[title], flags=re.M)]
    return [title for title in found if not commands(sections[title])]


def test_every_figure_has_a_command() -> None:
    """But for the defaults of attacks, and for arithmetic of which the section has the functions."""
    found = {page: unexplained(page, text) for page, text in PAGES.items() if page != "docs/catalogue.md"}
    assert {page: titles for page, titles in found.items() if titles} == {"docs/verdict.md": ["The audit"]}


@pytest.mark.parametrize(
    "text",
    [
        "robust accuracy falls by 1.3 % of itself",
        "| net | robust |\n|---|---:|\n| a | 56.40 |",
        "a step costs 1.06 times",
    ],
)
def test_a_figure_without_a_command_is_found(text: str) -> None:
    assert unexplained("docs/a.md", f"# Page\n\n## Figures\n\n{text}\n") == ["Figures"]
    assert not unexplained("docs/a.md", f"# Page\n\n## Figures\n\n{text}\n\n    firstorder bench\n")


def test_the_main_figures_are_those_of_their_pages() -> None:
    main = PAGES["docs/numbers/index.md"].split("## The main figures")[1].split("## ")[0]
    items = re.split(r"^- ", main, flags=re.M)[1:]
    assert len(items) == 6
    for item in items:
        (page,) = re.findall(r"\]\(([^)]+)\)", item)
        figures = re.findall(r"\d+\.\d+|\d{3,}", item)
        assert figures
        assert set(figures) <= numbers(PAGES[f"docs/numbers/{page}"]), item


def numbers(text: str) -> set[str]:
    """All that a text states."""
    return set(re.findall(r"\d+\.\d+|\d+", text))


def test_the_table_of_the_readme_is_that_of_the_verdict() -> None:
    rows = [line for line in README.splitlines() if re.match(r"\| .*\| \d+\.\d+ \|", line)]
    assert len(rows) >= 3
    beside = PAGES["docs/verdict.md"].split("## Beside AutoAttack")[1].split("\n## ")[0]
    assert commands(beside)
    theirs = {line.split(" | ")[0]: line for line in beside.splitlines() if line.startswith("| ")}
    for row in rows:
        cells = row.split(" | ")
        assert numbers(" ".join(cells[2:])) <= numbers(theirs[cells[0]]), row


def test_equations_name_every_attack_and_state_what_their_pages_state() -> None:
    page = PAGES["docs/equations.md"]
    assert {cls.__name__ for cls in registry().attacks.values()} <= set(re.findall(r"`(\w+)`", page))
    for line in page.splitlines():
        links = [link for link in re.findall(r"\]\(([^)#]+)", line) if link.startswith("numbers/")]
        if links:
            result = line.rpartition(" | ")[2]
            known = numbers("".join(PAGES[f"docs/{link}"] for link in links)) | {"100", "50", "16", "8"}
            assert set(re.findall(r"\d+\.\d+", result)) <= known, line


def test_what_is_recommended_is_measured() -> None:
    """Every row of the page names a recommended option, and its figures are those of the page it links to."""
    lines = [line for line in PAGES["docs/attacks.md"].splitlines() if line.startswith("| `")]
    assert sorted(re.findall(r"^\| `([^`]+)`", "\n".join(lines), flags=re.M)) == sorted(RECOMMENDED.values())
    for line in lines:
        figures = {number for cell in line.split(" | ")[1:] for number in re.findall(r"\d+\.\d+", cell)}
        text = "".join(PAGES[f"docs/{link}"] for link in re.findall(r"\]\(([^)]+)\)", line))
        assert figures
        assert figures <= set(re.findall(r"\d+\.\d+", text)), line


def test_the_specification_is_one() -> None:
    """The page's, and the packaged one: each names what there is."""
    (text,) = re.findall(r"```yaml\n(.*?)```", PAGES["docs/evaluate.md"], flags=re.S)
    given = yaml.safe_load(text)
    whole, _ = documents.read(packaged.ASSETS / "evaluation.yaml")
    for values, attacks in ((given, 3), (whole, 6)):
        chosen = plan(specify({**values, "count": 4}))
        assert len(chosen.cells) == 2 * attacks * 2
        assert chosen.examples.count == 4


def test_the_table_lists_the_registry() -> None:
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", PAGES["docs/catalogue.md"], flags=re.M)
    listed = dict(rows)
    assert len(listed) == len(rows)
    assert listed == {name: cls.__name__ for name, cls in registry().attacks.items()}
