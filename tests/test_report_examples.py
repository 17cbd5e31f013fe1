"""The page of a run, down to a single example; the leaderboard's ranks; many examples at once."""

from __future__ import annotations

import io
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image

from evaluation_runs import facts, make, table
from firstorder.evaluation.reporting import gallery, leaderboard, summary
from firstorder.evaluation.reporting import page as report
from firstorder.evaluation.runs import trust
from firstorder.evaluation.runs.cells import Cell
from firstorder.evaluation.runs.diagnosis import Finding
from firstorder.evaluation.runs.store import DIAGNOSIS, Run, Store, read
from report_pages import Opened
from samples import sampled

SCRIPT = "</script><script>alert(1)</script>\u2028"
ATTACKS = ["PGD-40", "FGSM", "DDN-1000"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two models, three attacks, two radii, 40 examples; pictures of 5 and of what fell; every text is a script."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    found = facts([f"a{SCRIPT}", "b"], ATTACKS, [0.1, 0.2], [0], 40, shard=20)
    found["data"]["classes"] = [f"{name}{SCRIPT}" for name in ("cat", "dog", "ship")]
    for key in ("command", "device"):
        found[key] = SCRIPT
    found["data"]["spec"] = found["models"][0]["architecture"] = found["attacks"][0]["paper"] = SCRIPT
    return warned(folder, found, f"a{SCRIPT}", f"masked gradients {SCRIPT}", pictures=5)


def warned(folder: Path, found: dict[str, Any], model: str, check: str, **options: Any) -> Run:
    """A made-up run in which the diagnosis of a model warns of something."""
    cell = Cell(f"{DIAGNOSIS}-x", model, DIAGNOSIS, 0.1, 0, 0, 10, DIAGNOSIS)
    finding = Finding(check=check, figure="0", meaning="", remedy="look at it", verdict="warning")
    made = make(folder, {**found, "diagnoses": [cell.plain()]}, **options)
    made.store.save(cell, pa.Table.from_pylist([asdict(finding)], schema=trust.SCHEMA))
    return made


def where(rows: Any, **wanted: Any) -> Any:
    for key, value in wanted.items():
        rows = rows[rows[key] == value]
    return rows


class Gallery(Opened):
    """The examples of the page."""

    def choose(self, **wanted: str) -> None:
        for name, value in wanted.items():
            field = self.tab.locator(f"#examples [name={name}]")
            if field.evaluate("field => field.tagName") == "SELECT":
                field.select_option(value)
            else:
                field.fill(value)
        self.tab.wait_for_function("document.querySelector('#examples output').textContent.endsWith('rows')")

    def cards(self) -> list[str]:
        """The headings of the examples on this page."""
        found: list[str] = self.tab.locator("#examples li h3").all_inner_texts()
        return found

    def said(self) -> str:
        return str(self.tab.locator("#examples output").inner_text())


@pytest.fixture(params=["one file", "files beside"])
def shown(browser: Any, run: Run, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Gallery]:
    inline = gallery.INLINE if request.param == "one file" else 0
    paths = report.write(run, tmp_path, inline=inline)
    beside = [path for path in paths if path.parent.name == gallery.FOLDER]
    assert bool(beside) == (request.param == "files beside")
    found = Gallery(browser, tmp_path, viewport={"width": 1280, "height": 900})
    found.tab.wait_for_function("document.querySelector('#examples output').textContent.endsWith('rows')")
    yield found
    assert found.mistakes == []
    inside = tmp_path.as_uri()
    assert all(address.startswith((inside, "data:")) for address in found.requests)
    found.tab.close()


def test_a_broken_example_and_its_picture(shown: Gallery, run: Run) -> None:
    """One click finds what fell; filters find one example, and its facts and pictures are those of the run."""
    rows = summary.load(run)
    mine = where(rows, model="b", attack="PGD-40", eps=0.2)
    broken = mine[mine["success"] & mine["clean"]]
    assert 0 < len(broken) < 40
    shown.choose(model="b", attack="PGD-40", eps="0.2")
    assert shown.said() == "40 rows"
    shown.tab.get_by_role("button", name="Broken").click()
    assert shown.said() == f"{len(broken)} rows"
    assert [int(card.split(":")[0].split()[-1]) for card in shown.cards()] == broken["example"].tolist()[:24]
    (first,) = (int(i) for i in broken["example"][broken["example"] < 5][:1])
    shown.choose(example=str(first))
    (card,) = shown.tab.locator("#examples li").all()
    row = broken[broken["example"] == first].iloc[0]
    classes = run.facts["data"]["classes"]
    text = card.inner_text()
    message = (
        f"Example {first}: {classes[row.label]}", f"{classes[row.label]} · 90.0 %", "broken",
        f"Broken by PGD-40, after {row.backwards:g} gradient", f"({row.forwards:g} forward pass", "margin -",
        "× 12", "L∞ 0.200", "b, ε = 0.2",
    )  # fmt: skip
    assert [word for word in message if " ".join(word.split()) not in " ".join(text.split())] == []
    images = card.locator("[role=img]").all()
    assert [image.get_attribute("aria-label") for image in images] == [
        f"example {first} as it is", "perturbation × 12", "in the end",
    ]  # fmt: skip
    sheets = shown.tab.evaluate("firstorder.index.sheets")
    address = images[2].evaluate("image => getComputedStyle(image).backgroundImage")
    assert address.removeprefix('url("').removesuffix('")').endswith(tuple(sheets.values()))


def test_filters_by_class_margin_and_outcome(shown: Gallery, run: Run) -> None:
    rows = summary.load(run)
    eps = 0.1
    mine = where(rows, model="b")
    mine = mine[(mine["eps"] == eps) | mine["eps"].isna()]
    shown.choose(model="b", eps="0.1")
    assert shown.said() == f"{len(mine)} rows"
    counts = {
        "Broken": int((mine["clean"] & (mine["reach"] <= eps)).sum()),
        "Misclassified": int((~mine["clean"]).sum()),
        "Robust": int((mine["clean"] & (mine["reach"] > eps)).sum()),
        "Doubtful": 0,
    }
    for name, count in counts.items():
        button = shown.tab.locator("#examples .choices").get_by_role("button", name=name)
        button.click()
        assert button.get_attribute("aria-pressed") == "true"
        assert shown.said() == f"{count} rows"
    shown.tab.get_by_role("button", name="All").click()
    shown.choose(label="1")
    assert shown.said() == f"{int((mine['label'] == 1).sum())} rows"
    shown.choose(label="", low="-5.5", high="-0.5")
    margin = where(run.table(), model="b").loc[lambda rows: rows["eps"].isna() | (rows["eps"] == eps)]["logit_margin"]
    margin = margin.to_numpy()
    assert shown.said() == f"{int(((margin >= -5.5) & (margin <= -0.5)).sum())} rows"
    shown.choose(low="", high="", order="margin")
    assert int(shown.cards()[0].split(":")[0].split()[-1]) == mine["example"].iloc[int(np.argmin(margin))]


def test_pages_turn_by_keyboard(shown: Gallery) -> None:
    shown.choose(model="b")
    place = shown.tab.locator("#examples .place")
    assert place.inner_text() == "page 1 of 5"
    before = shown.cards()
    shown.tab.locator("#examples ol").focus()
    shown.tab.keyboard.press("ArrowRight")
    assert place.inner_text() == "page 2 of 5"
    assert shown.cards() != before
    shown.tab.keyboard.press("ArrowLeft")
    assert shown.cards() == before
    shown.tab.get_by_role("button", name="Last page").click()
    assert place.inner_text() == "page 5 of 5"
    assert shown.tab.get_by_role("button", name="Next").is_disabled()


def test_a_script_in_a_text_is_text(shown: Gallery) -> None:
    assert f"a{SCRIPT}".replace("\u2028", "") in shown.tab.locator("#leaderboard").inner_text().replace("\u2028", "")
    assert "masked gradients </script>" in shown.tab.locator("#leaderboard .why").first.inner_text()
    assert "</script><script>" in shown.tab.locator("#examples li h3").first.inner_text()
    assert shown.tab.evaluate("[...document.scripts].every(script => !script.textContent.startsWith('alert'))")


def test_only_robust_examples_are_without_a_picture(shown: Gallery, run: Run) -> None:
    """Every example that fell is shown with its own images, drawn from the parts of sheets that hold them."""
    rows = where(summary.load(run), model="b", attack="PGD-40", eps=0.2)
    robust = rows[~rows["success"] & rows["clean"] & (rows["example"] >= 5)]["example"]
    shown.choose(model="b", attack="PGD-40", eps="0.2", example=str(robust.iloc[0]))
    (card,) = shown.tab.locator("#examples li").all()
    assert "not kept" in card.inner_text()
    assert card.locator("[role=img]").count() == 1
    shown.choose(example="", outcome="broken")
    cards = shown.tab.locator("#examples li").all()
    broken = rows[rows["success"] & rows["clean"]]["example"].tolist()
    assert len(cards) == len(broken) > 5
    assert max(broken) > 5
    assert [card.locator("[role=img]").count() for card in cards] == [3] * len(broken)
    for i in (0, len(broken) - 1):
        made = cards[i].get_by_label("in the end")
        made.scroll_into_view_if_needed()
        seen = np.asarray(Image.open(io.BytesIO(made.screenshot())).convert("RGB").resize((8, 8), Image.Resampling.BOX))
        own = where(run.table(), model="b", attack="PGD-40", eps=0.2, example=broken[i]).iloc[0]
        image = np.frombuffer(own["adversarial"], "<f4").reshape(3, 8, 8).transpose(1, 2, 0) * 255
        assert np.abs(seen[1:-1, 1:-1] - image[1:-1, 1:-1]).mean() < 12


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_broken_example_on_a_phone(browser: Any, run: Run, tmp_path: Path, scheme: str) -> None:
    """Its three images stand side by side within 360 pixels, none smaller than 64, and its text is readable."""
    report.write(run, tmp_path)
    shown = Gallery(browser, tmp_path, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    shown.choose(model="b", attack="PGD-40", eps="0.2", outcome="broken")
    last = shown.cards()[-1].split(":")[0].split()[-1]
    assert int(last) >= 5
    shown.choose(example=last)
    (card,) = shown.tab.locator("#examples li").all()
    found = card.locator("[role=img]")  # all at once, as what is above may still be drawn
    boxes = found.evaluate_all("images => images.map(image => image.getBoundingClientRect().toJSON())")
    assert len({box["y"] for box in boxes}) == 1
    assert len({box["x"] for box in boxes}) == 3
    assert all(box["width"] >= 64 and box["x"] + box["width"] <= 360 for box in boxes)
    sizes = "card => [...card.querySelectorAll('*')].map(part => parseFloat(getComputedStyle(part).fontSize))"
    assert min(card.evaluate(sizes)) >= 12
    widths, smallest = shown.narrow()
    assert widths == [360, 360]
    assert smallest >= 9
    assert (sum(shown.color("#examples li", "backgroundColor")) > 600) == (scheme == "light")
    assert shown.mistakes == []
    shown.tab.close()


def test_the_page_says_how_many_of_the_broken_have_a_picture(run: Run, tmp_path: Path) -> None:
    """Cells of earlier versions have fewer; what is kept of them is shown, and what to do is said."""
    rows = summary.load(run)
    broken = int((rows["success"] & rows["clean"]).sum())
    found = gallery.gallery(run, tmp_path / "a")
    assert (found.pictured, found.fallen) == (broken, broken)
    for cell in run.cells:
        kept = run.store.read(cell.key)
        column = [row["adversarial"] if row["example"] < 5 else None for row in kept.to_pylist()]
        at = kept.schema.get_field_index("adversarial")
        Store(tmp_path / "old").save(cell, kept.set_column(at, kept.schema.field(at), pa.array(column, pa.binary())))
    old = Store(tmp_path / "old")
    old.write(run.facts)
    shutil.copytree(run.store.data, old.data)
    first = int((rows["success"] & rows["clean"] & (rows["example"] < 5)).sum())
    found = gallery.gallery(read(tmp_path / "old"), tmp_path / "b")
    assert (found.pictured, found.fallen) == (first, broken)
    report.write(read(tmp_path / "old"), tmp_path / "b")
    said = (
        f"of {first} of the {broken} that were broken, each attack and radius counted; a larger --pictures keeps more"
    )
    assert said in (tmp_path / "b" / "report.html").read_text()


def test_pairs_fill_sheets_of_a_bounded_size(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sheets of at most 4 images of 8 x 8 in a line and 4 lines hold every pair, in order, each once."""
    monkeypatch.setattr(gallery, "SHEET", 4 * 4 * 64)
    files: dict[str, bytes] = {}
    kept = gallery._kept(run, {"model": "b", "attack": "DDN-1000", "eps": None, "seed": 0})
    numbers, _, sheets = gallery._pictures(run, kept, (3, 8, 8), "p", files)
    assert sheets is not None
    assert sheets["names"] == list(files) == [f"p-{i + 1}.png" for i in range(-(-len(kept) // 8))]
    assert (sheets["count"], sheets["across"], sheets["each"]) == (len(kept), 2, 8)
    assert len(files) > 2
    examples = sorted(kept)
    assert numbers == {example: number for number, example in enumerate(examples)}
    for number in (0, 9, len(kept) - 1):
        sheet = np.asarray(Image.open(io.BytesIO(files[sheets["names"][number // 8]])))
        line, place = divmod(number % 8, 2)
        image = np.frombuffer(kept[examples[number]], "<f4").reshape(3, 8, 8).transpose(1, 2, 0)
        assert np.array_equal(
            sheet[8 * line : 8 * line + 8, 16 * place : 16 * place + 8], (image * 255).round().astype(np.uint8)
        )


def test_sheets_hold_the_images(run: Run, tmp_path: Path) -> None:
    """The clean images in order, and an adversarial image beside its perturbation, magnified, on grey."""
    found = gallery.gallery(run, tmp_path, inline=0)
    clean = np.asarray(Image.open(tmp_path / gallery.FOLDER / "clean-1.png"))
    images = (run.examples(0, 40).numpy() * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    assert np.array_equal(clean[:8, 8:16], images[1])
    pictures = np.asarray(Image.open(tmp_path / gallery.FOLDER / "pictures-1-1.png"))
    row = where(run.table(), model=run.facts["models"][0]["name"]).dropna(subset="adversarial")
    assert pictures.shape == (8, 2 * 8 * (row["attack"] == "DDN-1000").sum(), 3)
    groups = [path.name for path in found.paths if path.name.startswith("rows")]
    assert len(groups) == 2 * (1 + 2 * 2)
    group = row[(row["attack"] == "DDN-1000") & (row["example"] == 2)].iloc[0]  # no radius: the first group
    image = np.frombuffer(group["adversarial"], "<f4").reshape(3, 8, 8).transpose(1, 2, 0)
    assert np.array_equal(pictures[:, 32:40], (image * 255).round().astype(np.uint8))
    delta = 0.5 + 12 * (image - run.examples(2, 3)[0].numpy().transpose(1, 2, 0))
    assert np.array_equal(pictures[:, 40:48], (delta.clip(0, 1) * 255).round().astype(np.uint8))
    (tmp_path / gallery.FOLDER / "rows-99.js").write_text("old")
    gallery.gallery(run, tmp_path, inline=0)
    assert not (tmp_path / gallery.FOLDER / "rows-99.js").exists()


def outcomes(*broken: str) -> Any:
    """Rows of models at radius 0.1; a letter for each example: x is broken, o is robust."""
    names = [f"m{i}" for i in range(len(broken))]
    rows = pd.DataFrame(
        {"model": name, "target": name, "eps": 0.1, "example": i, "reach": 0.05 if letter == "x" else np.inf}
        for name, letters in zip(names, broken, strict=True)
        for i, letter in enumerate(letters)
    )
    return [summary.robust(rows, name, 0.1) for name in names]


@pytest.mark.parametrize(
    ("broken", "places"),
    [
        (("o" * 20, "x" * 6 + "o" * 14), [(1, 1), (2, 2)]),  # 6 against 0: p = 2 / 64
        (("o" * 20, "x" * 5 + "o" * 15), [(1, 2), (1, 2)]),  # 5 against 0: p = 2 / 32
        (("x" * 20, "o" * 20, "o" * 20), [(3, 3), (1, 2), (1, 2)]),
        (("o" * 20, "x" * 4 + "o" * 16, "x" * 8 + "o" * 12), [(1, 2), (1, 3), (2, 3)]),
    ],
)
def test_models_that_images_do_not_distinguish_share_a_rank(
    broken: tuple[str, ...], places: list[tuple[int, int]]
) -> None:
    assert leaderboard._places(outcomes(*broken)) == places


def test_the_leaderboard_is_ranked_and_sorts(browser: Any, tmp_path: Path) -> None:
    """Worst case first; what RobustBench knows; a model that is not to be trusted says why."""
    found = facts(["weak", "strong"], ["PGD-40"], [0.1], [0], 200)
    found["models"][1] |= {"spec": "robustbench:Strong", "parameters": 7}
    run = warned(tmp_path / "run", found, "strong", "its gradients are masked")
    info = {
        "strong": {"name": "Strong et al.", "autoattack_acc": "61.5", "eps": "0.1", "additional_data": True,
                   "venue": "ICML 2020", "architecture": "WRN-28-10", "link": "https://example.org/p"},
        "weak": {"link": "javascript:alert(1)", "autoattack_acc": "9", "eps": "8/255"},
    }  # fmt: skip
    report.write(run, tmp_path / "out", info=info)
    shown = Opened(browser, tmp_path / "out")
    script = "rows => rows.map(row => [...row.cells].map(cell => cell.innerText.trim()))"
    rows = shown.tab.locator(".board tbody tr").evaluate_all(script)
    board = summary.leaderboard(summary.load(run), run.facts)
    robust = {score.model: score.robust for score in board}
    low, high = robust["strong"].interval
    assert rows[0][:6] == [
        "1", "Strong et al. paper", rows[0][2], f"{100 * robust['strong'].value:.2f}",
        f"{100 * low:.1f} – {100 * high:.1f}", "61.50",
    ]  # fmt: skip
    assert "not to be trusted" in rows[0][7]
    assert "its gradients are masked" in rows[0][7]
    assert rows[0][8:] == ["yes", "WRN-28-10", "7", "ICML 2020"]
    assert rows[1][:2] == ["2", "weak"]
    assert (rows[1][5], rows[1][7], rows[1][8]) == ("", "", "")
    assert shown.tab.locator("a[href^='https://example.org']").count() == 1
    assert shown.tab.locator("a[href^='javascript']").count() == 0
    header = shown.tab.locator(".board th", has_text="parameters")
    header.locator("button").click()
    header.locator("button").click()
    shown.sorted(header, "descending")
    assert [row[1] for row in shown.tab.locator(".board tbody tr").evaluate_all(script)] == [
        "weak", "Strong et al. paper",
    ]  # fmt: skip
    assert shown.mistakes == []


def test_a_leaderboard_has_what_is_known_and_one_radius_at_a_time(browser: Any, tmp_path: Path) -> None:
    run = make(tmp_path / "run", facts(["a", "b"], ["PGD-40"], [0.1, 0.3], [0], 30))
    report.write(run, tmp_path / "out")
    shown = Opened(browser, tmp_path / "out")
    heads = shown.tab.locator("#leaderboard-2 th").all_inner_texts()
    assert [head.split(" ↕")[0] for head in heads] == [
        "rank", "model", "clean, %", "robust, %", "95 %", "strongest attack", "architecture", "parameters",
    ]  # fmt: skip
    boards = shown.tab.locator(".board")
    assert [board.is_visible() for board in boards.all()] == [False, True]
    shown.tab.locator("[data-shows=leaderboard-1]").click()
    assert [board.is_visible() for board in boards.all()] == [True, False]
    shown.tab.goto(f"{shown.address}#leaderboard-2")
    boards.nth(1).wait_for(state="visible")
    assert not boards.nth(0).is_visible()
    assert shown.tab.locator("#leaderboard .permalink:visible").count() == 2
    assert "| not to be trusted |" not in (tmp_path / "out/report.md").read_text()
    assert (
        "| ε | clean, % | robust, % | 95 % | strongest attack | architecture | parameters |\n"
        in (tmp_path / "out/report.md").read_text()
    )
    assert shown.mistakes == []


def many(folder: Path, count: int) -> Run:
    """A run of two models and three attacks with one picture of 3 x 32 x 32 for every example in its data."""
    found = facts(["a", "b"], ["PGD-40", "FGSM", "AutoAttack"], [8 / 255], [0], count, shard=count)
    found["data"]["shape"] = [3, 32, 32]
    store, random = Store(folder), np.random.default_rng(0)
    store.write(found)
    store.data.mkdir(parents=True)
    labels = random.integers(0, 3, count)
    np.save(store.data / f"{'d' * 32}-x.npy", random.integers(0, 255, (count, 3, 32, 32), dtype=np.uint8))
    np.save(store.data / f"{'d' * 32}-y.npy", labels)
    for cell in (Cell(**cell) for cell in found["cells"]):
        after = np.where(random.random(count) < 0.4, (labels + 1) % 3, labels)
        columns = {
            "model": [cell.model] * count, "target": [cell.model] * count, "attack": [cell.attack] * count,
            "eps": [cell.eps] * count, "seed": [0] * count, "example": np.arange(count), "label": labels,
            "clean_label": labels, "adversarial_label": after, "success": after != labels,
            "doubtful": np.zeros(count, bool), "unverified": np.zeros(count, bool), "linf": [8 / 255] * count,
            "l2": [0.5] * count, "clean_confidence": random.random(count), "confidence": random.random(count),
            "logit_margin": random.normal(size=count), "forwards": random.integers(1, 41, count) * 1.0,
            "backwards": random.integers(1, 41, count) * 1.0, "seconds": [0.1] * count,
        }  # fmt: skip
        store.save(cell, pa.concat_tables([table(columns)]))
    return read(folder)


@pytest.mark.parametrize("count", sampled([(1_000,), (10_000,)], 2, lambda row: "count"))
def test_many_examples_at_once(browser: Any, tmp_path: Path, count: int) -> None:
    """The first view, with its examples, is there in 2 seconds, and no request leaves the folder."""
    run = many(tmp_path / "run", count)
    report.write(run, tmp_path / "out", inline=0)
    shown = Gallery(browser, tmp_path / "out")
    seconds: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        shown.tab.reload(wait_until="commit")
        shown.tab.wait_for_selector("#examples li [role=img]")
        shown.tab.wait_for_function(f"document.querySelector('#examples output').textContent === '{3 * count} rows'")
        seconds.append(time.perf_counter() - began)
    assert shown.mistakes == []
    assert all(address.startswith((tmp_path / "out").as_uri()) for address in shown.requests)
    assert min(seconds) < 2 * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))  # others may be at work
    shown.tab.get_by_role("button", name="Broken").click()
    broken = int(summary.load(run).query("model == 'a' and success").shape[0])
    assert shown.said() == f"{broken} rows"
