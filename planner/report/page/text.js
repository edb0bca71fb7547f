// Numbers as text, as planner/units.py writes them, and elements of the page. Text of the data only ever becomes text.

function digits(value, count) {
  return String(Number(value.toPrecision(count)));
}

function seconds(value) {
  if (!value) return "0 s";
  const size = Math.abs(value);
  if (size >= 1) return size < 1000 ? `${digits(value, 3)} s` : `${value.toFixed(0)} s`;
  return size >= 1e-3 ? `${digits(value * 1e3, 3)} ms` : `${digits(value * 1e6, 3)} µs`;
}

function bytes(value) {
  for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) {
    if (Math.abs(value) >= size) return `${value / size < 1000 ? digits(value / size, 3) : (value / size).toFixed(0)} ${unit}`;
  }
  return `${value.toFixed(0)} B`;
}

function count(value) {
  for (const [unit, size] of [["T", 1e12], ["G", 1e9], ["M", 1e6], ["k", 1e3]]) {
    if (Math.abs(value) >= size) return `${value / size < 1000 ? digits(value / size, 3) : (value / size).toFixed(0)}${unit}`;
  }
  return digits(value, 3);
}

function percent(share) {
  return `${digits(100 * share, 3)} %`;
}

function counted(number, noun) {
  return number === 1 ? `1 ${noun}` : `${number} ${noun}s`;
}

function byId(id) {
  return document.getElementById(id);
}

// An element with attributes and children; a child that is no element is text.
function element(name, attributes = {}, ...children) {
  const space = SVG_NAMES.has(name) ? "http://www.w3.org/2000/svg" : "http://www.w3.org/1999/xhtml";
  const found = document.createElementNS(space, name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) found.addEventListener(key.slice(2), value);
    else if (value !== null && value !== false) found.setAttribute(key, value === true ? "" : value);
  }
  found.append(...children.filter((child) => child !== null));
  return found;
}

const SVG_NAMES = new Set(["svg", "g", "path", "line", "rect", "circle", "text", "polyline", "title"]);

function pairs(list, rows) {
  list.replaceChildren(...rows.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
}

// A table of text from the data: {title, columns, rows, text: leading columns that are text, emphasis: row that stands out}.
function plainTable(data, cell = null, label = data.title || "Table") {
  const kind = (column) => (column < data.text ? "text" : null);
  const head = data.columns.some((name) => name.trim())
    ? [element("thead", {}, element("tr", {}, ...data.columns.map((name, c) => element("th", { scope: "col", class: kind(c) }, name))))]
    : [];
  const rows = data.rows.map((row, r) => element("tr", { class: r === data.emphasis ? "strong" : null },
    ...row.map((text, c) => element(c ? "td" : "th", { scope: c ? null : "row", class: c < data.text ? (data.columns.length < 3 ? "text wrap" : "text") : null },
      (cell && cell(r, c, text)) || text))));
  const table = element("table", {}, ...head, element("tbody", {}, ...rows));
  const region = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": label }, table);
  return data.title ? element("div", {}, element("h3", {}, data.title), region) : region;
}
