"use strict";
/* One stage: its facts, its curves in the order that they are read in, what it was tested for, and samples. */
(() => {
  const {h, number} = Relay;

  /* [title, [column, name on the chart]…, options]; a chart without any of its columns is left out. */
  const FIRST = {
    ppo: [
      ["Reward", [["objective/scores", "rollouts"], ["eval/score", "held out"], ["eval/gold", "gold, held out"]]],
      ["KL to the reference", [["objective/kl", "rollouts"], ["eval/kl", "held out"]]],
      ["Reply length", [["objective/length", "rollouts"], ["eval/length", "held out"]], {y: "tokens"}],
      ["Entropy", [["objective/entropy", "a reply's sum"]]],
      ["Clip fraction", [["policy/clipfrac_avg", "policy"], ["val/clipfrac_avg", "critic"]]],
      ["Explained variance of the critic", [["val/explained_variance", "critic"]]],
    ],
    reward: [
      ["Loss", [["loss", "training"], ["eval_loss", "held out"]]],
      ["Accuracy", [["accuracy", "training"], ["eval_accuracy", "held out"]]],
      ["Margin", [["margin", "training"], ["eval_margin", "held out"]]],
    ],
    other: [
      ["Loss", [["loss", "training"], ["eval_loss", "held out"], ["train/loss", "training"]]],
      ["Token accuracy", [["mean_token_accuracy", "training"], ["eval_mean_token_accuracy", "held out"]]],
      ["Accuracy", [["rewards/accuracies", "training"], ["eval_rewards/accuracies", "held out"]]],
      ["Learning rate", [["learning_rate", "rate"]]],
    ],
  };

  const line = (series, column, name) => (series[column] && series[column].x.length > 1 ? {name, ...series[column]} : null);

  class Curves {
    constructor() {
      this.charts = new Map();
      this.first = h("div", {class: "charts"});
      this.rest = h("div", {class: "charts"});
      this.more = h("details", {}, h("summary", {}, "All other curves"), this.rest);
      this.element = h("div", {}, this.first, this.more);
    }

    put(box, title, lines, options) {
      if (!lines.length) return;
      if (!this.charts.has(title)) {
        const chart = new Relay.Chart(title, options);
        this.charts.set(title, chart);
        box.append(chart.element);
      }
      this.charts.get(title).update(lines);
    }

    update(stage) {
      const series = stage.series, used = new Set(["num_tokens", "eval_num_tokens"]);
      for (const [title, columns, options] of FIRST[stage.kind] || FIRST.other) {
        const lines = columns.map(([column, name]) => (used.add(column), line(series, column, name))).filter(Boolean);
        this.put(this.first, title, lines, options);
      }
      const phases = Object.keys(series).filter((name) => name.startsWith("time/"));
      phases.forEach((name) => used.add(name));
      this.put(this.first, "Seconds of a step by phase", phases.map((name) => line(series, name, name.slice(5))).filter(Boolean), {stack: true, y: "s"});
      this.against(series);
      for (const column of Object.keys(series)) if (!used.has(column)) this.put(this.rest, column, [line(series, column, column)].filter(Boolean), {});
      this.more.hidden = !this.rest.children.length;
      this.element.hidden = !this.charts.size;
    }

    /* Reward against KL: how far the policy went for what it gained. Both are of the same steps. */
    against(series) {
      const [kl, scores] = [series["eval/kl"]?.x.length > 2 ? series["eval/kl"] : series["objective/kl"], series["eval/kl"]?.x.length > 2 ? series["eval/score"] : series["objective/scores"]];
      if (!kl || !scores) return;
      const at = new Map(scores.x.map((step, i) => [step, scores.y[i]]));
      const both = kl.x.map((step, i) => [step, kl.y[i], at.get(step)]).filter(([, , score]) => score !== undefined);
      if (both.length < 3) return;
      this.put(this.first, "Reward against KL", [{name: "a point per step", x: both.map((p) => p[1]), y: both.map((p) => p[2]), text: both.map((p) => `step ${p[0]}`)}], {x: "KL to the reference", y: "reward", points: true});
    }
  }

  const facts = (stage) => {
    const ranks = stage.devices ? `${stage.devices} ${stage.devices === 1 ? "rank" : "ranks"}, ZeRO-${stage.zero ?? "?"}` : null;
    const parents = Object.entries(stage.parents).filter(([, hash]) => hash);
    const launches = stage.launches > 1 ? `${Relay.span(stage.seconds)} in ${stage.launches} launches` : Relay.span(stage.seconds);
    const told = [
      ["State", Relay.state(stage.state)],
      ["Published", stage.hash ? Relay.short(stage.hash) : null],
      ["Made from", parents.length ? parents.map(([name, hash], i) => [i ? ", " : "", `${name} `, Relay.short(hash)]) : null],
      ["Base", stage.base?.model ? [String(stage.base.model).split("/").slice(-2).join("/"), " ", stage.base.content_hash ? Relay.short(stage.base.content_hash) : ""] : null],
      ["Trained", stage.trained && stage.trained !== "none" ? stage.trained : null],
      ["On", ranks],
      ["Time", launches || null],
      ["Cost", stage.device_hours ? `${stage.device_hours.toPrecision(3)} device-hours` : null],
      ["Seed", stage.seed ?? null],
      ["Files", stage.files ?? null],
    ].filter(([, value]) => value !== null && value !== undefined && value !== "");
    return h("dl", {class: "facts"}, told.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  };

  const dataTable = (data) => {
    const counts = [...new Set(data.flatMap((source) => Object.keys(source)))].filter((name) => !["path", "sha256"].includes(name) && data.some((source) => typeof source[name] === "number"));
    return [h("h3", {}, "Data"), Relay.table([["path", (s) => s.path], ["sha256", (s) => Relay.short(String(s.sha256 || ""))], ...counts.map((name) => [name, (s) => s[name], "n"])], data, {stack: true, label: "Data"})];
  };

  const metricsTable = (metrics) => {
    const names = Object.keys(metrics);
    const table = Relay.table([["metric", (name) => name], ["value", (name) => metrics[name], "n"]], names, {label: "Final numbers"});
    return names.length > 12 ? h("details", {}, h("summary", {}, `Final numbers (${names.length})`), table) : [h("h3", {}, "Final numbers"), table];
  };

  const interval = (row) => `${number(row.value)} (${number(row.low)} to ${number(row.high)})`;

  const tested = (tables) => {
    const found = [];
    if (tables.wins) {
      found.push(h("h3", {}, "Win rate of after against before, with 95 % intervals"), Relay.table([["judge", (r) => r.judge], ["", (r) => r.what], ["rate", interval, "n"], ["0 to 1, dashed at even", (r) => Relay.range(r, 0, 1, 0.5)]], tables.wins, {stack: true, label: "Win rates"}));
    }
    if (tables.changes) {
      found.push(h("h3", {}, "Before and after"), Relay.table([["measure", (r) => r.what], ["before", (r) => r.before, "n"], ["after", (r) => r.after, "n"], ["change", (r) => r.after - r.before, "n"]], tables.changes, {label: "Before and after"}));
    }
    if (tables.judges) {
      found.push(h("h3", {}, "Reward models"), Relay.table([["model", (r) => r.model], ["accuracy (95 %)", (r) => interval({...r, value: r.accuracy}), "n"], ["0 to 1", (r) => Relay.range({...r, value: r.accuracy}, 0, 1, 0.5)], ["of the longer reply", (r) => r.longer, "n"], ["calibration error", (r) => r.ece, "n"]], tables.judges, {stack: true, label: "Reward models"}));
    }
    if (tables.forgetting) {
      const most = Math.max(1e-9, ...tables.forgetting.flatMap((r) => [Math.abs(r.low), Math.abs(r.high)]));
      found.push(h("h3", {}, "What was forgotten"), Relay.table([["measure", (r) => r.measure], ["since", (r) => `${r.since} to ${r.policy}`], ["before", (r) => r.before, "n"], ["after", (r) => r.after, "n"], ["change (95 %)", (r) => interval({...r, value: r.change}), "n"], ["dashed at none", (r) => Relay.range({...r, value: r.change}, -most, most, 0)], ["verdict", (r) => r.verdict]], tables.forgetting, {stack: true, label: "Forgetting"}));
    }
    return found;
  };

  class Calibration {
    constructor() {
      this.chart = new Relay.Chart("Calibration: how often the reply it prefers is the chosen one", {x: "its probability", y: "observed", range: [0, 1.02], diagonal: true, points: true, wide: true});
      this.chart.element.classList.add("alone");
      this.element = h("div", {hidden: true}, this.chart.element);
    }

    update(rows) {
      this.element.hidden = !rows;
      if (!rows) return;
      const names = [...new Set(rows.map((r) => `${r.model}, ${r.set}`))];
      this.chart.update(names.map((name) => {
        const points = rows.filter((r) => `${r.model}, ${r.set}` === name && r.pairs > 0);
        return {name, x: points.map((r) => r.confidence), y: points.map((r) => r.accuracy), text: points.map((r) => `${r.pairs} pairs`)};
      }));
    }
  }

  Relay.Stage = class {
    constructor(name) {
      this.head = h("div", {});
      this.error = h("div", {});
      this.facts = h("div", {});
      this.warnings = h("div", {});
      this.curves = new Curves();
      this.calibration = new Calibration();
      this.tables = h("div", {});
      this.numbers = h("div", {});
      this.data = h("div", {});
      this.samples = new Relay.Samples(name);
      this.element = h("section", {id: `stage-${name}`, "aria-label": `Stage ${name}`}, this.head, this.error, this.facts, this.warnings, this.curves.element, this.tables, this.calibration.element, this.samples.element, this.numbers, this.data);
      this.name = name;
    }

    update(stage) {
      Relay.fill(this.head, [this.name, stage.kind], () => h("h2", {}, this.name, stage.kind && stage.kind !== this.name ? h("span", {class: "soft"}, `  ${stage.kind}`) : ""));
      Relay.fill(this.error, [stage.state, stage.why], () => (["failed", "damaged", "stopped"].includes(stage.state) && stage.why ? h("p", {class: "error"}, stage.why) : null));
      const {series, samples, tables, metrics, data, ...rest} = stage;
      Relay.fill(this.facts, {...rest, seconds: Math.round(rest.seconds || 0)}, () => facts(stage));
      Relay.fill(this.warnings, stage.warnings, (rows) => (rows.length ? h("div", {class: "warnings"}, h("b", {}, `${rows.length} ${rows.length === 1 ? "warning" : "warnings"}`), h("ul", {}, rows.slice(-30).map((row) => h("li", {}, row.step === null ? "" : `step ${row.step}: `, row.text)))) : null));
      this.curves.update(stage.kind === "evaluate" ? {...stage, series: {}} : stage);
      Relay.fill(this.tables, {...tables, calibration: null}, () => tested(tables));
      this.calibration.update(tables.calibration);
      this.samples.update(samples);
      Relay.fill(this.numbers, metrics, () => (Object.keys(metrics).length ? metricsTable(metrics) : null));
      Relay.fill(this.data, data, () => (data.length ? dataTable(data) : null));
    }
  };
})();
