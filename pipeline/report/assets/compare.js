"use strict";
/* Several runs: the same curves laid over each other, final numbers side by side, and the keys in which recipes differ. */
(() => {
  const {h} = Relay;
  const COLUMNS = ["objective/scores", "objective/kl", "objective/length", "objective/entropy", "eval/score", "loss", "eval_loss", "accuracy"];

  Relay.Compare = class {
    constructor() {
      this.charts = new Map();
      this.runs = h("div", {});
      this.curves = h("div", {class: "charts"});
      this.numbers = h("div", {});
      this.keys = h("div", {});
      this.element = h("div", {}, this.runs, this.curves, this.numbers, this.keys);
    }

    update(views) {
      const names = Relay.names(views);
      Relay.fill(this.runs, views.map((v, i) => [names[i], v.state, v.folder, Math.round(v.updated)]), () => [h("h2", {}, "Runs"), Relay.table([["run", (v) => names[views.indexOf(v)]], ["state", (v) => Relay.state(v.state)], ["changed", (v) => Relay.when(v.updated)], ["folder", (v) => v.folder]], views, {stack: true, label: "Runs"})]);
      const stages = [...new Set(views.flatMap((view) => view.order))];
      for (const stage of stages) {
        for (const column of COLUMNS) {
          const lines = views.map((view, i) => ({name: names[i], ...(view.stages[stage]?.series[column] || {x: [], y: []})})).filter((line) => line.x.length > 1);
          if (lines.length < 2) continue;
          const title = `${stage}: ${column}`;
          if (!this.charts.has(title)) {
            this.charts.set(title, new Relay.Chart(title, {}));
            this.curves.append(this.charts.get(title).element);
          }
          this.charts.get(title).update(lines);
        }
      }
      const finals = stages.flatMap((stage) => [...new Set(views.flatMap((view) => Object.keys(view.stages[stage]?.metrics || {})))].map((metric) => ({stage, metric})));
      const value = (view, row) => view.stages[row.stage]?.metrics[row.metric];
      Relay.fill(this.numbers, finals.map((row) => views.map((view) => value(view, row))), () => (finals.length ? [h("h2", {}, "Final numbers"), Relay.table([["stage", (r) => r.stage], ["metric", (r) => r.metric], ...views.map((view, i) => [names[i], (r) => value(view, r), "n"])], finals, {label: "Final numbers of each run"})] : null));
      const keys = [...new Set(views.flatMap((view) => Object.keys(view.keys)))].filter((key) => new Set(views.map((view) => JSON.stringify(view.keys[key]))).size > 1);
      Relay.fill(this.keys, keys.map((key) => views.map((view) => view.keys[key])), () => [h("h2", {}, "Where the recipes differ"), keys.length ? Relay.table([["key", (key) => h("code", {}, key)], ...views.map((view, i) => [names[i], (key) => String(view.keys[key] ?? "")])], keys, {label: "Keys that differ"}) : h("p", {class: "soft"}, "In nothing that is recorded.")]);
    }
  };

  /* Runs of one recipe are told apart by their folders. */
  Relay.names = (views) => views.map((view) => (views.filter((other) => other.name === view.name).length > 1 ? view.folder.split("/").at(-1) : view.name));
})();
