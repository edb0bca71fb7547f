// Bytes from every device to every other one.

class MatrixView {
  constructor(canvas, data, said) {
    Object.assign(this, { data, said, at: null, devices: data.devices });
    this.rows = data.causes[0].bytes;
    this.sheet = new Sheet(canvas, (...where) => this.draw(...where));
    listenToPointers(canvas, { move() {}, zoom() {}, hover: (x, y) => this.tell(this.find(x, y) || this.at), pick: (x, y) => this.choose(this.find(x, y)) });
    const go = (dr, dc) => () => {
      const n = this.devices.length, clamp = (k) => Math.min(Math.max(k, 0), n - 1);
      this.choose(this.at ? [clamp(this.at[0] + dr), clamp(this.at[1] + dc)] : [0, 0]);
    };
    listenToKeys(canvas, { ArrowRight: go(0, 1), ArrowLeft: go(0, -1), ArrowDown: go(1, 0), ArrowUp: go(-1, 0), Escape: () => this.choose(null) });
  }

  // Show the sum of some causes.
  show(chosen) {
    const n = this.devices.length;
    this.rows = Array.from({ length: n }, (_, r) => Array.from({ length: n }, (_, c) => chosen.reduce((sum, cause) => sum + cause.bytes[r][c], 0)));
    this.most = Math.max(...this.rows.flat(), 1);
    this.tell(this.at);
    this.sheet.redraw();
  }

  get edge() {
    return this.devices.length > 24 || this.sheet.width < 320 ? 30 : 66;
  }

  get cell() {
    return (this.sheet.width - this.edge - 2) / this.devices.length;
  }

  draw(context, width) {
    const { edge, cell, devices } = this, n = devices.length, isWide = cell > 44;
    const every = Math.ceil((edge > 30 ? 16 : 14) / cell);
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    for (let r = 0; r < n; r++) {
      for (let c = 0; c < n; c++) {
        const value = this.rows[r][c], x = edge + c * cell, y = edge + r * cell;
        const colour = r === c ? "#e4e8ed" : value ? shade(0.15 + 0.85 * Math.sqrt(value / this.most)) : "#ffffff";
        context.fillStyle = colour;
        context.fillRect(x, y, cell, cell);
        if (value && isWide) {
          context.fillStyle = inkOn(colour);
          context.textAlign = "center";
          context.fillText(bytes(value), x + cell / 2, y + cell / 2);
        }
      }
    }
    context.fillStyle = "#56616f";
    for (let k = 0; k < n; k += every) {
      const name = edge > 30 ? fitted(context, devices[k], edge - 8) : String(k), middle = edge + (k + 0.5) * cell;
      context.textAlign = "right";
      context.fillText(name, edge - 5, middle);
      context.save();
      context.translate(middle, edge - 5);
      if (edge > 30 && cell < 44) context.rotate(-Math.PI / 2);
      context.textAlign = edge > 30 && cell < 44 ? "left" : "center";
      context.fillText(edge > 30 ? fitted(context, devices[k], edge - 8) : name, 0, edge > 30 && cell < 44 ? 0 : -6);
      context.restore();
    }
    context.strokeStyle = "#8b96a5";
    context.strokeRect(edge, edge, n * cell, n * cell);
    if (this.at) {
      context.strokeStyle = "#b8460b";
      context.lineWidth = 3;
      context.strokeRect(edge + this.at[1] * cell, edge + this.at[0] * cell, cell, cell);
      context.lineWidth = 1;
    }
  }

  find(x, y) {
    const r = Math.floor((y - this.edge) / this.cell), c = Math.floor((x - this.edge) / this.cell), n = this.devices.length;
    return r >= 0 && c >= 0 && r < n && c < n ? [r, c] : null;
  }

  choose(at) {
    this.at = at;
    this.tell(at);
    this.sheet.redraw();
  }

  tell(at) {
    this.said(at ? `${this.devices[at[0]]} → ${this.devices[at[1]]}: ${bytes(this.rows[at[0]][at[1]])}` : "");
  }
}
