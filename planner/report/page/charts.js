// Charts that do not move, as SVG: sharp in print.

const CHART = { width: 900, height: 300, left: 70, right: 16, top: 14, bottom: 34 };
CHART.width = Math.min(Math.max(byId("memory-chart").clientWidth, 330), CHART.width); // text as large as everywhere
const MEMORY_COLOURS = ["#0b2a5b", "#56b4e9", "#e69f00", "#009e73", "#cc79a7"];

function ticks(most, count = 5) {
  const rough = most / count, base = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * base).find((k) => k >= rough);
  return Array.from({ length: Math.floor(most / step + 1e-9) + 1 }, (_, k) => k * step);
}

// Ticks of bytes stand at whole powers of two.
function byteTicks(most) {
  const unit = [2 ** 30, 2 ** 20, 2 ** 10, 1].find((size) => most >= size) || 1;
  return ticks(most / unit).map((k) => k * unit);
}

function frame(label, xTicks, yTicks, x, y, format) {
  const found = element("svg", { viewBox: `0 0 ${CHART.width} ${CHART.height}`, role: "img", "aria-label": label, class: "chart" });
  for (const k of yTicks) {
    found.append(
      element("line", { x1: CHART.left, x2: CHART.width - CHART.right, y1: y(k), y2: y(k), stroke: "#e4e8ed" }),
      element("text", { x: CHART.left - 8, y: y(k) + 4, "text-anchor": "end" }, format.y(k)),
    );
  }
  for (const k of xTicks) {
    found.append(element("text", { x: x(k), y: CHART.height - CHART.bottom + 18, "text-anchor": "middle" }, format.x(k)));
  }
  found.append(element("line", { x1: CHART.left, x2: CHART.width - CHART.right, y1: CHART.height - CHART.bottom, y2: CHART.height - CHART.bottom, stroke: "#8b96a5" }));
  return found;
}

function swatches(names, colours) {
  return element("ul", { class: "legend" }, ...names.map((name, k) => {
    const mark = element("span", { class: "swatch" });
    mark.style.background = colours[k];
    return element("li", {}, mark, name);
  }));
}

function memoryChart(data) {
  const totals = data.moments.map((moment) => moment.slice(1).reduce((a, b) => a + b, 0));
  const peak = totals.indexOf(Math.max(...totals)), most = totals[peak] * 1.12;
  const wide = CHART.width - CHART.left - CHART.right, high = CHART.height - CHART.top - CHART.bottom;
  const x = (time) => CHART.left + (time / data.length) * wide, y = (value) => CHART.top + high * (1 - value / most);
  const found = frame(`Memory of the busiest device over the step; at most ${bytes(totals[peak])}, in ${data.names[peak]}`,
    ticks(data.length, wide / 110), byteTicks(most), x, y, { x: (k) => seconds(k / 1e9), y: bytes });
  const ends = data.moments.map((moment, i) => (i + 1 < data.moments.length ? data.moments[i + 1][0] : data.length));
  let floor = data.moments.map(() => 0);
  data.parts.forEach((part, p) => {
    const top = floor.map((value, i) => value + data.moments[i][p + 1]);
    const over = top.map((value, i) => `${i ? "L" : "M"}${x(data.moments[i][0]).toFixed(1)} ${y(value).toFixed(1)}H${x(ends[i]).toFixed(1)}`);
    const back = floor.map((value, i) => `L${x(ends[i]).toFixed(1)} ${y(value).toFixed(1)}H${x(data.moments[i][0]).toFixed(1)}`).reverse();
    found.append(element("path", { d: `${over.join("")}${back.join("")}Z`, fill: MEMORY_COLOURS[p] }));
    floor = top;
  });
  const mark = element("line", { y1: CHART.top, y2: CHART.height - CHART.bottom, stroke: "#1b2430", "stroke-width": 2 });
  const at = x(data.moments[peak][0]), isRight = at > CHART.width / 2;
  found.append(
    element("circle", { cx: at, cy: y(totals[peak]), r: 4, fill: "#1b2430" }),
    element("text", { x: at + (isRight ? -8 : 8), y: y(totals[peak]) - 6, "text-anchor": isRight ? "end" : "start", "font-weight": 600 }, `${bytes(totals[peak])}, ${data.names[peak]}`), mark);
  const said = element("p", { class: "readout", "aria-live": "polite" });
  const share = data.limit ? `${percent(totals[peak] / data.limit)} of the ${bytes(data.limit)} allowed` : "";
  const slider = element("input", { type: "range", min: 0, max: data.moments.length - 1, value: peak, "aria-label": "Moment of the step" });
  const show = () => {
    const i = Number(slider.value), parts = data.parts.map((part, p) => `${part} ${bytes(data.moments[i][p + 1])}`);
    for (const end of ["x1", "x2"]) mark.setAttribute(end, x(data.moments[i][0]));
    slider.setAttribute("aria-valuetext", `${data.names[i]}: ${bytes(totals[i])}`);
    said.textContent = `${data.names[i]}, from ${seconds(data.moments[i][0] / 1e9)} on: ${bytes(totals[i])} (${parts.join(", ")})`;
  };
  slider.addEventListener("input", show);
  found.addEventListener("pointermove", (event) => {
    const box = found.getBoundingClientRect(), time = (((event.clientX - box.left) / box.width) * CHART.width - CHART.left) / wide * data.length;
    const behind = data.moments.findIndex((moment) => moment[0] > time);
    slider.value = behind < 0 ? data.moments.length - 1 : Math.max(behind - 1, 0);
    show();
  });
  show();
  return element("div", {},
    element("p", {}, `The busiest device holds at most ${bytes(totals[peak])}, in ${data.names[peak]}: ${share}. The safe bound that the limit is held against is ${bytes(data.bound)}.`),
    swatches(data.parts, MEMORY_COLOURS), found, element("div", { class: "bar" }, slider), said);
}

function bars(title, names, values, most, format) {
  const rows = names.map((name, k) => {
    const bar = element("i");
    bar.style.width = `${Math.min((100 * values[k]) / most, 100)}%`;
    return element("tr", {}, element("th", { scope: "row", class: "text" }, name), element("td", {}, format(values[k])), element("td", {}, element("span", { class: "measure" }, bar)));
  });
  return element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": title }, element("table", {}, element("tbody", {}, ...rows)));
}

function scalingChart(data) {
  const rate = (steps) => steps.map((step) => (step ? data.batch / step : null));
  const lines = [["planned", rate(data.planned), PALETTE[0], null], ["data parallelism", rate(data.data), PALETTE[5], "7 4"]];
  const first = lines[0][1].findIndex((value) => value);
  if (first >= 0) lines.push(["ideal", data.devices.map((n) => (lines[0][1][first] * n) / data.devices[first]), OTHER, "2 4"]);
  const mostX = Math.max(...data.devices), mostY = 1.05 * Math.max(...lines.flatMap(([, values]) => values.filter((value) => value)));
  const x = (n) => CHART.left + (n / mostX) * (CHART.width - CHART.left - CHART.right - 20);
  const y = (value) => CHART.top + (CHART.height - CHART.top - CHART.bottom) * (1 - value / mostY);
  const found = frame("Samples per second over the number of devices", data.devices.filter((n, k) => k === data.devices.length - 1 || x(data.devices[k + 1]) - x(n) > 24), ticks(mostY), x, y, { x: String, y: count });
  lines.forEach(([name, values, colour, dashes], k) => {
    const known = values.map((value, i) => [data.devices[i], value]).filter(([, value]) => value);
    found.append(element("polyline", { points: known.map(([n, value]) => `${x(n)},${y(value)}`).join(" "), fill: "none", stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dashes }));
    if (k < 2) for (const [n, value] of known) found.append(k ? element("rect", { x: x(n) - 4, y: y(value) - 4, width: 8, height: 8, fill: colour }) : element("circle", { cx: x(n), cy: y(value), r: 4.5, fill: colour }));
  });
  const rates = (k, i) => (lines[k][1][i] ? count(lines[k][1][i]) : "does not fit");
  const efficiency = (i) => (lines[0][1][i] && lines[2] ? percent(lines[0][1][i] / lines[2][1][i]) : "");
  const table = plainTable({
    title: "", text: 1, emphasis: null, columns: ["devices", "planned, samples/s", "data parallelism", "of ideal"],
    rows: data.devices.map((n, i) => [String(n), rates(0, i), rates(1, i), efficiency(i)]),
  });
  return element("div", {}, element("p", {}, `Predicted samples per second at batch ${data.batch} on more and more devices of the machine; ideal is that of the fewest, times as many.`),
    swatches(lines.map(([name]) => name), lines.map(([, , colour]) => colour)), found, table);
}

// Predicted and measured seconds of every layer, both on logarithmic axes.
function scatter(points, names) {
  const every = points.flatMap(([, predicted, measured]) => [predicted, measured]);
  const low = Math.log10(Math.min(...every)) - 0.15, high = Math.log10(Math.max(...every)) + 0.15;
  const scale = (value) => (Math.log10(value) - low) / (high - low);
  const x = (value) => CHART.left + scale(value) * (CHART.width - CHART.left - CHART.right), y = (value) => CHART.top + (CHART.height - CHART.top - CHART.bottom) * (1 - scale(value));
  const marks = Array.from({ length: Math.floor(high) - Math.ceil(low) + 1 }, (_, k) => 10 ** (Math.ceil(low) + k));
  const found = frame("Measured over predicted compute of every layer; on the line they are equal", marks, marks, x, y, { x: seconds, y: seconds });
  found.append(element("line", { x1: x(10 ** low), y1: y(10 ** low), x2: x(10 ** high), y2: y(10 ** high), stroke: OTHER, "stroke-dasharray": "5 4" }));
  for (const [i, predicted, measured] of points) {
    found.append(element("circle", { cx: x(predicted), cy: y(measured), r: 4, fill: PALETTE[0], "fill-opacity": 0.65 },
      element("title", {}, `${names[i]}: predicted ${seconds(predicted)}, measured ${seconds(measured)}`)));
  }
  found.append(element("text", { x: CHART.width - CHART.right, y: CHART.height - 2, "text-anchor": "end" }, "predicted"), element("text", { x: 4, y: 11 }, "measured"));
  return found;
}
