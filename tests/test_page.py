"""The page of a run: all of it, in one file, in any browser."""

import base64
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath
from test_report import cifar_row

from experiments import points
from gddim.evaluation import __main__ as command_line
from gddim.evaluation.page import page
from gddim.experiment.cli import execute, main, parse
from gddim.logs import Log, read_scalars

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
SMALL = [
    *("--train.steps=24", "--train.batch=16", "--train.warmup=4", "--train.save-every=8", "--train.report-every=4"),
    *("--net.width=16", "--net.depth=1", "--data.train-points=100", "--data.test-points=50"),
    *("--sampling.samples=8", "--sampling.batch=8", "--sampling.nfe=3", "--eval.samples=8", "--eval.batch=8"),
    *("--eval.nfe", "3", "--eval.samplers", "gddim:2", "em"),
]  # fmt: skip
SECTIONS = ["Samples", "Results", "Trajectories", "Latents", "Training", "Configuration", "Provenance"]


def do(workdir: Path, verb: str, *more: str) -> None:
    execute(parse(points.EXPERIMENT, [verb, f"--workdir={workdir}", *SMALL, *more]))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run, and what follows it."""
    workdir = tmp_path_factory.mktemp("run") / "w"
    for verb in ("run", "encode"):
        do(workdir, verb)
    return workdir


def sections(text: str) -> list[str]:
    return re.findall(r"<h2 [^>]*>(.*?)</h2>", text)


def test_a_page_has_all_of_a_run_and_needs_nothing_else(finished: Path):
    text = (finished / "report.html").read_text()
    assert sections(text) == SECTIONS
    for words in (
        "<h1>points</h1>",
        "critically damped Langevin diffusion",
        "sde.m_inv",
        "train.steps",
        "gddim:2",
        "NFE 3",
    ):
        assert words in text
    assert json.loads((finished / "results.jsonl").read_text().splitlines()[0])["provenance"]["checkpoint"] in text
    pictures = re.findall(r'src="data:image/[\w+]+;base64,([^"]*)"', text)
    assert len(pictures) == text.count("<img") == 7, "samples, results, two of trajectories and latents, the loss"
    assert base64.b64encode((finished / "trajectory.svg").read_bytes()).decode() in pictures
    outside = re.sub(r"base64,[^\"]*", "", text)
    assert not re.findall(r"https?:|src=\"(?!data)|href=\"(?!#)|@import|<script|url\(", outside)


@pytest.mark.slow  # each of them compiles what it does
def test_every_verb_that_writes_pictures_writes_the_page(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "w")
    do(tmp_path / "w", "likelihood")
    before = (tmp_path / "w" / "report.html").read_bytes()
    assert sections(before.decode()) == [*SECTIONS[:4], "Likelihood", *SECTIONS[4:]]
    for verb in ("sample", "evaluate", "encode"):
        (tmp_path / "w" / "report.html").unlink()
        do(tmp_path / "w", verb)
        assert (tmp_path / "w" / "report.html").read_bytes() == before, verb


def test_what_is_no_page_is_refused_before_long_work(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(finished, tmp_path / "w")
    (tmp_path / "w" / "report.html").write_text("<html>mine</html>")
    for verb in ("sample", "evaluate", "encode", "likelihood"):
        with pytest.raises(SystemExit, match="2"):
            main(points.EXPERIMENT, [verb, f"--workdir={tmp_path / 'w'}", *SMALL])
        assert "report.html was not written by this program" in capsys.readouterr().err
    assert (tmp_path / "w" / "report.html").read_text() == "<html>mine</html>"


def test_the_table_of_a_run_keeps_every_feature_space(finished: Path, tmp_path: Path):
    shutil.copytree(finished, tmp_path / "w")
    results = tmp_path / "w" / "results.jsonl"
    other = cifar_row("gddim:3", 10, 7.25)
    results.write_text(json.dumps(other) + "\n" + results.read_text())
    do(tmp_path / "w", "evaluate", "--eval.samplers", "gddim:2")
    text = (tmp_path / "w" / "results.md").read_text()
    assert re.findall(r"^## .*, (\S+)$", text, re.MULTILINE) == ["inception-2015", "pixels"]
    assert "| gddim:3 | 7.25 |" in text
    assert "| gddim:2 |" in text
    assert "7.25" in (tmp_path / "w" / "report.html").read_text()


def test_the_command_line_writes_pages(finished: Path, tmp_path: Path, monkeypatch, capsys):
    def report(*words: object) -> str | int:
        monkeypatch.setattr(sys, "argv", ["gddim.evaluation", "report", *map(str, words)])
        try:
            command_line.main()
        except SystemExit as ended:
            return int(ended.code or 0)
        return capsys.readouterr().out

    shutil.copytree(finished, tmp_path / "w")
    for path in [tmp_path / "w" / "report.html", *(tmp_path / "w").glob("results.[!j]*")]:
        path.unlink()
    assert str(tmp_path / "w" / "report.html") in str(report(tmp_path / "w"))
    for name in ("report.html", "results.md", "results.png", "results.svg", "results.pdf"):
        assert (tmp_path / "w" / name).read_bytes() == (finished / name).read_bytes()
    report(finished / "results.jsonl", tmp_path / "OUT")
    assert (tmp_path / "OUT.html").read_bytes() == (finished / "report.html").read_bytes()
    assert report(finished / "results.jsonl") == 2, "a name is missing"
    (tmp_path / "w" / "results.jsonl").unlink()
    assert "report.html" in str(report(tmp_path / "w")), "a run that was not evaluated has a page too"
    assert "Results" not in sections((tmp_path / "w" / "report.html").read_text())


def test_what_a_page_tells_is_text(tmp_path: Path):
    row = cifar_row("gddim:3", 10, 7.25)
    row["provenance"]["experiment"] = "<script>alert(1)</script>"
    text = page(epath.Path(tmp_path), [row])
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert "<em>gDDIM, Table 3</em>" in text


def test_a_curve_is_that_of_the_last_life_from_where_it_began(tmp_path: Path):
    values = {"grad_norm": 1.0, "learning_rate": 1e-3}
    for life, (start, end, loss) in enumerate([(0, 50, 1.0), (20, 40, 2.0)]):
        log = Log(str(tmp_path / str(life)), step=start, steps=50, batch=1)
        for step in range(start + 10, end + 1, 10):
            log.scalars(step, {"loss": loss, **values})
        log.close()
        (file,) = (tmp_path / str(life)).iterdir()
        file.rename(tmp_path / f"events.out.tfevents.{life}")
    assert read_scalars(epath.Path(tmp_path), "train/loss") == {10: 1.0, 20: 1.0, 30: 2.0, 40: 2.0}
    last = tmp_path / "events.out.tfevents.1"
    last.write_bytes(last.read_bytes()[:-5])  # killed while it wrote
    assert read_scalars(epath.Path(tmp_path), "train/loss")[30] == 2.0
    last.write_bytes(struct.pack("<Q", 10**9))
    assert len(read_scalars(epath.Path(tmp_path), "train/loss")) == 5
    assert read_scalars(epath.Path(tmp_path / "none"), "train/loss") == {}


LOOK = """<script>
addEventListener("load", () => {
  const light = color => color.match(/[\\d.]+/g).slice(0, 3).map(Number).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const page = light(getComputedStyle(document.body).backgroundColor);
  const contrasts = [...document.querySelectorAll("h1, h2, p, td, th, a, figcaption")].map(part => {
    const text = light(getComputedStyle(part).color);
    return (Math.max(text, page) + 0.05) / (Math.min(text, page) + 0.05);
  });
  const told = {
    pictures: [...document.images].map(image => image.complete && image.naturalWidth),
    requests: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    dark: page < 0.2,
    contrast: Math.min(...contrasts),
  };
  document.body.innerHTML = "<pre>" + JSON.stringify(told) + "</pre>";
});
</script>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="needs chromium or chrome")
@pytest.mark.parametrize("scheme", [0, 1], ids=["dark", "light"])
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_the_page(finished: Path, tmp_path: Path, scheme: int, width: int):
    text = (finished / "report.html").read_text()
    assert "default-src 'none'" in text, "nothing from elsewhere, and no script"
    (tmp_path / "page.html").write_text(re.sub("<meta http-equiv[^>]*>", lambda _: LOOK, text))
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900"]
    command += [f"--blink-settings=preferredColorScheme={scheme}", f"--user-data-dir={tmp_path / 'profile'}"]
    shown = subprocess.run(
        [*command, "--virtual-time-budget=5000", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    told = json.loads(re.findall(r"<pre>(.*)</pre>", shown)[-1])
    assert len(told["pictures"]) == 7
    assert all(width > 100 for width in told["pictures"])
    assert told["requests"] == 0
    assert told["overflow"] <= 0
    assert told["dark"] == (scheme == 0)
    assert told["contrast"] > 4.5
    subprocess.run([*command, f"--screenshot={tmp_path / 'page.png'}", (finished / "report.html").as_uri()], check=True)
    assert (tmp_path / "page.png").stat().st_size > 10_000
