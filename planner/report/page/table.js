// The table of the layers: sorted by any column, filtered with the graph, a page of rows at a time.

const PAGE = 200;

class LayerTable {
  // columns: {name, text: what a cell says, value: what it is sorted by, isText}; chosen(i) is told of a click on a name.
  constructor(table, more, columns, chosen) {
    Object.assign(this, { table, more, columns, chosen, kept: [], sorted: null, selected: -1, limit: PAGE });
    this.heads = columns.map((column, c) => element("th", { scope: "col", class: column.isText ? "text" : null, "aria-sort": "none", title: column.hint || null },
      element("button", { type: "button", onclick: () => this.sortBy(c) }, column.name)));
    this.body = element("tbody");
    table.replaceChildren(element("thead", {}, element("tr", {}, ...this.heads)), this.body);
    more.addEventListener("click", () => {
      this.limit = Infinity;
      this.fill();
    });
  }

  show(kept) {
    this.kept = kept;
    this.limit = PAGE;
    this.fill();
  }

  sortBy(c) {
    const isSame = this.sorted && this.sorted.c === c, column = this.columns[c];
    const down = isSame ? !this.sorted.down : !column.isText; // numbers: the largest first
    this.sorted = { c, down };
    this.heads.forEach((head, k) => head.setAttribute("aria-sort", k !== c ? "none" : down ? "descending" : "ascending"));
    this.fill();
  }

  get order() {
    if (!this.sorted) return this.kept;
    const { c, down } = this.sorted, { value, isText } = this.columns[c];
    const compare = isText ? (a, b) => String(value(a)).localeCompare(String(value(b)), undefined, { numeric: true }) : (a, b) => value(a) - value(b);
    return [...this.kept].sort((a, b) => (down ? compare(b, a) : compare(a, b)) || a - b);
  }

  fill() {
    const order = this.order;
    this.body.replaceChildren(...order.slice(0, this.limit).map((i) => this.row(i)));
    const left = order.length - Math.min(order.length, this.limit);
    this.more.hidden = !left;
    this.more.textContent = `Show all ${order.length} layers`;
  }

  row(i) {
    const cells = this.columns.map((column, c) => {
      const text = column.text(i);
      if (!c) return element("th", { scope: "row", class: "text" }, element("button", { type: "button", onclick: () => this.chosen(i) }, text));
      return element("td", { class: column.isText ? "text" : null }, text);
    });
    return element("tr", { "data-layer": i, class: i === this.selected ? "chosen" : null }, ...cells);
  }

  find(i) {
    return this.body.querySelector(`tr[data-layer="${i}"]`);
  }

  choose(i) {
    this.find(this.selected)?.classList.remove("chosen");
    this.selected = i;
    this.find(i)?.classList.add("chosen");
  }

  // Bring a layer's row into view, and the keyboard to it.
  enter(i) {
    if (i < 0) return;
    if (!this.find(i) && this.kept.includes(i)) {
      this.limit = Infinity;
      this.fill();
    }
    this.find(i)?.scrollIntoView({ block: "center" });
    this.find(i)?.querySelector("button").focus({ preventScroll: true });
  }
}
