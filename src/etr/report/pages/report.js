// Makes the page's pictures charts: values under the pointer, one legend for all figures, zoom,
// tables that sort. Without scripts every figure is the picture that stands in its place.
(() => {
  "use strict";
  const hidden = new Set(), views = new Map();
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const plots = all(".plot");
  let charts = {};

  async function unpacked(text) {
    const bytes = Uint8Array.from(atob(text), letter => letter.charCodeAt(0));
    const plain = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(plain).text();
  }

  // The specifications, and the script that shows them: the page's policy knows it by its hash.
  async function start() {
    const held = JSON.parse(await unpacked(document.getElementById("charts").textContent));
    const script = document.createElement("script");
    script.textContent = held.runtime;
    document.head.append(script);
    charts = held.charts;
    plots.forEach(plot => seen.observe(plot));
  }

  // Also in etr.report.chart.sized: what fills the room that there is.
  function sized(spec, width) {
    if (spec.facet) {
      const {panels, least, between, beside} = spec.usermeta;
      const rows = Math.ceil(panels / Math.max(1, Math.floor((width - 40) / least)));
      spec.columns = Math.ceil(panels / rows);
      spec.spec.width = Math.floor((width - beside) / spec.columns) - between;
      return spec;
    }
    const label = (spec.layer || []).find(layer => layer.mark.type === "text" && layer.mark.dx);
    if (label) label.mark.limit = Math.floor(0.3 * width);
    return Object.assign(spec, {width, autosize: {type: "fit-x", contains: "padding"}});
  }

  function withoutZoom(spec) {  // a finger scrolls the page
    for (const layer of spec.layer || [])
      if (layer.params) layer.params = layer.params.filter(param => param.name !== "zoom");
    return spec;
  }

  async function show(plot) {
    const width = plot.clientWidth;
    if (!width || plot.dataset.width === String(width)) return;
    plot.dataset.width = width;
    const box = document.createElement("div"), key = plot.closest("figure").id;
    let spec = sized(structuredClone(charts[key]), width);
    if (matchMedia("(pointer: coarse)").matches) spec = withoutZoom(spec);
    spec.config.font = getComputedStyle(document.body).fontFamily;
    box.setAttribute("role", "img");
    box.setAttribute("aria-labelledby", key + "-title");
    const {view} = await vegaEmbed(box, spec, {
      actions: false, renderer: "svg", ast: true, defaultStyle: false, logLevel: 1,
      tooltip: {disableDefaultStyle: true},
    });
    if (views.has(plot)) views.get(plot).finalize();
    views.set(plot, view);
    await view.signal("hidden", [...hidden]).runAsync();
    plot.replaceChildren(box);
  }

  const seen = new IntersectionObserver(entries => {
    for (const {isIntersecting, target} of entries) if (isIntersecting) show(target);
  }, {rootMargin: "700px"});
  let waiting;
  addEventListener("resize", () => {
    clearTimeout(waiting);
    waiting = setTimeout(() => [...views.keys()].forEach(show), 200);
  });

  function hide(names, off) {
    for (const name of names) off ? hidden.add(name) : hidden.delete(name);
    for (const marked of all("[data-variant]")) {
      const gone = hidden.has(marked.dataset.variant);
      if (marked.matches("button")) marked.setAttribute("aria-pressed", String(!gone));
      else marked.classList.toggle("off", gone);
    }
    return Promise.all([...views.values()].map(v => v.signal("hidden", [...hidden]).runAsync()));
  }
  const keys = all("button.key");
  for (const key of keys) key.addEventListener("click", () => {
    const name = key.dataset.variant;
    hide([name], !hidden.has(name));
  });
  for (const button of all("button.every")) button.addEventListener("click", () =>
    hide(keys.map(key => key.dataset.variant), button.dataset.off === "true"));

  function sort(head) {
    const row = head.parentElement, body = row.closest("table").tBodies[0];
    const place = [...row.cells].indexOf(head), down = head.getAttribute("aria-sort") === "ascending";
    for (const other of row.cells) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const told = tr => {
      const {value} = tr.cells[place].dataset;
      return value === undefined ? tr.cells[place].textContent.trim() : Number(value);
    };
    const order = (a, b) => {
      const [x, y] = [told(a), told(b)];
      if (typeof x !== typeof y) return typeof x === "number" ? -1 : 1;  // what lacks comes last
      const found = typeof x === "number" ? x - y : x.localeCompare(y, undefined, {numeric: true});
      return down ? -found : found;
    };
    [...body.rows].sort(order).forEach(tr => body.append(tr));
  }
  for (const head of all("table.results thead th")) {
    head.tabIndex = 0;
    head.addEventListener("click", () => sort(head));
    head.addEventListener("keydown", event => {
      if (event.key === "Enter") sort(head);
    });
  }

  const links = new Map(all("nav a").map(link => [link.hash.slice(1), link]));
  const following = new IntersectionObserver(entries => {
    for (const {isIntersecting, target} of entries) if (isIntersecting) {
      for (const link of links.values()) link.removeAttribute("aria-current");
      links.get(target.id).setAttribute("aria-current", "true");
    }
  }, {rootMargin: "-10% 0px -80% 0px"});
  for (const id of links.keys()) {
    const heading = document.getElementById(id);
    if (heading) following.observe(heading);
  }

  function copy(button) {
    const code = button.parentElement.querySelector("code");
    getSelection().selectAllChildren(code);
    const done = () => { button.textContent = "Copied"; };
    if (navigator.clipboard) navigator.clipboard.writeText(code.textContent).then(done, () => {});
    else if (document.execCommand("copy")) done();
  }
  for (const button of all("button.copy")) {
    button.hidden = false;
    button.addEventListener("click", () => copy(button));
  }

  // A line for each column becomes a line for each row; what is quoted stays so.
  function turned(text) {
    const lines = [[]];
    for (const [, cell, end] of text.matchAll(/("(?:[^"]|"")*"|[^",\n]*)([,\n])/g)) {
      lines.at(-1).push(cell);
      if (end === "\n") lines.push([]);
    }
    lines.pop();
    return lines[0].map((_, row) => lines.map(line => line[row]).join() + "\n").join("");
  }

  // The links hold compressed columns; where a script runs they give plain tables.
  async function download(link) {
    const anchor = document.createElement("a");
    const text = turned(await unpacked(link.href.split(",")[1]));
    anchor.href = URL.createObjectURL(new Blob([text], {type: "text/csv"}));
    anchor.download = link.download.replace(/\.gz$/, "");
    anchor.click();
    URL.revokeObjectURL(anchor.href);
  }
  let ready;
  if ("DecompressionStream" in window) {
    for (const link of all("a.numbers")) link.addEventListener("click", event => {
      event.preventDefault();
      download(link);
    });
    ready = start();
  }
  document.documentElement.classList.add("scripted");
  window.etrReport = {showAll: async () => { await ready; await Promise.all(plots.map(show)); }, hide};
})();
