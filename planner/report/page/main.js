// Everything put together: the data is in the page, as JSON.

const DATA = JSON.parse(byId("data").textContent);
const LAYERS = DATA.layers, SPLITS = LAYERS.splits;

function splitColour(i) {
  const k = LAYERS.split[i];
  return k < PALETTE.length ? PALETTE[k] : OTHER;
}

const COLOURS = {
  split: { name: "split", colour: splitColour },
  ...(DATA.stages ? { stage: { name: "stage", colour: (i) => PALETTE[LAYERS.stage[i] % PALETTE.length] } } : {}),
  ...Object.fromEntries([["compute", "compute", seconds], ["exposed", "exposed communication", seconds], ["memory", "memory", bytes], ["flop", "FLOP", count], ["params", "parameters", count]].map(([key, name, format]) => {
    const most = Math.max(...LAYERS[key], 0);
    return [key, { name, format, most, colour: (i) => (most ? shade(Math.sqrt(LAYERS[key][i] / most)) : SCALE[0]) }];
  })),
};

function overview() {
  byId("title").textContent = DATA.title;
  pairs(byId("key"), DATA.key);
  byId("facts").append(plainTable({ ...DATA.facts, title: "" }, null, "The plan in figures"));
  byId("sentences").append(...DATA.sentences.map((text) => element("li", {}, text)));
  if (DATA.stages) byId("stages").append(plainTable(DATA.stages));
  pairs(byId("sources"), DATA.provenance);
}

function navigation() {
  const sections = [...document.querySelectorAll("main > section")];
  byId("nav").append(...sections.map((section) => element("a", { href: `#${section.id}` }, section.dataset.nav)));
}

function columns() {
  const number = (name, key, format, hint) => ({ name, hint, value: (i) => LAYERS[key][i], text: (i) => (LAYERS[key][i] ? format(LAYERS[key][i]) : "") });
  const text = (name, value) => ({ name, isText: true, value, text: value });
  const found = [
    text("layer", (i) => LAYERS.id[i]), text("operator", (i) => LAYERS.op[i]),
    text("split", (i) => `${SPLITS[LAYERS.split[i]].name}${LAYERS.halo[i] ? `, halo ${LAYERS.halo[i]}` : ""}`),
    text("output", (i) => LAYERS.shape[i]),
    number("compute", "compute", seconds, "forward, backward and update, in a step on the busiest device"),
    number("transfer", "transfer", seconds, "communication that compute waits for, halos apart"),
    number("halo", "halo_s", seconds, "exchanges of neighbours' rows, hidden or not"),
    number("sync", "sync", seconds, "reductions of gradients, hidden or not"),
    number("exposed", "exposed", seconds, "communication that nothing hides"),
    number("memory", "memory", bytes, "held for the step on the busiest device"),
    number("parameters", "params", count), number("FLOP", "flop", count),
  ];
  if (DATA.stages) found.splice(1, 0, { name: "stage", value: (i) => LAYERS.stage[i], text: (i) => String(LAYERS.stage[i]) });
  if (LAYERS.measured) found.push(number("measured compute", "measured", seconds), number("measured transfer", "measured_transfer", seconds));
  if (LAYERS.next) {
    const more = (i) => (LAYERS.next[i] ? `${LAYERS.more[i] > 0 ? "+" : ""}${percent(LAYERS.more[i])}` : "");
    found.push(text("next best split", (i) => LAYERS.next[i]), { name: "step with it", value: (i) => LAYERS.more[i], text: more });
  }
  return found;
}

function network() {
  const view = new NetworkView(byId("graph"), LAYERS, DATA.graph, choose);
  const table = new LayerTable(byId("layers"), byId("more"), columns(), (i) => {
    view.choose(i);
    byId("graph").scrollIntoView({ block: "nearest" });
  });
  view.enter = (i) => table.enter(i);
  view.codes = LAYERS.split.map((k) => SPLITS[k].code);
  const title = byId("details");

  function choose(i) {
    table.choose(i);
    title.classList.toggle("empty", i < 0);
    title.replaceChildren(...details(i));
  }

  function details(i) {
    if (i < 0) return [element("h3", {}, "No layer selected"), element("p", {}, "Choose one in the picture or in the table.")];
    const rows = columns().slice(1).map((column) => [column.name, column.text(i)]);
    const neighbours = (list) => list.map((k) => LAYERS.id[k]).join(", ");
    rows.push(["absorbs", LAYERS.absorbed[i]], ["reads", neighbours(view.before[i])], ["read by", neighbours(view.behind[i])], ["in the code", LAYERS.origin[i]]);
    const moved = DATA.graph.edges.filter((edge) => edge[1] === i).reduce((sum, edge) => sum + edge[3], 0);
    rows.push(["inputs sent", moved ? `${bytes(moved)} by the busiest device` : ""]);
    const list = element("dl");
    for (const [name, value] of rows) if (value) list.append(element("dt", {}, name), element("dd", {}, value));
    return [element("h3", {}, LAYERS.id[i]), list];
  }

  function filter() {
    const words = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const operator = byId("operator").value, split = byId("split").value, talks = byId("talks").checked;
    const shown = LAYERS.id.map((id, i) => {
      const text = `${id} ${LAYERS.op[i]} ${LAYERS.absorbed[i]} ${SPLITS[LAYERS.split[i]].name} ${LAYERS.halo[i]} ${LAYERS.origin[i]}`.toLowerCase();
      return words.every((word) => text.includes(word)) && (!operator || LAYERS.op[i] === operator) && (split === "" || LAYERS.split[i] === Number(split))
        && (!talks || LAYERS.transfer[i] + LAYERS.halo_s[i] + LAYERS.sync[i] > 0);
    });
    const kept = shown.flatMap((isShown, i) => (isShown ? [i] : []));
    view.shown = kept.length === shown.length ? null : shown;
    view.sheet.redraw();
    table.show(kept);
    byId("count").textContent = `${kept.length} of ${counted(shown.length, "layer")}`;
  }

  function legend() {
    const chosen = COLOURS[byId("colour").value];
    view.colours = LAYERS.id.map((_, i) => chosen.colour(i));
    view.sheet.redraw();
    const legends = { split: splitLegend, stage: stageLegend };
    byId("legend").replaceChildren(...(legends[byId("colour").value] || scaleLegend)(chosen));
  }

  function swatch(colour, text) {
    const found = element("span", { class: "swatch" }, text);
    found.style.background = colour;
    found.style.color = inkOn(colour);
    return found;
  }

  function scaleLegend({ format, most }) {
    return [0, 0.25, 0.5, 0.75, 1].map((share) => element("li", {}, swatch(shade(Math.sqrt(share)), ""), format(most * share)));
  }

  function stageLegend({ colour }) {
    const first = [...new Set(LAYERS.stage)].map((stage) => LAYERS.stage.indexOf(stage));
    return first.map((i) => element("li", {}, swatch(colour(i), String(LAYERS.stage[i])), `stage ${LAYERS.stage[i]}`));
  }

  function splitLegend() {
    const total = LAYERS.compute.reduce((a, b) => a + b, 0) || 1;
    return SPLITS.map(({ name, code }, k) => {
      const here = LAYERS.split.flatMap((other, i) => (other === k ? [i] : []));
      const share = here.reduce((sum, i) => sum + LAYERS.compute[i], 0) / total;
      const toggle = () => {
        byId("split").value = byId("split").value === String(k) ? "" : String(k);
        filter();
      };
      return element("li", {}, element("button", { type: "button", title: "Show only these", onclick: toggle }, swatch(splitColour(here[0]), code), `${name}: ${counted(here.length, "layer")}, ${percent(share)} of compute`));
    });
  }

  const option = (value, text) => element("option", { value }, text);
  byId("operator").append(option("", "all"), ...[...new Set(LAYERS.op)].sort().map((op) => option(op, op)));
  byId("split").append(option("", "all"), ...SPLITS.map(({ name }, k) => option(k, name)));
  byId("colour").append(...Object.entries(COLOURS).map(([key, { name }]) => option(key, name)));
  byId("colour").addEventListener("change", legend);
  byId("filters").addEventListener("input", filter);
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", () => setTimeout(filter));
  byId("graph-in").addEventListener("click", () => view.zoom(1.4));
  byId("graph-out").addEventListener("click", () => view.zoom(1 / 1.4));
  byId("graph-fit").addEventListener("click", () => view.fit());
  legend();
  filter();
  choose(-1);
  return view;
}

function timeline(view) {
  const data = DATA.timeline;
  const time = new TimeView(byId("time"), data, LAYERS.id, (text) => { byId("event").textContent = text; }, (layer, goes = true) => {
    if (layer < 0) return;
    view.choose(layer);
    if (goes) byId("graph").focus();
  });
  byId("time-in").addEventListener("click", () => time.zoom(1.5));
  byId("time-out").addEventListener("click", () => time.zoom(1 / 1.5));
  byId("time-fit").addEventListener("click", () => time.fit());
  const used = new Set(time.rows.flatMap((row) => row.events.map((event) => event[1])));
  const kinds = data.kinds.flatMap((name, k) => (used.has(k) ? [[name, EVENT_COLOURS[k]]] : []));
  byId("kinds").replaceWith(swatches(kinds.map(([name]) => name), kinds.map(([, colour]) => colour)));
  const notes = new Set(data.steps.filter((step) => step.note).map((step) => `${step.name.split(",")[0]}: ${step.note}.`));
  byId("time-notes").append(...[...notes].map((note) => element("li", {}, note)));
  if (!data.steps.some((step) => step.name.startsWith("measured"))) byId("time-notes").append(element("li", {}, "A measured timeline stands here with --trace FILE, written by layerwise run PLAN --trace FILE."));
}

function memory() {
  const data = DATA.memory;
  const found = data.positions
    ? bars("Memory by position", data.positions.map((_, p) => `position ${p}`), data.positions, data.limit, (value) => `${bytes(value)} of ${bytes(data.limit)}`)
    : memoryChart(data);
  byId("memory-chart").append(found);
}

function traffic() {
  const data = DATA.traffic;
  if (!data || data.devices.length < 2) return byId("traffic").remove();
  const view = new MatrixView(byId("matrix"), data, (text) => { byId("cell").textContent = text; });
  const total = (cause) => cause.bytes.flat().reduce((a, b) => a + b, 0);
  byId("cause").append(element("option", { value: "" }, `all, ${bytes(data.causes.reduce((sum, cause) => sum + total(cause), 0))}`),
    ...data.causes.map((cause, k) => element("option", { value: k }, `${cause.name}, ${bytes(total(cause))}`)));
  const show = () => {
    const chosen = byId("cause").value;
    view.show(chosen === "" ? data.causes : [data.causes[Number(chosen)]]);
    const links = view.rows.flatMap((row, r) => row.map((value, c) => [value, r, c])).filter(([value]) => value).sort((a, b) => b[0] - a[0]);
    const rows = links.slice(0, 10).map(([value, r, c]) => [`${data.devices[r]} → ${data.devices[c]}`, bytes(value)]);
    const note = links.length ? `${counted(links.length, "pair")} of devices send something; the most, in a step:` : "Nothing is sent.";
    byId("links").replaceChildren(element("p", {}, note), ...(rows.length ? [plainTable({ title: "", columns: ["from → to", "sent"], rows, text: 1, emphasis: null })] : []));
  };
  byId("cause").addEventListener("change", show);
  show();
}

function strategies() {
  const data = DATA.strategies, most = Math.max(...data.seconds);
  const table = plainTable({ ...data, title: "", columns: [...data.columns.slice(0, 2), "", ...data.columns.slice(2)], rows: data.rows.map((row) => [...row.slice(0, 2), "", ...row.slice(2)]) }, (r, c) => {
    if (c !== 2) return null;
    const bar = element("i");
    bar.style.width = `${(100 * data.seconds[r]) / most}%`;
    return element("span", { class: "measure" }, bar);
  }, "Strategies, predicted");
  table.querySelectorAll("tbody tr").forEach((row, r) => row.classList.toggle("lost", !data.usable[r]));
  byId("strategy-table").append(table, ...data.notes.filter(Boolean).map((note) => element("p", { class: "help" }, note)));
}

function accuracy() {
  const data = DATA.accuracy, body = byId("accuracy-body");
  body.append(...data.sentences.map((text) => element("p", {}, text)), ...data.tables.map((table) => plainTable(table)));
  if (data.points && data.points.length) body.append(element("h3", {}, "Compute of every layer"), scatter(data.points, LAYERS.id));
  if (!data.tables.length) body.append(element("p", {}, "A run stands beside the prediction here with --measured FILE, written by layerwise run PLAN --measured FILE."));
}

overview();
const VIEW = network();
timeline(VIEW);
memory();
traffic();
strategies();
if (DATA.scaling) byId("scaling-chart").append(scalingChart(DATA.scaling), element("p", { class: "help" }, "The same batch on the first devices of the machine, planned in one stage for each number of them."));
else byId("scaling-chart").append(element("p", {}, "With --scale 1,2,4,8 the same batch is planned for so many devices of the machine, and a curve stands here."));
accuracy();
navigation();
document.documentElement.dataset.ready = "yes";
