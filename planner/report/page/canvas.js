// A canvas as sharp as the screen, which is moved and zoomed by pointer, wheel, fingers and keys.

class Sheet {
  // draw(context, width, height) is called when something changed, at most once a frame.
  constructor(canvas, draw, resized = () => {}) {
    this.canvas = canvas;
    this.context = canvas.getContext("2d");
    this.draw = draw;
    this.resized = resized;
    this.asked = false;
    this.width = this.height = 0;
    new ResizeObserver(() => this.resize()).observe(canvas);
    addEventListener("beforeprint", () => this.resize(2));
    addEventListener("afterprint", () => this.resize());
  }

  resize(least = 1) {
    const width = this.canvas.clientWidth, height = this.canvas.clientHeight;
    if (!width || !height) return;
    const ratio = Math.max(devicePixelRatio || 1, least);
    const isOther = width !== this.width || height !== this.height;
    [this.width, this.height] = [width, height];
    this.canvas.width = Math.round(width * ratio);
    this.canvas.height = Math.round(height * ratio);
    this.ratio = ratio;
    if (isOther) this.resized();
    this.paint();
  }

  redraw() {
    if (this.asked) return;
    this.asked = true;
    requestAnimationFrame(() => this.paint());
  }

  paint() {
    this.asked = false;
    if (!this.width) return;
    this.context.setTransform(this.ratio, 0, 0, this.ratio, 0, 0);
    this.context.clearRect(0, 0, this.width, this.height);
    this.draw(this.context, this.width, this.height);
  }
}

// Pointers over a canvas as moves, zooms, picks and hovers: target has move(dx, dy), zoom(factor, x, y), pick(x, y), hover(x, y).
function listenToPointers(canvas, target) {
  const held = new Map();
  let travelled = 0;
  const place = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    canvas.setPointerCapture(event.pointerId);
    held.set(event.pointerId, place(event));
    travelled = 0;
  });
  canvas.addEventListener("pointermove", (event) => {
    const now = place(event), before = held.get(event.pointerId);
    if (!before) return target.hover(...now);
    travelled += Math.abs(now[0] - before[0]) + Math.abs(now[1] - before[1]);
    if (held.size === 2) {
      const [other] = [...held].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
      const apart = (at) => Math.hypot(at[0] - other[0], at[1] - other[1]) || 1;
      target.zoom(apart(now) / apart(before), (now[0] + other[0]) / 2, (now[1] + other[1]) / 2);
    } else if (travelled > 4) {
      target.move(now[0] - before[0], now[1] - before[1]);
    }
    held.set(event.pointerId, now);
  });
  const end = (event) => {
    if (held.delete(event.pointerId) && event.type === "pointerup" && travelled <= 4) target.pick(...place(event));
  };
  canvas.addEventListener("pointerup", end);
  canvas.addEventListener("pointercancel", end);
  canvas.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return; // the page scrolls
    event.preventDefault();
    target.zoom(Math.exp(-event.deltaY / 200), ...place(event));
  }, { passive: false });
}

// Keys over an element: a function for each key's name; those without one do what they always do.
function listenToKeys(found, actions) {
  found.addEventListener("keydown", (event) => {
    const action = actions[event.key];
    if (!action || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    action();
  });
}

// Colours that people with any colour vision tell apart [Okabe & Ito, 2008], and a scale of even lightness (cividis).
const PALETTE = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442"];
const OTHER = "#333a44";
const SCALE = ["#f3f1e2", "#e8d67a", "#b9a86a", "#7f7f73", "#4a5a70", "#0b2a5b"];

function shade(share) {
  const at = Math.min(Math.max(share, 0), 1) * (SCALE.length - 1), low = Math.min(Math.floor(at), SCALE.length - 2);
  const parts = (colour) => [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16));
  const [a, b] = [parts(SCALE[low]), parts(SCALE[low + 1])];
  return `rgb(${a.map((x, i) => Math.round(x + (b[i] - x) * (at - low))).join(" ")})`;
}

// Black or white, whichever has the larger contrast to a colour (WCAG 2).
function inkOn(colour) {
  const parts = colour.startsWith("#") ? [1, 3, 5].map((i) => parseInt(colour.slice(i, i + 2), 16)) : colour.match(/\d+/g).map(Number);
  const [r, g, b] = parts.map((part) => (part / 255 <= 0.04045 ? part / 255 / 12.92 : ((part / 255 + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.21 ? "#1b2430" : "#ffffff"; // where both contrasts are equal
}

function fitted(context, text, width) {
  if (context.measureText(text).width <= width) return text;
  let kept = Math.max(Math.floor((text.length * width) / context.measureText(text).width) - 1, 1);
  while (kept > 1 && context.measureText(`…${text.slice(-kept)}`).width > width) kept -= 1;
  return `…${text.slice(-kept)}`; // the end of a layer's name says most
}

function begun(context, text, width) {
  let kept = text.length;
  while (kept > 1 && context.measureText(kept < text.length ? `${text.slice(0, kept)}…` : text).width > width) kept -= 1;
  return kept < text.length ? `${text.slice(0, kept)}…` : text;
}
