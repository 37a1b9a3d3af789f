"""The page of ``qtrain report``: one file that is strict HTML, asks for nothing, and works in a browser."""

import html.parser
import json
import re
import shutil
import subprocess

import pytest
from PIL import Image
from report_runs import STATIC, write_run, write_sweep

from qtrain.report import find_runs, make_report, read_runs

VOID = {"meta", "link", "img", "br", "hr", "input"}
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
HARD = "<b>&\"quoted\" | 'name' </script>"


class Strict(html.parser.HTMLParser):
    """Refuses tags that are not closed in order; keeps every attribute and the text of tables."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.links, self.ids, self.tables = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        assert len(found) == len(attributes), f"an attribute twice: {tag} {attributes}"
        self.tags.append((tag, found))
        self.links += [found[name] for name in ("src", "href", "action", "data", "srcset", "poster") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag == "table":
            self.tables.append([])
        if tag == "tr" and self.tables:
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> while {self.open} are open"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    write_sweep(folder, seeds=(0, 1))
    write_run(folder / "hard", {**STATIC, "schedule.bits": 8, "model.name": HARD}, bitops=1e9, accuracy=0.4)
    write_run(folder / "going on", {**STATIC, "schedule.bits": 5}, finished=False, rows=3)
    runs = read_runs(find_runs([folder]), [])
    report = make_report(runs, [f"a note with {HARD}"], title=HARD, compare_by="schedule")
    out = tmp_path_factory.mktemp("out")
    (out / "index.html").write_bytes(report.files["index.html"])
    return out / "index.html", report


def test_it_is_strict_and_has_everything_inside(page):
    text = page[0].read_text()
    found = Strict(text)
    assert text.startswith("<!DOCTYPE html>")
    assert len(found.ids) == len(set(found.ids))
    for link in found.links:
        assert link.startswith("data:") or link[1:] in found.ids, link[:80]
    assert not re.findall(r"@import|url\(", text) and "http:" not in text and "https:" not in text
    images = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(images) == sum(name.endswith(".png") for name in page[1].files) >= 6
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in images)
    assert sum(tag == "script" for tag, _ in found.tags) == 1


def test_what_a_config_says_is_text(page):
    found = Strict(page[0].read_text())
    points = next(table for table in found.tables if table[0][1] == "point")
    assert sum(HARD in row[1] for row in points) == 1
    assert not any(tag == "b" for tag, _ in found.tags)
    table = page[1].files["points_digits_test_accuracy.md"].decode()
    assert HARD.replace("|", "\\|") in table


@pytest.mark.skipif(BROWSER is None, reason=f"there is none of {', '.join(BROWSERS)} to open the page with")
def test_in_a_browser(page, tmp_path):
    """It loads without a complaint, its pictures have a size, a click sorts a table, another one turns it round."""
    script = """<script>
      window.addEventListener("load", function () {
        var table = document.querySelector("table[id^=points]"), out = {};
        function column(i) {
          return Array.prototype.map.call(table.tBodies[0].rows, function (row) { return row.cells[i].textContent; });
        }
        var heads = Array.prototype.map.call(table.tHead.rows[0].cells, function (head) { return head.textContent; });
        heads.forEach(function (name, i) {
          var head = table.tHead.rows[0].cells[i];
          head.click();
          out[name] = { up: column(i), state: head.getAttribute("aria-sort") };
          head.click();
          out[name].down = column(i);
        });
        var sizes = Array.prototype.map.call(document.images, function (image) { return image.naturalWidth; });
        var result = document.createElement("pre");
        result.id = "result";
        result.textContent = JSON.stringify({ columns: out, sizes: sizes });
        document.body.appendChild(result);
      });</script>"""
    copy = tmp_path / "index.html"
    copy.write_text(page[0].read_text().replace("</body>", script + "</body>"))
    shot = tmp_path / "shot.png"
    command = [
        BROWSER,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--disable-dev-shm-usage",
    ]
    command += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1200,2000", "--virtual-time-budget=5000"]
    done = subprocess.run(
        [*command, "--dump-dom", copy.as_uri()], capture_output=True, text=True, timeout=120, check=True
    )
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'<pre id="result">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    result = json.loads(html.unescape(found[1]))
    assert len(result["sizes"]) >= 6 and min(result["sizes"]) > 400
    columns = result["columns"]
    numbers = [float(cell) for cell in columns["#"]["up"] if cell]
    assert numbers == sorted(numbers) == list(range(1, 8)) and columns["#"]["up"][-1] == ""  # the unfinished one last
    assert [cell for cell in columns["#"]["down"] if cell] == [str(n) for n in range(7, 0, -1)]
    assert columns["#"]["down"][-1] == "" and columns["#"]["state"] == "ascending"
    accuracies = [float(cell.split()[0]) for cell in columns["test accuracy, %"]["up"] if cell]
    assert accuracies == sorted(accuracies) and accuracies[0] == 40.0
    costs = [cell for cell in columns["BitOps"]["up"] if cell]
    assert costs == ["1.000 G", "3.000 G", "4.000 G", "4.600 G", "6.000 G", "6.400 G", "8.000 G"]
    texts = [cell for cell in columns["point"]["up"] if cell[0].isdigit()]
    assert [int(cell[0]) for cell in texts] == sorted(int(cell[0]) for cell in texts)
    subprocess.run([*command, f"--screenshot={shot}", page[0].as_uri()], capture_output=True, timeout=120, check=True)
    image = Image.open(shot).convert("RGB")
    assert len(image.getcolors(1 << 24)) > 200
