"use strict";
/* The chain of stages: a node each, in columns by how far it is from the start, and arrows from upstream. */
(() => {
  const {h} = Relay;

  const levels = (view) => {
    const depth = {};
    const of = (name) => (depth[name] ??= 1 + Math.max(-1, ...(view.stages[name]?.upstream || []).filter((p) => view.stages[p]).map(of)));
    view.order.forEach(of);
    return Array.from({length: Math.max(0, ...Object.values(depth)) + 1}, (_, level) => view.order.filter((name) => depth[name] === level));
  };

  const share = (stage) => (stage.state === "done" ? 1 : stage.total ? Math.min(1, (stage.step || 0) / stage.total) : 0);

  const node = (view, name) => {
    const stage = view.stages[name];
    const bar = h("i");
    bar.style.width = `${100 * share(stage)}%`;
    const steps = stage.total ? `step ${stage.step ?? 0} of ${stage.total}` : "";
    const cost = stage.device_hours ? `${stage.device_hours.toFixed(stage.device_hours < 1 ? 3 : 1)} device-hours` : "";
    const from = stage.upstream.length ? `from ${stage.upstream.join(", ")}` : stage.base ? "from the base" : "";
    return h("a", {class: "node", href: `#stage-${name}`, id: `node-${name}`},
      h("b", {}, name), h("span", {class: "row"}, Relay.state(stage.state), h("span", {}, Relay.span(stage.seconds))),
      h("div", {class: "bar", "aria-hidden": "true"}, bar),
      h("span", {class: "row"}, h("span", {}, steps), h("span", {}, cost)),
      h("span", {class: "row"}, h("span", {}, from), stage.hash ? Relay.short(stage.hash) : null));
  };

  const SVG = "http://www.w3.org/2000/svg";
  const svg = (tag, attributes) => {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    return element;
  };

  const arrows = (box, view) => {
    const picture = svg("svg", {"aria-hidden": "true"});
    const marker = svg("marker", {id: "head", viewBox: "0 0 8 8", refX: 7, refY: 4, markerWidth: 7, markerHeight: 7, orient: "auto"});
    marker.append(svg("path", {d: "M0 0 8 4 0 8z"}));
    picture.append(marker);
    const place = box.getBoundingClientRect();
    for (const name of view.order) {
      for (const parent of view.stages[name].upstream.filter((p) => view.stages[p])) {
        const a = box.querySelector(`[id="node-${CSS.escape(parent)}"]`)?.getBoundingClientRect();
        const b = box.querySelector(`[id="node-${CSS.escape(name)}"]`)?.getBoundingClientRect();
        if (!a || !b) continue;
        const [x0, y0, x1, y1] = [a.right - place.left, a.top + a.height / 2 - place.top, b.left - place.left - 2, b.top + b.height / 2 - place.top];
        const bend = Math.max(20, (x1 - x0) / 2);
        picture.append(svg("path", {d: `M${x0} ${y0} C${x0 + bend} ${y0} ${x1 - bend} ${y1} ${x1} ${y1}`, "marker-end": "url(#head)"}));
      }
    }
    box.querySelector(":scope > svg")?.remove();
    box.prepend(picture);
  };

  Relay.Chain = class {
    constructor() {
      this.element = h("nav", {class: "chain", "aria-label": "Stages"});
      new ResizeObserver(() => this.view && arrows(this.element, this.view)).observe(this.element);
    }

    update(view) {
      this.view = view;
      const shown = view.order.map((name) => {
        const {state, step, total, seconds, device_hours, hash, upstream} = view.stages[name];
        return [name, state, step, total, Math.round(seconds || 0), device_hours, hash, upstream];
      });
      const focused = this.element.contains(document.activeElement) ? document.activeElement.id : null;
      Relay.fill(this.element, shown, () => levels(view).map((names) => h("div", {class: "level"}, names.map((name) => node(view, name)))));
      if (focused) document.getElementById(focused)?.focus();
      arrows(this.element, view);
    }
  };
})();
