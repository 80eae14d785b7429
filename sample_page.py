"""One self-contained HTML page on which synthetic queries are browsed: sorted, searched, kept or dropped."""

import json
import random
from collections.abc import Collection
from typing import Any

from formats import SyntheticQuery, whole_file

SHOWN_CHARS = 2000  # of a document

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
    content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width">
<title>Synthetic queries</title>
<style>
body { font: 15px/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem; color: #222 }
#controls { position: sticky; top: 0; background: #fff; padding: .6rem 0; display: flex; gap: .8rem;
    align-items: center }
input { flex: 1; font: inherit; padding: .3rem .5rem }
select { font: inherit; padding: .3rem }
#scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; min-width: 60rem; table-layout: fixed }
th { text-align: left; border-bottom: 2px solid #888; padding: 0 }
th button { font: inherit; font-weight: 600; border: 0; background: none; padding: .3rem; cursor: pointer; width: 100%;
    text-align: left }
th[aria-sort=ascending] button::after { content: " \\2191" }
th[aria-sort=descending] button::after { content: " \\2193" }
td { vertical-align: top; border-bottom: 1px solid #ddd; padding: .4rem .3rem; overflow-wrap: anywhere }
td.score { text-align: right; font-variant-numeric: tabular-nums }
td.document div { max-height: 4.4em; overflow: hidden; color: #555; cursor: pointer }
td.document div.open { max-height: none }
tr.kept td:first-child { border-left: 4px solid #2a7 }
tr.dropped td:first-child { border-left: 4px solid #c55 }
tr.dropped td.question { color: #777 }
</style>
</head>
<body>
<h1>Synthetic queries</h1>
<p id="about"></p>
<div id="controls">
<input id="search" type="search" placeholder="Search questions, documents and ids" aria-label="Search">
<select id="which" aria-label="Which">
<option value="">kept and dropped</option><option value="kept">kept</option><option value="dropped">dropped</option>
</select>
<span id="count"></span>
</div>
<div id="scroll">
<table>
<colgroup><col style="width:31%"><col style="width:5rem"><col style="width:10rem"><col><col style="width:9rem">
</colgroup>
<thead><tr id="head"></tr></thead>
<tbody id="rows"></tbody>
</table>
</div>
<script type="application/json" id="data">DATA</script>
<script>
"use strict";
const {about, rows} = JSON.parse(document.getElementById("data").textContent);
const columns = ["question", "score", "fate", "document", "doc_id"];
const title = {question: "Question", score: "Score", fate: "Kept?", document: "Document", doc_id: "Id"};
const element = id => document.getElementById(id);
let by = "score", direction = -1;

function compare(a, b) {
  const [x, y] = [a[by], b[by]];
  if (x === null || y === null) return (x === null) - (y === null);  // without a score: always last
  return direction * (typeof x === "number" ? x - y : String(x).localeCompare(String(y)));
}

function show() {
  const word = element("search").value.toLowerCase(), which = element("which").value;
  const shown = rows.filter(row => (!which || which === (row.fate === "kept" ? "kept" : "dropped"))
    && (row.question + "\\n" + row.document + "\\n" + row.doc_id).toLowerCase().includes(word)).sort(compare);
  element("count").textContent = shown.length + " of " + rows.length;
  element("rows").replaceChildren(...shown.map(row => {
    const line = document.createElement("tr");
    line.className = row.fate === "kept" ? "kept" : "dropped";
    for (const name of columns) {
      const cell = line.insertCell();
      cell.className = name;
      const inner = name === "document" ? cell.appendChild(document.createElement("div")) : cell;
      // textContent, never innerHTML: what a document or a language model wrote stays text.
      inner.textContent = name === "score" ? (row.score === null ? "" : row.score.toFixed(3)) : row[name];
      if (name === "document") inner.onclick = () => inner.classList.toggle("open");
    }
    return line;
  }));
  for (const cell of element("head").children)
    if (cell.dataset.name === by) cell.setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
    else cell.removeAttribute("aria-sort");
}

for (const name of columns) {
  const cell = document.createElement("th"), button = document.createElement("button");
  cell.dataset.name = name;
  button.textContent = title[name];
  button.onclick = () => {
    direction = by === name ? -direction : name === "score" ? -1 : 1;
    by = name;
    show();
  };
  cell.append(button);
  element("head").append(cell);
}
element("about").textContent = about;
element("search").oninput = element("which").onchange = show;
show();
</script>
</body>
</html>
"""


class Sample:
    """A uniform sample of rows, of which only `size` are held at a time (Vitter's algorithm R, 1985)."""

    def __init__(self, size: int) -> None:
        self.size, self.seen, self.rows, self._random = size, 0, [], random.Random(0)

    def add(self, query: SyntheticQuery, score: float | None, why_dropped: str | None) -> None:
        self.seen += 1
        at = len(self.rows) if len(self.rows) < self.size else self._random.randrange(self.seen)
        if at < self.size:
            self.rows[at : at + 1] = [(query, score, why_dropped)]

    def write(self, path: str, kept: Collection[int], about: str) -> None:
        """The page. `kept` are the lines of the input that were kept."""
        rows: list[dict[str, Any]] = [
            {
                "question": query.question,
                "score": score,
                "fate": why or ("kept" if query.line in kept else "below the cut"),
                "document": query.doc_text[:SHOWN_CHARS],
                "doc_id": query.doc_id,
            }
            for query, score, why in self.rows
        ]
        about += f" Shown are {len(rows):,} of {self.seen:,} rows" + ("." if len(rows) == self.seen else ", at random.")
        data = json.dumps({"about": about, "rows": rows})  # ASCII, so that no character can end a script
        for character in "<>&":
            data = data.replace(character, f"\\u{ord(character):04x}")
        with whole_file(path) as file:
            file.write(PAGE.replace("DATA", data))
