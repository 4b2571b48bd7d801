"use strict";

const figures = JSON.parse(document.getElementById("figures").textContent);
const places = [...document.querySelectorAll(".figure")];
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 600px)");
const readout = document.getElementById("readout");

// A copy of a figure with the colours of the style sheet in place of their names.
function coloured(part, style) {
  if (typeof part === "string") {
    return part.startsWith("var(--") ? style.getPropertyValue(part.slice(4, -1)).trim() : part;
  }
  if (Array.isArray(part)) {
    return part.map((item) => coloured(item, style));
  }
  if (part !== null && typeof part === "object") {
    return Object.fromEntries(Object.entries(part).map(([key, item]) => [key, coloured(item, style)]));
  }
  return part;
}

function draw() {
  const style = getComputedStyle(document.documentElement);
  for (const place of places) {
    const figure = coloured(figures[Number(place.dataset.figure)], style);
    if (narrow.matches) {
      figure.layout.dragmode = false; // a finger scrolls the page
      figure.layout.font.size = 10;
    }
    for (const trace of figure.data) {
      if (trace.hovertemplate) {
        delete trace.hovertemplate; // plotly leaves out labels that do not fit: `readout` shows the text
        trace.hoverinfo = "none";
      }
    }
    const config = { displaylogo: false, displayModeBar: false, responsive: true };
    Plotly.react(place, figure.data, figure.layout, config);
  }
}

// What is known of the point under the mouse, beside it; at the foot of a narrow window.
function tell({ event, points }) {
  const point = points[points.length - 1];
  const text = point.customdata ?? point.text;
  readout.hidden = !text;
  if (readout.hidden) {
    return;
  }
  readout.innerHTML = text; // as in a plotly label, all of the model's own text is escaped in it
  const room = { x: innerWidth - readout.offsetWidth - 24, y: innerHeight - readout.offsetHeight - 8 };
  const { clientX: x, clientY: y } = event;
  const left = x + 16 < room.x ? x + 16 : Math.max(8, x - 16 - readout.offsetWidth);
  const top = Math.max(8, Math.min(y - readout.offsetHeight / 2, room.y));
  readout.style.inset = narrow.matches ? "auto 0 0 0" : `${top}px auto auto ${left}px`;
}

function hush() {
  readout.hidden = true;
}

// Rows in the order of one column: numbers by their value, largest first at the first click.
function sort(heading) {
  const column = heading.cellIndex;
  const body = heading.closest("table").tBodies[0];
  const numeric = heading.classList.contains("n");
  const before = heading.getAttribute("aria-sort");
  const order = before === null ? (numeric ? "descending" : "ascending") : before === "ascending" ? "descending" : "ascending";
  const key = (row) => (numeric ? Number(row.cells[column].dataset.v) : row.cells[column].textContent);
  const compare = (a, b) => (numeric ? key(a) - key(b) : key(a).localeCompare(key(b), "en", { numeric: true }));
  const rows = [...body.rows].sort(compare);
  body.append(...(order === "ascending" ? rows : rows.reverse()));
  for (const other of heading.parentElement.cells) {
    other.removeAttribute("aria-sort");
  }
  heading.setAttribute("aria-sort", order);
}

for (const heading of document.querySelectorAll("table.sortable th")) {
  heading.querySelector("button").addEventListener("click", () => sort(heading));
}
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
draw();
for (const place of places) {
  place.on("plotly_hover", tell);
  place.on("plotly_unhover", hush);
}
addEventListener("scroll", hush);
