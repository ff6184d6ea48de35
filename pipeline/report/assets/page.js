"use strict";
/* The page: one run or several, from the data in it or, live, from the dashboard that serves it. */
(() => {
  const {h} = Relay;
  const main = document.getElementById("main");

  class Run {
    constructor() {
      this.lead = h("div", {});
      this.chain = new Relay.Chain();
      this.stages = new Map();
      this.sections = h("div", {});
      this.recipe = h("div", {});
      this.element = h("div", {}, this.lead, this.chain.element, this.sections, this.recipe);
    }

    update(view) {
      const hours = view.order.reduce((sum, name) => sum + (view.stages[name].device_hours || 0), 0);
      const warnings = view.order.reduce((sum, name) => sum + view.stages[name].warnings.length, 0);
      Relay.fill(this.lead, [view.name, view.state, view.folder, Math.round(view.updated), hours.toFixed(3), warnings], () => [
        h("h1", {}, view.name),
        h("div", {class: "lead"}, Relay.state(view.state), h("span", {}, "changed ", h("b", {}, Relay.when(view.updated))), h("span", {}, h("b", {}, hours.toFixed(hours < 1 ? 3 : 1)), " device-hours"), warnings ? h("span", {}, h("b", {}, String(warnings)), warnings === 1 ? " warning" : " warnings") : null, h("span", {class: "small"}, view.folder)),
      ]);
      this.chain.update(view);
      for (const name of view.order) {
        if (!this.stages.has(name)) {
          this.stages.set(name, new Relay.Stage(name));
          this.sections.append(this.stages.get(name).element);
        }
        this.stages.get(name).update(view.stages[name]);
      }
      Relay.fill(this.recipe, [view.recipe, view.command, view.environment], () => [
        h("h2", {id: "recipe"}, "Recipe and environment"),
        view.command ? h("p", {}, h("code", {}, view.command.join(" "))) : null,
        view.recipe ? h("details", {open: view.recipe.length < 3000}, h("summary", {}, "Recipe, with what was overridden"), h("pre", {tabindex: "0", "aria-label": "Recipe"}, view.recipe)) : h("p", {class: "soft"}, "The recipe was not recorded with this run."),
        Object.keys(view.environment).length ? Relay.table([["", (name) => name], ["version", (name) => String(view.environment[name])]], Object.keys(view.environment), {label: "Environment"}) : null,
      ]);
    }
  }

  class List {
    constructor() {
      this.chosen = new Set();
      this.search = h("input", {type: "search", placeholder: "Search runs", "aria-label": "Search runs", oninput: () => this.show()});
      this.button = h("button", {type: "button", disabled: true, onclick: () => { location.hash = `compare=${[...this.chosen].map(encodeURIComponent).join(",")}`; }}, "Compare");
      this.rows = h("div", {});
      this.element = h("div", {}, h("h1", {}, "Runs"), h("div", {class: "filters"}, this.search, this.button), this.rows);
    }

    update(runs) {
      this.runs = runs;
      this.show();
    }

    show() {
      const words = this.search.value.trim().toLowerCase();
      const found = this.runs.filter((run) => `${run.name} ${run.id} ${run.state}`.toLowerCase().includes(words));
      Relay.fill(this.rows, found, () => (found.length ? Relay.table([
        ["compare", (run) => h("input", {type: "checkbox", "aria-label": `Compare ${run.id}`, checked: this.chosen.has(run.id), onchange: (event) => this.choose(run.id, event.target.checked)})],
        ["run", (run) => h("a", {href: `#run=${encodeURIComponent(run.id)}`}, run.id)],
        ["recipe", (run) => run.name],
        ["state", (run) => Relay.state(run.state)],
        ["stages", (run) => Object.entries(run.stages).map(([name, state], i) => [i ? "  " : "", h("span", {title: `${name}: ${state}`}, `${Relay.MARKS[state] || "·"} ${name}`)])],
        ["latest", (run) => Object.entries(run.latest).slice(-1).map(([stage, last]) => `${stage} ${last.metric} ${Relay.number(last.value)}`)],
        ["changed", (run) => Relay.when(run.updated)],
      ], found, {stack: true, label: "Runs"}) : h("p", {class: "soft"}, this.runs.length ? "No run by that name." : "No runs here yet.")));
    }

    choose(id, on) {
      if (on) this.chosen.add(id);
      else this.chosen.delete(id);
      this.button.disabled = this.chosen.size < 2;
      this.button.textContent = this.chosen.size ? `Compare ${this.chosen.size}` : "Compare";
    }
  }

  /* A part of the page that stays as long as it is asked for; `key` says for what. */
  let shown = {key: null, part: null};
  const show = (key, make) => {
    if (shown.key !== key) {
      shown = {key, part: make()};
      main.replaceChildren(shown.part.element);
    }
    return shown.part;
  };

  const where = (...parts) => document.getElementById("where").replaceChildren(...parts);

  const views = (found) => {
    document.title = `${Relay.names(found).join(", ")} - Relay`;
    if (found.length === 1) show(`run ${found[0].folder}`, () => new Run()).update(found[0]);
    else show(`compare ${found.map((view) => view.folder)}`, () => new Relay.Compare()).update(found);
  };

  const theme = document.getElementById("theme");
  const setTheme = (dark) => {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    theme.setAttribute("aria-pressed", String(dark));
    Relay.redraw();
  };
  const prefers = matchMedia("(prefers-color-scheme: dark)");
  const remembered = () => { try { return localStorage.getItem("relay-theme"); } catch { return null; } };
  setTheme((remembered() || (prefers.matches ? "dark" : "light")) === "dark");
  prefers.addEventListener("change", (event) => { if (!remembered()) setTheme(event.matches); });
  theme.addEventListener("click", () => {
    const dark = !Relay.dark();
    try { localStorage.setItem("relay-theme", dark ? "dark" : "light"); } catch { /* a file page may not store */ }
    setTheme(dark);
  });

  const embedded = document.getElementById("data");
  if (embedded) {
    const found = JSON.parse(embedded.textContent);
    where(Relay.names(found).join(", "));
    views(found);
    return;
  }

  /* Live: what the address asks for, every two seconds; slower while the page is hidden or nothing runs. */
  const PAUSE = {busy: 2000, idle: 10000};
  const status = document.getElementById("live");
  const asked = () => {
    const [kind, rest] = location.hash.slice(1).split("=");
    return ["run", "compare"].includes(kind) && rest ? rest.split(",").map(decodeURIComponent) : [];
  };
  const get = async (path) => {
    const answer = await fetch(path, {headers: {accept: "application/json"}});
    if (!answer.ok) throw new Error(answer.status === 404 ? "this run is not there" : `the dashboard answers ${answer.status}`);
    return answer.json();
  };

  let turn = 0, timer = 0;
  const refresh = async () => {
    const mine = ++turn, ids = asked();
    clearTimeout(timer);
    let pause = PAUSE.idle;
    try {
      const found = ids.length ? await Promise.all(ids.map((id) => get(`api/run?id=${encodeURIComponent(id)}`))) : await get("api/runs");
      if (mine !== turn) return;
      if (ids.length) {
        where(h("a", {href: "#"}, "All runs"), ` / ${ids.join(", ")}`);
        views(found);
      } else {
        where("");
        document.title = "Runs - Relay";
        show("list", () => new List()).update(found);
      }
      if (found.some((run) => run.state === "running")) pause = PAUSE.busy;
      status.textContent = `live, ${new Date().toLocaleTimeString()}`;
    } catch (error) {
      if (mine !== turn) return;
      status.textContent = `not up to date: ${error.message}`;
      if (shown.key === null) main.replaceChildren(h("p", {class: "error"}, error.message));
    }
    timer = setTimeout(refresh, document.hidden ? PAUSE.idle : pause);
  };
  addEventListener("hashchange", refresh);
  document.addEventListener("visibilitychange", () => { if (!document.hidden) refresh(); });
  refresh();
})();
