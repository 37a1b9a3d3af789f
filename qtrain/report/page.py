"""One HTML page that needs no other file: pictures as data, styles and a sorting script inline, nothing fetched."""

from __future__ import annotations

import base64
import dataclasses
import html
from collections.abc import Sequence

from qtrain.report.tables import Table

MOST_ROWS = 2000
"""Rows of a table on the page; its CSV has all."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """A PNG, the name of its file, and what it shows."""

    name: str
    png: bytes
    caption: str


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading and what is below it, in this order."""

    title: str
    text: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


def render(title: str, lead: str, notes: Sequence[str], sections: Sequence[Section]) -> str:
    """The page."""
    names = {section.title: f"section-{index}" for index, section in enumerate(sections)}
    links = "".join(f'<a href="#{names[s.title]}">{html.escape(s.title)}</a>' for s in sections)
    remarks = ""
    if notes:
        lines = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
        is_open = " open" if len(notes) <= 12 else ""
        remarks = f'<details class="notes"{is_open}><summary>To know: {len(notes)}</summary><ul>{lines}</ul></details>'
    body = "".join(_section(section, names[section.title]) for section in sections)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # What the page would load from elsewhere the browser is told to refuse: the one file is all there is.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
        f'<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>'
        f"<header><h1>{html.escape(title)}</h1><p>{html.escape(lead)}</p><nav>{links}</nav></header>"
        f"<main>{remarks}{body}</main><script>{_SCRIPT}</script></body></html>\n"
    )


def _section(section: Section, name: str) -> str:
    texts = "".join(f"<p>{html.escape(text)}</p>" for text in section.text)
    figures = "".join(map(_figure, section.figures))
    tables = []
    for table in section.tables:
        heading = f"<h3>{html.escape(table.title)}</h3>" if table.title != section.title else ""
        tables.append(f'{heading}<div class="wide">{table.html(MOST_ROWS)}</div>')
    return f'<section id="{name}"><h2>{html.escape(section.title)}</h2>{texts}{figures}{"".join(tables)}</section>'


def _figure(figure: Figure) -> str:
    data = base64.b64encode(figure.png).decode()
    caption = html.escape(figure.caption)
    alternative = html.escape(figure.caption, quote=True)
    return (
        f'<figure><img alt="{alternative}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption} <code>{html.escape(figure.name)}</code></figcaption></figure>"
    )


_STYLE = """
:root{color-scheme:light;--line:#d8dde3;--soft:#5a6570}
body{margin:0;font:15px/1.5 system-ui,sans-serif;color:#1c2126;background:#fff}
header,main{max-width:1180px;margin:0 auto;padding:0 20px}
h1{font-size:26px;margin:26px 0 4px}h2{font-size:20px;margin:38px 0 8px;border-bottom:1px solid var(--line)}
h3{font-size:16px;margin:22px 0 6px}p{max-width:80em}
nav a{display:inline-block;margin:0 14px 4px 0;color:#0b5fa5}
figure{margin:14px 0 20px}figure img{max-width:100%;height:auto;border:1px solid var(--line)}
figcaption,.note{color:var(--soft);font-size:13.5px;max-width:80em}code{font-size:12.5px;color:var(--soft)}
.notes{background:#fff8e6;border:1px solid #eed9a2;padding:6px 14px;margin:16px 0}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13.5px;margin:6px 0}
th,td{padding:3px 10px;border-bottom:1px solid var(--line);text-align:left;white-space:nowrap}
th{cursor:pointer;background:#f3f5f7;position:sticky;top:0}th[aria-sort=ascending]::after{content:" \\25B2"}
th[aria-sort=descending]::after{content:" \\25BC"}.number{text-align:right;font-variant-numeric:tabular-nums}
tbody tr:hover{background:#f5f9ff}
@media print{nav{display:none}th{position:static}}
"""

# Numbers sort by their data-key, texts with the numbers in them in order; what is empty stays last both ways.
_SCRIPT = """
"use strict";
document.querySelectorAll("th").forEach(function (head) {
  function sort() {
    var row = head.parentNode, table = row.closest("table"), body = table.tBodies[0];
    var column = Array.prototype.indexOf.call(row.children, head);
    var down = head.getAttribute("aria-sort") === "ascending", sign = down ? -1 : 1;
    row.querySelectorAll("th").forEach(function (each) { each.removeAttribute("aria-sort"); });
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    var rows = Array.prototype.map.call(body.rows, function (line) {
      var cell = line.cells[column], key = cell.dataset.key;
      return { line: line, text: cell.textContent, key: key === undefined || key === "" ? null : Number(key) };
    });
    rows.sort(function (a, b) {
      if (a.key !== null && b.key !== null) return sign * (a.key - b.key);
      if (a.key !== null || b.key !== null) return a.key !== null ? -1 : 1;
      if (!a.text || !b.text) return a.text ? -1 : b.text ? 1 : 0;
      return sign * a.text.localeCompare(b.text, "en", { numeric: true });
    });
    rows.forEach(function (each) { body.appendChild(each.line); });
  }
  head.addEventListener("click", sort);
  head.addEventListener("keydown", function (event) {
    if (event.key === "Enter" || event.key === " ") { event.preventDefault(); sort(); }
  });
});
"""
