"""``report.html``: what it shows, that it needs no other file, and that a browser renders it."""

import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch

from dfkd_fast import Epoch, load_recipe
from dfkd_fast.evaluation import retention
from dfkd_fast.models import build_model, save_weights
from dfkd_fast.recipe import recipe_to_toml
from dfkd_fast.report import RunFolder
from dfkd_fast.report.html import render_report, write_report
from tests.command_line import Run

ARTEFACTS = Path(__file__).parents[1] / "artefacts"
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
CURVE = [50.0, 90.0, 85.0, 94.0]


def finished_run(path: Path, name: str = "digits", overrides: dict[str, Any] | None = None, **changes: Any) -> RunFolder:
    """The folder of a finished run, written without training."""
    recipe = load_recipe(name, {"engine.precision": "fp32", **(overrides or {})})
    folder = RunFolder(path)
    path.mkdir()
    epochs = [Epoch(number, 1.0, {"student": 1 / number, "adversarial": -5.0}, value) for number, value in enumerate(CURVE, start=1)]
    folder.write_recipe(recipe_to_toml(recipe))
    folder.begin_log(epochs)
    folder.end_log()
    data, segmentation = recipe.data, recipe.data.task == "segmentation"
    for epoch in (1, 2, 4):
        images = torch.randn(9, data.channels, data.image_size, data.image_size)
        maps = [torch.randint(256, (9, 3, data.image_size, data.image_size), dtype=torch.uint8)] * (2 if segmentation else 0)
        folder.save_samples(images, data.mean, data.std, epoch, maps)
    statistics = retention(CURVE, 93.0).__dict__
    summary = {
        "recipe": recipe.name,
        "device": "cpu",
        "device_name": "x86_64 AVX512, 2 threads",
        "versions": {"dfkd_fast": "0.1.0", "python": "3.11.7", "torch": "2.11.0", "torchvision": "0.26.0", "cuda": None},
        "seed": recipe.seed,
        "precision": "fp32",
        "metric": data.metric,
        "teacher_accuracy": 98.0,
        "student_accuracy": {key: statistics[key] for key in ("last", "best", "mean", "variance")},
        "retention": statistics,
        "notes": [],
        "drift": None,
        "seconds": {"total": 200.0, "teacher": 20.0, "generator": 30.0, "student": 100.0, "evaluation": 10.0},
        "peak_memory_bytes": 3 * 2**29,
        "peak_memory_bytes_by_phase": None,
    }
    folder.write_summary(summary | changes)
    return folder


class Page(HTMLParser):
    """Elements and text of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._text: list[str] = []
        self._in_cell = False
        self.feed(source)
        self.text = " ".join(" ".join(self._text).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        self._text.append(data)
        if self._in_cell:
            self.rows[-1][-1] = " ".join(f"{self.rows[-1][-1]} {data}".split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def test_the_page_shows_the_results_of_the_summary(tmp_path: Path) -> None:
    page = Page(render_report(finished_run(tmp_path / "run", notes=["the learning rate is low"])))
    for row in (
        ["Teacher", "98.00 %"],
        ["Student, last epoch", "94.00 %"],
        ["Student, best epoch (selected on these images)", "94.00 %"],
        ["Student, largest drop from a previous peak", "5.00 points"],
        ["Student, fraction of epochs within 5 points of the teacher", "25 %"],
        ["Student steps", "1 min 40 s", "50.0 %"],
        ["Other", "40.0 s", "20.0 %"],
        ["Device", "x86_64 AVX512, 2 threads"],
        ["PyTorch", "2.11.0"],
    ):
        assert row in page.rows
    assert "−4.00" in page.text
    assert "1.50 GiB" in page.text
    assert "the learning rate is low" in page.text
    assert len(page.all("svg")) == 3  # accuracy and two losses
    assert [image["alt"] for image in page.all("img")] == [f"Samples after epoch {epoch}" for epoch in (1, 2, 4)]


def test_differences_from_the_shipped_recipe_are_listed_and_the_command_repeats_them(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", overrides={"loop.epochs": 4, "seed": 3})
    source = render_report(folder)
    shipped = load_recipe("digits").loop.epochs
    rows = Page(source).rows
    assert ["loop.epochs", str(shipped), "4"] in rows
    assert ["seed", "0", "3"] in rows
    assert ["engine.precision", '"auto"', '"fp32"'] in rows
    command = re.search(r"<pre>(dfkd-fast distill.*?)</pre>", source, re.DOTALL)
    assert command is not None
    changes = dict(change.strip("'").split("=") for change in re.findall(r"--set (\S+)", html.unescape(command[1])))
    repeated = load_recipe("digits", {key: json.loads(value) for key, value in changes.items()})
    assert repeated == load_recipe(str(folder.recipe))


def test_a_recipe_that_is_not_shipped_is_reproduced_from_its_file(tmp_path: Path) -> None:
    page = Page(render_report(finished_run(tmp_path / "run", overrides={"name": "mine"})))
    assert "dfkd-fast distill recipe.toml" in page.text
    assert 'name = "mine"' in page.text


def test_text_of_the_user_is_escaped(tmp_path: Path) -> None:
    attack = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"
    folder = finished_run(
        tmp_path / "run", overrides={"description": attack, "student.model": f"a:{attack}"}, notes=[attack], device_name=attack
    )
    source = render_report(folder)
    page = Page(source)
    assert "<script" not in source
    assert not page.all("script")
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert page.text.count("<script>alert(1)</script>") >= 4
    assert all((image["src"] or "").startswith("data:image/webp;base64,") for image in page.all("img"))


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_the_page_needs_no_network_no_script_and_no_other_file(tmp_path: Path, name: str) -> None:
    source = render_report(finished_run(tmp_path / "run", name))
    page = Page(source)
    assert not {"script", "iframe", "object", "embed", "base"} & {tag for tag, _ in page.elements}
    links = [value for _, attributes in page.elements for key in ("src", "href", "xlink:href") if (value := attributes.get(key))]
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"@import|url\((?!#)", source)


def test_the_code_that_loads_the_student_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = render_report(finished_run(tmp_path / "run"))
    code = re.search(r"<pre>(from dfkd_fast\.models.*?)</pre>", source, re.DOTALL)
    assert code is not None
    student = build_model("lenet5_half", 10, 1)
    save_weights(student, tmp_path / "student.safetensors", {})
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    exec(html.unescape(code[1]), scope)
    images = torch.randn(2, 1, 32, 32)
    assert torch.equal(scope["student"](images), student.eval()(images))


def test_segmenters_have_label_maps_below_each_image_and_the_iou_per_class(tmp_path: Path) -> None:
    names = ("background", "circle", "square", "triangle")
    iou = {"teacher": dict.fromkeys(names, 90.0), "student": dict.fromkeys(names, 80.0) | {"circle": None}}
    folder = finished_run(tmp_path / "run", "shapes", iou=iou)
    page = Page(render_report(folder))
    assert ["square", "90.00 %", "80.00 %"] in page.rows
    assert ["circle", "90.00 %", "–"] in page.rows
    assert "the label map of the teacher, then that of the student" in page.text
    assert [len(images) for _, images in folder.read_samples_over_time(32, True, 2)] == [6, 6, 6]


def test_samples_of_a_generator_that_is_not_trained_any_more_are_shown_once(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "r")
    shutil.copyfile(folder.samples / "epoch-0001.png", folder.samples / "epoch-0002.png")
    assert [epoch for epoch, _ in folder.read_samples_over_time(32, False, 2)] == [1, 4]
    shutil.copyfile(folder.samples / "epoch-0001.png", folder.samples / "epoch-0004.png")
    assert [epoch for epoch, _ in folder.read_samples_over_time(32, False, 2)] == [1]
    report = render_report(folder)
    assert "Each column shows" not in report and "Samples of 6 latent vectors." in report


@pytest.mark.parametrize(
    ("adversarial", "sentence"), [(1.0, "The generator seeks samples on which they differ"), (0.0, "On real images they may")]
)
def test_agreement_is_explained_by_what_the_generator_is_trained_for(tmp_path: Path, adversarial: float, sentence: str) -> None:
    changes = {"objective.adversarial": adversarial, "objective.one_hot": 1.0}
    agreement = {"last": 50.0, "best": 60.0, "samples": 1000}
    folder = finished_run(
        tmp_path / "r", "digits", changes, teacher_accuracy=None, student_accuracy=None, retention=None, agreement=agreement
    )
    assert sentence in Page(render_report(folder)).text


def test_an_agreement_is_not_drawn_as_epoch_0_of_an_accuracy(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "r")
    folder.write_text(folder.calibration, '{"accuracy": null, "agreement": 99.0}')
    accuracies = [Epoch(1, 1.0, {}, 90.0)]
    agreements = [Epoch(1, 1.0, {}, None, agreement=90.0)]
    assert folder.calibrated(accuracies) is None
    assert folder.calibrated(agreements) == 99.0
    folder.write_text(folder.calibration, '{"accuracy": 80.0, "agreement": 99.0}')
    assert folder.calibrated(accuracies) == 80.0


def test_a_run_without_test_images_has_a_report(tmp_path: Path) -> None:
    folder = finished_run(tmp_path / "run", teacher_accuracy=None, student_accuracy=None, retention=None)
    folder.begin_log([Epoch(1, 1.0, {"student": 1.0}, None)])
    folder.end_log()
    page = Page(render_report(folder))
    assert "The student was not evaluated" in page.text
    assert len(page.all("svg")) == 1


@pytest.mark.filterwarnings("ignore::dfkd_fast.renamed.RenamedKeyWarning")
@pytest.mark.parametrize("run", sorted(path.parent.name for path in ARTEFACTS.glob("0.1.0/*/finished")))
@pytest.mark.filterwarnings("error:constrained_layout")  # the labels fit beside the axes
def test_a_run_of_an_earlier_version_has_a_report(tmp_path: Path, run: str) -> None:
    shutil.copytree(ARTEFACTS / "0.1.0" / run / "finished", tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    write_report(folder)
    summary = json.loads(folder.summary.read_text())
    assert f"{summary['student_accuracy']['last']:.2f} %" in folder.report.read_text("utf-8")
    assert not folder.samples_over_time.exists()  # its samples were not kept


def test_a_report_that_cannot_be_written_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = finished_run(tmp_path / "run")
    (folder.samples / "epoch-0002.png").write_bytes(b"damaged")
    write_report(folder)
    assert not folder.report.exists()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "report.html was not written: UnidentifiedImageError" in caplog.text


def test_every_finished_run_has_a_report_which_is_removed_when_epochs_are_left(run: Run, tmp_path: Path) -> None:
    tiny = {"loop.epochs": 1, "loop.iterations_per_epoch": 1, "loop.batch_size": 8, "teacher.epochs": 1, "report.samples": 4}
    said = run("distill", "digits", "--out", "run", *(word for key, value in tiny.items() for word in ("--set", f"{key}={value}")))
    assert said.code == 0, said.err
    folder = RunFolder(Path("run"))
    assert "<title>digits, seed 0" in folder.report.read_text("utf-8")
    assert folder.samples_over_time.is_file()
    folder.remove_summary()
    assert not folder.report.exists()
    assert not folder.summary.exists()


WRAPPER = """<!DOCTYPE html><title>wrapper</title><style>iframe {{ width: {width}px; height: 900px; border: 0; }}</style>
<iframe src="{report}"></iframe><pre id="rendered"></pre>
<script>
addEventListener("load", () => {{
  const page = document.querySelector("iframe").contentDocument;
  document.getElementById("rendered").textContent = JSON.stringify({{
    title: page.title,
    images: [...page.images].map(image => image.naturalWidth),
    panels: [...page.querySelectorAll("figure > svg")].map(svg => svg.getBoundingClientRect().height),
    width: page.documentElement.clientWidth,
    needed: page.documentElement.scrollWidth,
  }});
}});
</script>"""


@pytest.fixture
def browse(tmp_path: Path) -> Callable[[Path, int], dict[str, Any]]:
    """Opens a page of this width in a headless browser; returns what a script sees of it."""
    if BROWSER is None:
        pytest.skip("there is no Chromium")

    def browse(report: Path, width: int) -> dict[str, Any]:
        wrapper = tmp_path / "wrapper.html"
        wrapper.write_text(WRAPPER.format(width=width, report=report.as_uri()))
        options = [
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--allow-file-access-from-files", "--enable-logging=stderr", "--dump-dom"),
        ]
        said = subprocess.run(
            [BROWSER, *options, f"--user-data-dir={tmp_path / 'profile'}", wrapper.as_uri()], capture_output=True, text=True, check=True
        )
        assert "CONSOLE" not in said.stderr, [line for line in said.stderr.splitlines() if "CONSOLE" in line]
        rendered = re.search(r'<pre id="rendered">(.*?)</pre>', said.stdout, re.DOTALL)
        assert rendered is not None
        return dict(json.loads(html.unescape(rendered[1])))

    return browse


@pytest.mark.parametrize("width", [400, 1200])
def test_a_browser_renders_the_page_without_errors_and_without_horizontal_scrolling(
    tmp_path: Path, browse: Callable[[Path, int], dict[str, Any]], width: int
) -> None:
    changes = {"student.model": f"module:{'a' * 100}", "data.root": f"/{'b' * 100}"}
    folder = finished_run(tmp_path / "run", "shapes", overrides=changes, notes=["c" * 300])
    write_report(folder)
    rendered = browse(folder.report, width)
    assert rendered["title"].startswith("shapes, seed 0")
    assert rendered["images"] == [32, 32, 32]
    assert len(rendered["panels"]) == 3
    assert min(rendered["panels"]) > 150
    assert width - 20 < rendered["width"] <= width  # a scrollbar at most
    assert rendered["needed"] == rendered["width"]
