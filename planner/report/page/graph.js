// The network as a picture: columns in the order of the data, broken into rows like a text, and lanes for branches.

const CELL = { width: 164, height: 46, line: 16, boxWidth: 132, boxHeight: 34, gap: 24, margin: 24 };

// Where every column and row begins for a window of this shape: rows are broken where few lines cross.
function wrapped(graph, aspect) {
  const last = Math.max(...graph.columns, 0);
  const crossing = new Int32Array(last + 2), used = Array.from({ length: last + 1 }, () => new Map());
  for (const [a, b, lane] of graph.edges) {
    for (let c = graph.columns[a]; c < graph.columns[b]; c++) {
      crossing[c] += 1;
      if (lane >= 0 && c > graph.columns[a]) used[c].set(lane, CELL.line);
    }
  }
  graph.columns.forEach((column, i) => used[column].set(graph.lanes[i], graph.isDot[i] ? CELL.line : CELL.height));
  const broken = (most) => {
    const rows = [];
    for (let start = 0; start <= last;) {
      let stop = Math.min(start + most, last + 1);
      if (stop <= last) {
        for (let c = stop - 1; c > start + most * 0.7; c--) if (crossing[c - 1] < crossing[stop - 1]) stop = c;
      }
      const tall = new Map(); // lanes with lines only are narrow
      for (let c = start; c < stop; c++) for (const [lane, height] of used[c]) tall.set(lane, Math.max(tall.get(lane) ?? 0, height));
      rows.push({ start, stop, tall: [...tall].sort((a, b) => a[0] - b[0]) });
      start = stop;
    }
    let top = CELL.gap / 2;
    for (const row of rows) {
      row.middle = new Map();
      for (const [lane, height] of row.tall) {
        row.middle.set(lane, top + height / 2);
        top += height;
      }
      row.gutter = top + CELL.gap / 2;
      top += CELL.gap;
    }
    const width = Math.max(...rows.map((row) => row.stop - row.start)) * CELL.width + 2 * CELL.margin;
    return { rows, width, height: top };
  };
  let best = null;
  for (let most = 1; most <= last + 1; most = Math.ceil(most * 1.15)) {
    const found = broken(most), off = Math.abs(Math.log(found.width / found.height / aspect));
    if (!best || off < best.off) best = { ...found, off };
  }
  const rowOf = new Int32Array(last + 1);
  best.rows.forEach((row, r) => rowOf.fill(r, row.start, row.stop));
  best.place = (column, lane) => {
    const row = best.rows[rowOf[column]];
    return [CELL.margin + (column - row.start + 0.5) * CELL.width, row.middle.get(lane), rowOf[column]];
  };
  return best;
}

class NetworkView {
  // layers and graph of the document; picked(i) is told when a layer is chosen, or -1.
  constructor(canvas, layers, graph, picked) {
    graph.isDot = layers.passes;
    Object.assign(this, { layers, graph, picked, selected: -1, shown: null, colours: [], codes: [] });
    this.scale = 1;
    this.left = this.top = 0;
    this.before = layers.id.map(() => []);
    this.behind = layers.id.map(() => []);
    for (const [a, b] of graph.edges) {
      this.behind[a].push(b);
      this.before[b].push(a);
    }
    this.most = Math.max(...graph.edges.map((edge) => edge[3]), 1);
    this.sheet = new Sheet(canvas, (...where) => this.draw(...where), () => this.arrange());
    listenToPointers(canvas, this);
    listenToKeys(canvas, {
      "+": () => this.zoom(1.4), "=": () => this.zoom(1.4), "-": () => this.zoom(1 / 1.4), 0: () => this.fit(),
      ArrowRight: () => this.go(this.behind), ArrowLeft: () => this.go(this.before), ArrowDown: () => this.beside(1), ArrowUp: () => this.beside(-1),
      Home: () => this.choose(0), End: () => this.choose(layers.id.length - 1), Escape: () => this.choose(-1), Enter: () => this.enter && this.enter(this.selected),
    });
  }

  arrange() {
    this.wrap = wrapped(this.graph, this.sheet.width / this.sheet.height);
    this.places = this.graph.columns.map((column, i) => this.wrap.place(column, this.graph.lanes[i]));
    this.plain = new Path2D();
    this.busy = [new Path2D(), new Path2D(), new Path2D()];
    this.paths = this.graph.edges.map((edge) => {
      const path = this.path(edge);
      if (edge[3]) this.busy[Math.min(Math.floor(3 * edge[3] / this.most), 2)].addPath(path);
      else this.plain.addPath(path);
      return path;
    });
    this.fit();
  }

  fit() {
    const { width, height } = this.sheet;
    this.scale = Math.min(width / this.wrap.width, height / this.wrap.height, 1.4);
    this.left = (this.wrap.width - width / this.scale) / 2;
    this.top = (this.wrap.height - height / this.scale) / 2;
    this.sheet.redraw();
  }

  path([a, b, lane]) {
    const path = new Path2D(), { columns, lanes } = this.graph, half = CELL.boxWidth / 2;
    const link = (c, from, d, to, start, end) => {
      const [x, y, row] = this.wrap.place(c, from), [u, v, other] = this.wrap.place(d, to);
      path.moveTo(x + start, y);
      if (row === other) {
        const bend = Math.min((u - end - x - start) / 2, 40);
        if (y === v) path.lineTo(u - end, v);
        else path.bezierCurveTo(x + start + bend, y, u - end - bend, v, u - end, v);
        return;
      }
      const { gutter } = this.wrap.rows[row];
      const right = x + CELL.width / 2 + 6, left = u - CELL.width / 2 - 6;
      path.lineTo(right - 8, y);
      path.arcTo(right, y, right, gutter, 8);
      path.arcTo(right, gutter, left, gutter, 8);
      path.arcTo(left, gutter, left, v, 8);
      path.arcTo(left, v, u - end, v, 8);
      path.lineTo(u - end, v);
    };
    const reach = (i) => (this.layers.passes[i] ? 6 : half);
    if (lane < 0) {
      link(columns[a], lanes[a], columns[b], lanes[b], reach(a), reach(b));
      return path;
    }
    let at = columns[a] + 1;
    link(columns[a], lanes[a], at, lane, reach(a), half);
    for (; at < columns[b]; at++) {
      const [x, y] = this.wrap.place(at, lane);
      path.moveTo(x - half, y);
      path.lineTo(x + half, y);
      const isLast = at + 1 === columns[b];
      link(at, lane, at + 1, isLast ? lanes[b] : lane, half, isLast ? reach(b) : half);
    }
    return path;
  }

  draw(context, width, height) {
    if (!this.wrap) return;
    const { scale, layers } = this;
    context.setTransform(this.sheet.ratio * scale, 0, 0, this.sheet.ratio * scale, -this.left * scale * this.sheet.ratio, -this.top * scale * this.sheet.ratio);
    const thin = 1 / Math.max(scale, 0.4);
    context.lineWidth = 1.2 * thin;
    context.strokeStyle = "#8b96a5";
    context.stroke(this.plain);
    context.strokeStyle = "#d55e00";
    this.busy.forEach((path, k) => {
      context.lineWidth = (2 + 1.5 * k) * thin;
      context.stroke(path);
    });
    if (this.selected >= 0) {
      context.strokeStyle = "#1b2430";
      context.lineWidth = 2.5 * thin;
      this.graph.edges.forEach(([a, b], e) => {
        if (a === this.selected || b === this.selected) context.stroke(this.paths[e]);
      });
    }
    const right = this.left + width / scale, bottom = this.top + height / scale, isNamed = scale > 0.42;
    context.textAlign = "center";
    context.textBaseline = "middle";
    this.places.forEach(([x, y], i) => {
      if (x < this.left - CELL.width || x > right + CELL.width || y < this.top - CELL.height || y > bottom + CELL.height) return;
      context.globalAlpha = this.shown && !this.shown[i] ? 0.15 : 1;
      this.box(context, i, x, y, isNamed);
    });
    context.globalAlpha = 1;
  }

  box(context, i, x, y, isNamed) {
    const { boxWidth: width, boxHeight: height } = CELL, colour = this.colours[i];
    context.fillStyle = colour;
    context.beginPath();
    if (this.layers.passes[i]) context.arc(x, y, 6, 0, 7);
    else context.roundRect(x - width / 2, y - height / 2, width, height, 5);
    context.fill();
    if (i === this.selected) {
      context.strokeStyle = "#1b2430";
      context.lineWidth = Math.max(3, 3 / this.scale);
      context.stroke();
    }
    if (this.layers.passes[i] || this.scale < 0.16) return;
    context.fillStyle = inkOn(colour);
    if (!isNamed) {
      context.font = "600 22px ui-monospace, monospace";
      context.fillText(this.codes[i], x, y);
      return;
    }
    context.font = "600 11.5px system-ui, sans-serif";
    context.fillText(fitted(context, this.layers.id[i], width - 10), x, y - 7);
    context.font = "10.5px system-ui, sans-serif";
    context.fillText(fitted(context, `${this.codes[i]}  ${this.layers.op[i]}`, width - 10), x, y + 8);
  }

  // ---- what pointers and keys ask for

  move(dx, dy) {
    this.left -= dx / this.scale;
    this.top -= dy / this.scale;
    this.sheet.redraw();
  }

  zoom(factor, x = this.sheet.width / 2, y = this.sheet.height / 2) {
    const scale = Math.min(Math.max(this.scale * factor, 0.01), 4);
    this.left += x / this.scale - x / scale;
    this.top += y / this.scale - y / scale;
    this.scale = scale;
    this.sheet.redraw();
  }

  at(x, y) {
    const u = x / this.scale + this.left, v = y / this.scale + this.top, slack = 4 / this.scale;
    return this.places.findIndex(([a, b], i) => {
      const reach = this.layers.passes[i] ? [8, 8] : [CELL.boxWidth / 2, CELL.boxHeight / 2];
      return Math.abs(a - u) <= reach[0] + slack && Math.abs(b - v) <= reach[1] + slack;
    });
  }

  pick(x, y) {
    this.choose(this.at(x, y), false);
  }

  hover(x, y) {
    const i = this.at(x, y);
    this.sheet.canvas.title = i < 0 ? "" : this.layers.id[i];
  }

  go(neighbours) {
    if (this.selected < 0) this.choose(0);
    else if (neighbours[this.selected].length) {
      const lane = this.graph.lanes[this.selected];
      const apart = (i) => Math.abs(this.graph.lanes[i] - lane);
      this.choose([...neighbours[this.selected]].sort((a, b) => apart(a) - apart(b))[0]);
    }
  }

  beside(direction) {
    if (this.selected < 0) return this.choose(0);
    const [x, y] = this.places[this.selected];
    let best = -1, least = Infinity;
    this.places.forEach(([u, v], i) => {
      const along = (v - y) * direction, off = along + 3 * Math.abs(u - x);
      if (along > 1 && off < least) [best, least] = [i, off];
    });
    if (best >= 0) this.choose(best);
  }

  choose(i, isShown = true) {
    this.selected = i;
    if (i >= 0 && isShown) this.reveal(i);
    this.sheet.redraw();
    this.picked(i);
  }

  // Bring a layer into the window, large enough to be read.
  reveal(i) {
    if (!this.places) return;
    const [x, y] = this.places[i], { width, height } = this.sheet;
    const isFar = this.scale < 0.5;
    if (isFar) this.scale = 0.8;
    const [u, v] = [(x - this.left) * this.scale, (y - this.top) * this.scale];
    if (isFar || u < 70 || u > width - 70 || v < 30 || v > height - 30) {
      this.left = x - width / 2 / this.scale;
      this.top = y - height / 2 / this.scale;
    }
  }
}
