"""Tables: rows of values with a way to show each, as CSV (all digits), Markdown and HTML."""

from __future__ import annotations

import csv
import dataclasses
import html
import io
import math
from collections.abc import Callable
from typing import Any

from qtrain.statistics import Interval

Form = Callable[[Any], str]
_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclasses.dataclass(frozen=True)
class Column:
    """A name, how its values are shown, what to explain when the pointer rests on it; whether only the CSV has it."""

    name: str
    form: Form = str
    help: str = ""
    csv_only: bool = False


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of values: texts, numbers, intervals, None where there is nothing.

    slug: the name of its files, without the ending; note: a line below it.
    """

    title: str
    slug: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Any, ...], ...]
    note: str = ""

    def csv(self) -> str:
        """Comma-separated, numbers with all their digits; an interval is four columns."""
        spread = [any(isinstance(row[i], Interval) for row in self.rows) for i in range(len(self.columns))]
        names = []
        for column, wide in zip(self.columns, spread, strict=True):
            names += [column.name, *([f"{column.name} low", f"{column.name} high", f"{column.name} n"] if wide else [])]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(names)
        for row in self.rows:
            cells: list[Any] = []
            for value, wide in zip(row, spread, strict=True):
                cells += [_raw(each) for each in value] if isinstance(value, Interval) else [_raw(value)]
                cells += ["", "", ""] if wide and not isinstance(value, Interval) else []
            writer.writerow(cells)
        return out.getvalue()

    def markdown(self) -> str:
        """A heading, the table and the note."""
        seen = self._seen()
        lines = [f"### {self.title}", "", _line(self.columns[i].name for i in seen)]
        lines.append(_line("---:" if self._numeric(i) else "---" for i in seen))
        lines += [_line(show(row[i], self.columns[i].form) for i in seen) for row in self.rows]
        return "\n".join([*lines, *(["", self.note] if self.note else [])]) + "\n"

    def html(self, most: int) -> str:
        """A table whose columns can be sorted by; `most` rows of it."""
        seen = self._seen()
        columns = [self.columns[i] for i in seen]
        numeric = [self._numeric(i) for i in seen]
        heads = "".join(
            f'<th scope="col" tabindex="0" title="{html.escape(column.help, quote=True)}"{_right(right)}>'
            f"{html.escape(column.name)}</th>"
            for column, right in zip(columns, numeric, strict=True)
        )
        body = []
        for row in self.rows[:most]:
            cells = [(row[i], show(row[i], self.columns[i].form)) for i in seen]
            marked = zip(cells, numeric, strict=True)
            body.append("".join(f"<td{_right(right)}{_key(v)}>{html.escape(text)}</td>" for (v, text), right in marked))
        note = self.note
        if len(self.rows) > most:
            note = f"{most} of {len(self.rows)} rows; all of them are in {self.slug}.csv. {note}".strip()
        return (
            f'<table id="{self.slug}"><thead><tr>{heads}</tr></thead><tbody>'
            + "".join(f"<tr>{cells}</tr>" for cells in body)
            + "</tbody></table>"
            + (f'<p class="note">{html.escape(note)}</p>' if note else "")
        )

    def _seen(self) -> list[int]:
        return [i for i, column in enumerate(self.columns) if not column.csv_only]

    def _numeric(self, index: int) -> bool:
        values = [row[index] for row in self.rows if row[index] is not None]
        return bool(values) and all(isinstance(value, int | float | Interval) for value in values)


def show(value: Any, form: Form) -> str:
    """A cell as text: nothing for None and NaN, ``0.96 [0.95, 0.97]`` for an interval, ``0.96 (n = 1)`` without."""
    if isinstance(value, Interval):
        if not math.isfinite(value.estimate):
            return ""
        if value:
            return f"{form(value.estimate)} [{form(value.low)}, {form(value.high)}]"
        return f"{form(value.estimate)} (n = {value.n})" if value.n == 1 else form(value.estimate)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return form(value)


def decimals(places: int) -> Form:
    """Numbers with so many decimal places."""
    return lambda value: f"{value:.{places}f}"


def signed(form: Form) -> Form:
    """With a plus sign where it is above zero."""
    return lambda value: ("+" if value > 0 else "") + form(value)


def digits(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def few_digits(value: float) -> str:
    """Two significant digits, as much as a difference of a few seeds has."""
    return f"{value:.2g}"


def si(value: float) -> str:
    """Four significant digits and a prefix: ``11.4 G``.

    >>> si(11399069696.0), si(3688), si(12)
    ('11.40 G', '3.688 k', '12')
    """
    for size, prefix in _PREFIXES:
        if abs(value) >= 0.99995 * size:
            scaled = value / size
            return f"{scaled:.{max(0, 3 - max(0, len(str(int(abs(scaled) + 0.00005))) - 1))}f} {prefix}"
    return f"{value:.4g}"


def _raw(value: Any) -> Any:
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return value


def _line(cells: Any) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def _right(numeric: bool) -> str:
    return ' class="number"' if numeric else ""


def _key(value: Any) -> str:
    """What the script on the page sorts a number by."""
    number = value.estimate if isinstance(value, Interval) else value
    if isinstance(number, bool) or not isinstance(number, int | float):
        return ""
    return f' data-key="{number!r}"' if math.isfinite(number) else ' data-key=""'
