"use strict";
/* Replies to read: searched, filtered by step, sorted by any number, side by side where two policies answered. */
(() => {
  const {h, number} = Relay;
  const PAGE = 12;
  const TEXTS = ["prompt", "before", "after", "reply"];

  const marked = (text, words) => {
    const at = words ? text.toLowerCase().indexOf(words) : -1;
    if (at < 0) return [text];
    return [text.slice(0, at), h("mark", {}, text.slice(at, at + words.length)), ...marked(text.slice(at + words.length), words)];
  };

  Relay.Samples = class {
    constructor(name) {
      this.search = h("input", {type: "search", placeholder: "Search prompts and replies", "aria-label": `Search samples of ${name}`, oninput: () => this.show(PAGE)});
      this.step = h("select", {onchange: () => this.show(PAGE)});
      this.sort = h("select", {onchange: () => this.show(PAGE)});
      this.stepLabel = h("label", {}, "Step", this.step);
      this.count = h("span", {class: "soft small", role: "status"});
      this.rows = h("div", {});
      this.element = h("div", {class: "samples"}, h("h3", {}, "Samples"),
        h("div", {class: "filters"}, this.search, this.stepLabel, h("label", {}, "Order", this.sort), this.count), this.rows);
      this.limit = PAGE;
    }

    update(samples) {
      this.element.hidden = !samples.rows.length;
      const told = JSON.stringify(samples);
      if (told === this.told) return;
      this.told = told;
      this.columns = samples.columns;
      this.all = samples.rows.map((row) => Object.fromEntries(samples.columns.map((column, i) => [column, row[i]])));
      const steps = [...new Set(this.all.map((row) => row.step).filter((step) => typeof step === "number"))].sort((a, b) => b - a);
      this.choices(this.step, [["", "all"], ...steps.map((step) => [String(step), String(step)])]);
      this.stepLabel.hidden = steps.length < 2;
      const numbers = this.columns.filter((column) => column !== "step" && this.all.some((row) => typeof row[column] === "number"));
      this.choices(this.sort, [["", "as written"], ...numbers.flatMap((column) => [[`-${column}`, `highest ${column}`], [`+${column}`, `lowest ${column}`]])]);
      this.show(this.limit);
    }

    choices(select, wanted) {
      const chosen = select.value;
      Relay.fill(select, wanted, () => wanted.map(([value, text]) => h("option", {value}, text)));
      if (wanted.some(([value]) => value === chosen)) select.value = chosen;
    }

    show(limit) {
      this.limit = limit;
      const words = this.search.value.trim().toLowerCase();
      let found = this.all.filter((row) => (!this.step.value || String(row.step) === this.step.value)
        && (!words || Object.values(row).some((value) => typeof value === "string" && value.toLowerCase().includes(words))));
      const [sign, column] = [this.sort.value[0], this.sort.value.slice(1)];
      if (column) found = [...found].sort((a, b) => (sign === "-" ? b[column] - a[column] : a[column] - b[column]));
      const texts = TEXTS.filter((name) => this.columns.includes(name));
      const rest = this.columns.filter((name) => !texts.includes(name));
      const columns = [
        ...texts.map((name) => [name === "before" || name === "after" ? `reply ${name}` : name, (row) => h("span", {}, marked(String(row[name] ?? "").trim(), words)), "text"]),
        ...rest.map((name) => [name, (row) => (typeof row[name] === "number" ? number(row[name]) : String(row[name] ?? "")), "n"]),
      ];
      this.count.textContent = `${found.length} of ${this.all.length}`;
      this.rows.replaceChildren(Relay.table(columns, found.slice(0, limit), {stack: true, label: "Samples"}),
        ...(found.length > limit ? [h("button", {type: "button", onclick: () => this.show(limit + 4 * PAGE)}, `Show more (${found.length - limit})`)] : []));
    }
  };
})();
