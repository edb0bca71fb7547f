// Streams over time: the predicted step, and measured ones below it on the same axis.

const LANE = { height: 22, head: 26, axis: 24, name: 118 };
const EVENT_COLOURS = ["#0072b2", "#56b4e9", "#d55e00", "#009e73", "#cc79a7", "#333a44"];

class TimeView {
  // data of the document, ids of the layers; said(text) tells what is under the pointer; entered(layer) is told on Enter.
  constructor(canvas, data, layers, said, entered) {
    Object.assign(this, { data, said, entered, at: null });
    this.labels = data.names.map((name, k) => (data.layers[k] < 0 ? name : layers[data.layers[k]]));
    this.length = Math.max(...data.steps.map((step) => step.length), 1);
    this.rows = [];
    let top = LANE.axis;
    for (const step of data.steps) {
      step.top = top;
      top += LANE.head;
      for (const stream of step.streams) {
        const events = [];
        for (let i = 0; i < stream.events.length; i += 4) events.push(stream.events.slice(i, i + 4));
        events.sort((a, b) => a[2] - b[2]);
        this.rows.push({ step, name: stream.name, events, top });
        top += LANE.height;
      }
      top += 8;
    }
    canvas.style.height = `${top}px`;
    this.start = 0;
    this.span = this.length;
    this.sheet = new Sheet(canvas, (...where) => this.draw(...where));
    listenToPointers(canvas, this);
    listenToKeys(canvas, {
      "+": () => this.zoom(1.5), "=": () => this.zoom(1.5), "-": () => this.zoom(1 / 1.5), 0: () => this.fit(),
      ArrowRight: () => this.step(1), ArrowLeft: () => this.step(-1), ArrowDown: () => this.row(1), ArrowUp: () => this.row(-1),
      Enter: () => this.at && entered(this.data.layers[this.at.event[0]]), Escape: () => this.choose(null),
    });
  }

  get wide() {
    return Math.max(this.sheet.width - this.names - 8, 1);
  }

  get names() {
    return this.sheet.width < 600 ? 80 : LANE.name;
  }

  fit() {
    [this.start, this.span] = [0, this.length];
    this.sheet.redraw();
  }

  x(time) {
    return this.names + ((time - this.start) / this.span) * this.wide;
  }

  draw(context, width, height) {
    context.font = "12px system-ui, sans-serif";
    context.textBaseline = "middle";
    this.axis(context, height);
    context.save();
    context.beginPath();
    context.rect(this.names, 0, width - this.names, height);
    context.clip();
    for (const row of this.rows) this.events(context, row);
    context.restore();
    for (const step of this.data.steps) {
      context.fillStyle = "#1b2430";
      context.font = "600 13px system-ui, sans-serif";
      context.textAlign = "left";
      context.fillText(`${step.name}: ${seconds(step.length / 1e9)}`, 4, step.top + 12);
    }
    context.font = `${this.names < LANE.name ? 11 : 12}px system-ui, sans-serif`;
    context.fillStyle = "#56616f";
    for (const row of this.rows) {
      context.fillText(begun(context, row.name, this.names - 8), 4, row.top + LANE.height / 2);
    }
  }

  axis(context, height) {
    const rough = this.span / Math.max(this.wide / 90, 1), base = 10 ** Math.floor(Math.log10(rough));
    const tick = [1, 2, 5, 10].map((k) => k * base).find((k) => k >= rough);
    context.textAlign = "center";
    for (let k = Math.ceil(this.start / tick); k * tick <= this.start + this.span; k++) {
      const x = this.x(k * tick);
      context.strokeStyle = "#e4e8ed";
      context.beginPath();
      context.moveTo(x, LANE.axis - 6);
      context.lineTo(x, height);
      context.stroke();
      context.fillStyle = "#56616f";
      context.fillText(seconds((k * tick) / 1e9), Math.min(Math.max(x, this.names + 14), this.sheet.width - 24), 9);
    }
  }

  events(context, row) {
    const top = row.top + 2, height = LANE.height - 4;
    const first = Math.max(this.index(row, this.start) - 1, 0);
    let drawn = -1;
    context.textAlign = "left";
    for (let e = first; e < row.events.length; e++) {
      const [name, kind, start, length] = row.events[e];
      if (start > this.start + this.span) break;
      const x = this.x(start), right = Math.max(this.x(start + length), x + 0.7);
      if (right < this.names || right < drawn + 0.3) continue;
      drawn = right;
      context.fillStyle = EVENT_COLOURS[kind];
      context.fillRect(x, top, right - x, height);
      const seen = Math.max(x, this.names);
      if (right - x > 5) {
        context.fillStyle = "#ffffff";
        context.fillRect(right - 0.6, top, 0.6, height);
      }
      if (right - seen > 44) {
        context.fillStyle = inkOn(EVENT_COLOURS[kind]);
        context.font = "11px system-ui, sans-serif";
        context.fillText(fitted(context, this.labels[name], right - seen - 8), seen + 4, top + height / 2);
      }
    }
    if (this.at && this.at.row === row) {
      const [, , start, length] = this.at.event, x = this.x(start);
      context.strokeStyle = "#1b2430";
      context.lineWidth = 3;
      context.strokeRect(x, top, Math.max(this.x(start + length) - x, 2), height);
      context.lineWidth = 1;
    }
  }

  // The first event of a row that starts behind a time.
  index(row, time) {
    let low = 0, high = row.events.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (row.events[middle][2] <= time) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  find(x, y) {
    const row = this.rows.find((each) => y >= each.top && y < each.top + LANE.height);
    if (!row || x < this.names) return null;
    const time = this.start + ((x - this.names) / this.wide) * this.span, slack = (3 / this.wide) * this.span;
    const e = this.index(row, time + slack) - 1;
    if (e < 0 || row.events[e][2] + row.events[e][3] < time - slack) return null;
    return { row, e, event: row.events[e] };
  }

  tell(found) {
    if (!found) return this.said("");
    const [name, kind, start, length] = found.event;
    const { step } = found.row;
    this.said(`${step.name}, ${found.row.name}: ${this.data.names[name]} (${this.data.kinds[kind]}), ${seconds(length / 1e9)}, from ${seconds(start / 1e9)} to ${seconds((start + length) / 1e9)}`);
  }

  // ---- what pointers and keys ask for

  move(dx) {
    this.start -= (dx / this.wide) * this.span;
    this.clamp();
  }

  zoom(factor, x = this.names + this.wide / 2) {
    const share = (x - this.names) / this.wide, span = Math.min(Math.max(this.span / factor, 100), this.length);
    this.start += share * (this.span - span);
    this.span = span;
    this.clamp();
  }

  clamp() {
    this.start = Math.min(Math.max(this.start, 0), this.length - this.span);
    this.sheet.redraw();
  }

  hover(x, y) {
    this.tell(this.find(x, y) || this.at);
  }

  pick(x, y) {
    this.choose(this.find(x, y));
    if (this.at) this.entered(this.data.layers[this.at.event[0]], false);
  }

  choose(found) {
    this.at = found;
    if (found) {
      const [, , start, length] = found.event;
      if (start < this.start || start + length > this.start + this.span) this.start = start + length / 2 - this.span / 2;
    }
    this.tell(found);
    this.clamp();
  }

  step(by) {
    if (!this.at) return this.choose(this.first(this.rows[0], this.start));
    const e = Math.min(Math.max(this.at.e + by, 0), this.at.row.events.length - 1);
    this.choose({ row: this.at.row, e, event: this.at.row.events[e] });
  }

  row(by) {
    if (!this.at) return this.step(0);
    const r = Math.min(Math.max(this.rows.indexOf(this.at.row) + by, 0), this.rows.length - 1);
    this.choose(this.first(this.rows[r], this.at.event[2]));
  }

  first(row, time) {
    const e = Math.max(this.index(row, time) - 1, 0);
    return row.events.length ? { row, e, event: row.events[e] } : this.at;
  }
}
