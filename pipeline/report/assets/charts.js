"use strict";
/* Curves. Each is drawn when it comes into sight, has its numbers as a table, and says in words what it shows. */
(() => {
  const {h, number} = Relay;
  const COLOURS = {light: ["#0b5cad", "#c2500a", "#1a7040", "#7a3e9d", "#8a6d00", "#b3261e"], dark: ["#7db7f5", "#f0a36b", "#6fd39a", "#c79be6", "#e3c95a", "#ff9d93"]};
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "cross"];
  const waiting = new Set();
  let ready = false;

  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      entry.target.chart.visible = entry.isIntersecting;
      if (entry.isIntersecting) entry.target.chart.draw();
    }
  }, {rootMargin: "300px"});

  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  Relay.dark = () => document.documentElement.dataset.theme === "dark";

  /* A line that is flat stands in the middle of its axis, whatever its height. */
  const flat = (lines) => {
    const values = lines.flatMap((line) => line.y), [low, high] = [Math.min(...values), Math.max(...values)];
    return low === high ? [low - (Math.abs(low) / 2 || 1), high + (Math.abs(high) / 2 || 1)] : undefined;
  };

  const layout = (chart) => {
    const axis = {gridcolor: css("--grid"), zerolinecolor: css("--line"), linecolor: css("--line"), tickfont: {size: 11}, automargin: true, fixedrange: false};
    return {
      margin: {l: 44, r: 10, t: 8, b: chart.options.x ? 36 : 24}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: {family: "system-ui, sans-serif", size: 12, color: css("--soft")}, hovermode: chart.options.points ? "closest" : "x unified",
      hoverlabel: {bgcolor: css("--panel"), bordercolor: css("--line"), font: {color: css("--ink"), size: 12}},
      showlegend: chart.lines.length > 1, legend: {orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: {size: 11}},
      xaxis: {...axis, title: chart.options.x ? {text: chart.options.x, font: {size: 11}} : undefined, range: chart.options.range},
      yaxis: {...axis, title: chart.options.y ? {text: chart.options.y, font: {size: 11}} : undefined, range: chart.options.range || flat(chart.lines)},
      shapes: chart.options.diagonal ? [{type: "line", x0: chart.options.range[0], y0: chart.options.range[0], x1: chart.options.range[1], y1: chart.options.range[1], line: {dash: "dot", width: 1, color: css("--soft")}}] : [],
    };
  };

  const traces = (chart) => chart.lines.map((line, number_) => {
    const colour = COLOURS[Relay.dark() ? "dark" : "light"][number_ % 6];
    const few = line.x.length < 25;
    return {
      x: line.x, y: line.y, name: line.name, type: "scatter", text: line.text, stackgroup: chart.options.stack ? "one" : undefined,
      mode: (few || chart.options.points) && !chart.options.stack ? "lines+markers" : "lines",
      error_y: line.low ? {type: "data", symmetric: false, array: line.high.map((v, i) => v - line.y[i]), arrayminus: line.low.map((v, i) => line.y[i] - v), color: colour, thickness: 1} : undefined,
      line: {color: colour, width: chart.options.points ? 1 : 1.8, dash: DASHES[number_ % 6]},
      marker: {color: colour, size: chart.options.points ? 6 : 5, symbol: SYMBOLS[number_ % 6]},
    };
  });

  /* options: x and y (axes' titles), wide, stack (areas), points, diagonal, range. Lines: {name, x, y, text, low, high}. */
  Relay.Chart = class {
    constructor(title, options = {}) {
      this.options = options;
      this.lines = [];
      this.plot = h("div", {class: "plot", role: "img"});
      this.now = h("span", {class: "now"});
      this.numbers = h("div", {});
      this.more = h("details", {ontoggle: () => this.list()}, h("summary", {}, `${title}: show as table`), this.numbers);
      this.title = title;
      this.element = h("figure", {class: options.wide ? "wide" : ""}, h("figcaption", {}, h("h4", {}, title), this.now), this.plot, this.more);
      this.plot.chart = this;
      seen.observe(this.plot);
    }

    update(lines) {
      const told = JSON.stringify(lines);
      if (told === this.told) return;
      this.told = told;
      this.lines = lines;
      const words = lines.map((line) => `${line.name}: ${line.x.length} points, from ${number(line.y[0])} to ${number(line.y.at(-1))}, least ${number(Math.min(...line.y))}, greatest ${number(Math.max(...line.y))}`);
      this.plot.setAttribute("aria-label", `${this.title}. ${words.join("; ")}.`);
      this.now.textContent = lines.length === 1 && lines[0].y.length ? number(lines[0].y.at(-1)) : "";
      if (this.visible) this.draw();
      if (this.more.open) this.list();
    }

    draw() {
      if (!ready) return void waiting.add(this);
      const key = `${this.told}${Relay.dark()}`;
      if (!this.lines.length || key === this.drawn) return;
      this.drawn = key;
      Plotly.react(this.plot, traces(this), layout(this), {displayModeBar: false, responsive: true});
    }

    list() {
      if (!this.more.open) return;
      const columns = [["series", (r) => r.name], [this.options.x || "step", (r) => r.x, "n"], [this.options.y || "value", (r) => r.y, "n"]];
      const rows = this.lines.flatMap((line) => {
        const every = Math.max(1, Math.ceil(line.x.length / 60));
        return line.x.map((x, i) => ({name: line.name, x, y: line.y[i], i})).filter((r) => r.i % every === 0 || r.i === line.x.length - 1);
      });
      this.numbers.replaceChildren(Relay.table(columns, rows, {label: this.title}));
    }
  };

  Relay.redraw = () => {
    for (const plot of document.querySelectorAll(".plot")) if (plot.chart.visible) plot.chart.draw();
  };

  Relay.chartsReady = () => {
    ready = true;
    for (const chart of waiting) chart.draw();
    waiting.clear();
  };
})();
