"use strict";
/* Elements, numbers and words. Text from a run only ever becomes text. */
const Relay = {};

Relay.h = (tag, attributes, ...children) => {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value === true) element.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) element.setAttribute(name, value);
  }
  element.append(...children.flat(9).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
};

/* Fill `element` anew when `value` is another than last time; what is the same keeps its focus and its scroll. */
Relay.fill = (element, value, make) => {
  const told = JSON.stringify(value === undefined ? null : value);
  if (element.told === told) return;
  element.told = told;
  element.replaceChildren(...[make(value)].flat(9).filter(Boolean));
};

Relay.number = (value) => {
  if (typeof value !== "number" || !Number.isFinite(value)) return value === null || value === undefined ? "" : String(value);
  const size = Math.abs(value);
  if (Number.isInteger(value) && size < 1e7) return value.toLocaleString("en-US");
  if (size !== 0 && (size < 1e-3 || size >= 1e6)) return value.toExponential(2);
  return String(Number(value.toPrecision(4)));
};

Relay.span = (seconds) => {
  if (seconds === null || seconds === undefined) return "";
  if (seconds < 90) return `${Math.round(seconds)} s`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min`;
  return `${(seconds / 3600).toFixed(1)} h`;
};

Relay.when = (time) => (time ? new Date(time * 1000).toLocaleString() : "");

Relay.MARKS = {done: "✓", running: "▶", stopped: "❚❚", failed: "✕", damaged: "⚠", waiting: "…", unfinished: "…", "not run": "○"};

Relay.state = (state) => Relay.h("span", {class: `state ${state.split(" ")[0]}`},
  Relay.h("span", {"aria-hidden": "true"}, `${Relay.MARKS[state] || "·"} `), state);

Relay.short = (hash) => Relay.h("span", {class: "hash", title: hash}, hash.slice(0, 12));

/* A table: `columns` are [title, row => cell, kind]; kind "n" is a number, "text" long text. `stack`: rows become blocks where
   the screen is narrow; other tables scroll. */
Relay.table = (columns, rows, options = {}) => {
  const h = Relay.h;
  const cells = (row) => columns.map(([title, cell, kind]) => {
    const value = cell(row);
    return h("td", {class: kind || "", "data-label": title}, kind === "n" && !(value instanceof Node) ? Relay.number(value) : value ?? "");
  });
  const region = options.stack ? {} : {tabindex: "0", role: "region", "aria-label": options.label};
  return h("div", {class: columns.length < 4 ? "scroll narrow" : "scroll", ...region},
    h("table", {class: options.stack ? "stack" : ""}, h("caption", {}, options.label),
      h("thead", {}, h("tr", {}, columns.map(([title, , kind]) => h("th", {scope: "col", class: kind === "n" ? "n" : ""}, title)))),
      h("tbody", {}, rows.map((row) => h("tr", {}, cells(row))))));
};

/* A value on a line from `low` to `high`, with its interval and a dashed mark: for eyes; the numbers stand beside it. */
Relay.range = (row, low, high, mark) => {
  const h = Relay.h, at = (value) => `${Math.max(0, Math.min(100, (100 * (value - low)) / (high - low || 1)))}%`;
  const line = h("i"), dot = h("b"), zero = h("u"), whole = h("span", {class: "range", "aria-hidden": "true"}, line, dot, zero);
  line.style.left = at(row.low);
  line.style.right = `calc(100% - ${at(row.high)})`;
  dot.style.left = at(row.value);
  zero.style.left = at(mark);
  return whole;
};
