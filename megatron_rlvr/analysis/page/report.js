"use strict";
// The report: tabs, curves by uPlot, and recorded responses. Text of a run only ever becomes a text node.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);

  function element(name, properties = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key === "class") made.className = value;
      else if (key.startsWith("aria-") || key === "dir") made.setAttribute(key, value);
      else made[key] = value;
    }
    made.append(...children);
    return made;
  }

  // Characters that show nothing, or change the direction of others, are shown by their names.
  const SIGNS = new Map([["\n", "\u21b5"], ["\t", "\u21e5\t"], ["\r", "\u240d"]]);
  const HIDDEN = /[\u0000-\u001f\u007f-\u00a0\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff9-\ufffb]|[\u{e0000}-\u{e0fff}]/gu;

  function signOf(character) {
    const hex = character.codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
    return SIGNS.get(character) ?? `\u2039U+${hex}\u203a`;
  }

  // Nodes of a text in which hidden characters are visible; a joiner or selector inside an emoji stays what it is.
  function readable(text, newline = "\n") {
    if (/^\p{Extended_Pictographic}[\p{Extended_Pictographic}\p{Emoji_Modifier}\u200d\ufe0f]*$/u.test(text)) return [text];
    const nodes = [];
    let from = 0;
    for (const found of text.matchAll(HIDDEN)) {
      if (found.index > from) nodes.push(text.slice(from, found.index));
      nodes.push(element("span", { class: "sign" }, signOf(found[0])));
      if (found[0] === "\n" && newline) nodes.push(newline);
      from = found.index + found[0].length;
    }
    if (from < text.length) nodes.push(text.slice(from));
    return nodes;
  }

  // A token whose character ends in a later token has no text of its own.
  const quoted = (text) => element("code", { dir: "auto" }, ...readable(text === "" ? "\u2026" : text, ""));
  const nats = (thousandths) => `${(thousandths / 1000).toFixed(3)} nats`;
  const percent = (share) => `${(100 * share).toFixed(1)} %`;

  // Tabs -------------------------------------------------------------------------------------------------------------

  const tabs = [...document.querySelectorAll("[role=tab]")].filter((tab) => {
    tab.hidden = !data.parts.includes(tab.getAttribute("aria-controls"));
    return !tab.hidden;
  });
  function open(tab) {
    for (const each of tabs) {
      const chosen = each === tab;
      each.setAttribute("aria-selected", String(chosen));
      each.tabIndex = chosen ? 0 : -1;
      at(each.getAttribute("aria-controls")).hidden = !chosen;
    }
    if (tab.id === "tab-curves") drawCurves();
    if (tab.id === "tab-rollouts") rollouts.start();
    if (tab.id === "tab-analyses") showAnalyses();
  }
  for (const [i, tab] of tabs.entries()) {
    tab.addEventListener("click", () => open(tab));
    tab.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by === undefined) return;
      const other = tabs[(i + by + tabs.length) % tabs.length];
      open(other);
      other.focus();
    });
  }

  // Runs -------------------------------------------------------------------------------------------------------------

  for (const run of data.runs) {
    at("runs").append(
      element("h2", {}, run.name),
      element("p", { class: "note" }, run.folder),
      element("table", {}, ...run.words.map(([subject, text]) =>
        element("tr", {}, element("th", {}, subject), element("td", {}, text)))),
      element("details", {}, element("summary", {}, "All settings"), element("pre", {}, run.settings)),
    );
  }
  at("runs").append(element("p", { class: "note" }, `Written by rlvr ${data.version}.`));

  // Curves -----------------------------------------------------------------------------------------------------------

  const COLOURS = ["#2f7fd1", "#d06a00", "#2a9d62", "#b34db8", "#c43c3c", "#7f7f2a"];
  const DASHES = [[], [8, 4], [2, 3], [10, 3, 2, 3], [14, 5], [5, 5]];
  let drawn = [];

  function css(name) {
    return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  }

  // One table of steps and columns for a panel: x, and for each curve its value and, if it has an error, both ends.
  function tableOf(panel) {
    const curves = [];
    data.curves.runs.forEach((run, r) => panel.series.forEach((series, s) => {
      const values = run.values[series.key];
      if (!values || values.every((value) => value === null)) return;
      const errors = series.error ? run.values[series.error] : undefined;
      const name = data.runs.length === 1 ? series.label
        : panel.series.length === 1 ? data.runs[r].name : `${data.runs[r].name}: ${series.label}`;
      curves.push({ r, s, name, steps: run.steps, values, errors });
    }));
    const steps = [...new Set(curves.flatMap((curve) => curve.steps.filter((_, i) => curve.values[i] !== null)))];
    steps.sort((a, b) => a - b);
    const place = new Map(steps.map((step, i) => [step, i]));
    const spread = (curve, values) => {
      const column = new Array(steps.length).fill(null);
      curve.steps.forEach((step, i) => { if (place.has(step)) column[place.get(step)] = values[i]; });
      return column;
    };
    return { steps, curves, spread };
  }

  function stackOf(table) {
    // The curves of a run are added up, the last at the bottom, so that the area of each ends at the one below it.
    const columns = table.curves.map((curve) => table.spread(curve, curve.values));
    const tops = columns.map((column) => column.slice());
    for (let i = tops.length - 2; i >= 0; i--) {
      if (table.curves[i].r !== table.curves[i + 1].r) continue;
      tops[i] = tops[i].map((value, x) => (value === null ? null : value + (tops[i + 1][x] ?? 0)));
    }
    return { columns, tops };
  }

  // Axes, scales and points that all plots share. Steps and other integers have no ticks between them.
  function frame(x, labels, widthOfY) {
    const short = (tick) => {
      const rounded = Number(tick.toPrecision(6));
      return rounded && Math.abs(rounded) < 0.001 ? rounded.toExponential() : String(rounded);
    };
    const values = (_, ticks) => ticks.map((tick) => (tick === null ? "" : short(tick)));
    const axis = { values, stroke: css("--ink"), grid: { stroke: `${css("--line")}99` }, ticks: { stroke: css("--line") } };
    const integers = x.every(Number.isInteger) ? [1, 2, 5].flatMap((n) => [0, 1, 2, 3, 4, 5, 6].map((e) => n * 10 ** e)) : null;
    return {
      axes: [
        { ...axis, label: labels.x, labelSize: 18, size: 36, ...(integers ? { incrs: integers.sort((m, n) => m - n) } : {}) },
        { ...axis, label: labels.y, labelSize: 18, size: widthOfY },
      ],
      points: { size: 5, fill: css("--paper") },
      // Of values that are all alike the library takes a range of a hundred.
      range: (_, least, most) => (least === most ? [Math.min(0, least), Math.max(1, 2 * most)]
        : uPlot.rangeNum(least, most, 0.1, true)),
    };
  }

  function plot(panel, into) {
    const table = tableOf(panel);
    const { axes, points, range } = frame(table.steps, { x: "step", y: panel.unit }, 56);
    const columns = [table.steps];
    const series = [{ label: "step" }];
    const bands = [];
    const several = data.runs.length > 1;
    const { columns: parts, tops } = panel.stacked ? stackOf(table) : { columns: [], tops: [] };
    table.curves.forEach((curve, i) => {
      const colour = COLOURS[(several && panel.series.length === 1 ? curve.r : curve.s) % COLOURS.length];
      const own = panel.stacked ? tops[i] : table.spread(curve, curve.values);
      columns.push(own);
      series.push({
        label: curve.name,
        stroke: colour,
        width: 1.5,
        dash: DASHES[(several && panel.series.length === 1 ? curve.r : several ? curve.r : curve.s) % DASHES.length],
        spanGaps: true,
        points: { ...points, show: table.steps.length <= 60 },
        fill: panel.stacked && !several ? `${colour}66` : undefined,
        value: (_, value, __, x) => {
          const shown = panel.stacked && x !== null ? parts[i][x] : value;
          return shown === null || shown === undefined ? "\u2013" : Number(shown.toPrecision(4)).toString();
        },
      });
      if (curve.errors) {
        const errors = table.spread(curve, curve.errors);
        for (const sign of [1, -1]) {
          columns.push(own.map((value, x) => (value === null || errors[x] === null ? null : value + sign * errors[x])));
          series.push({ label: "", stroke: `${colour}55`, width: 1, points: { show: false }, spanGaps: true, class: "end" });
        }
        bands.push({ series: [series.length - 2, series.length - 1], fill: `${colour}2b` });
      }
    });
    const chart = new uPlot({
      width: Math.max(320, into.clientWidth),
      height: 230,
      scales: { x: { time: false }, y: { range: panel.stacked ? (_, __, most) => [0, most * 1.05] : range } },
      series,
      bands,
      axes,
      cursor: { sync: { key: "steps" } },
      legend: { markers: { dash: (_, i) => (series[i].dash?.length ? "dashed" : "solid") } },
    }, columns, into);
    return { chart, into };
  }

  function drawCurves() {
    if (drawn.length) return;
    const section = at("curves");
    section.replaceChildren();
    const grid = element("div", { class: "panels" });
    section.append(grid);
    for (const panel of data.curves.panels) {
      const into = element("div", { class: "panel" }, element("h3", {}, panel.title),
        element("p", { class: "note" }, panel.note));
      grid.append(into);
      drawn.push(plot(panel, into));
    }
    if (!data.curves.panels.length) section.append(element("p", { class: "note" }, "There are no metrics yet."));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    drawn = [];
    if (!at("curves").hidden) drawCurves();
    analysesShown = false;
    if (!at("analyses").hidden) showAnalyses();
  });
  addEventListener("resize", () => {
    for (const { chart, into } of drawn) chart.setSize({ width: Math.max(320, into.clientWidth), height: 230 });
  });

  // Rollouts ---------------------------------------------------------------------------------------------------------

  const CHUNK = 2000; // tokens of a response that become nodes at once
  const LEVELS = [100, 300, 700, 1200, 2000, 3000]; // thousandths of a nat from which a background is a level darker

  const rollouts = {
    started: false,
    views: [], // responses on the page
    threshold: null, // entropy from which tokens are marked; null: those that were trained on

    start() {
      if (this.started) return;
      this.started = true;
      const fill = (id, options) => at(id).replaceChildren(...options.map(([value, text]) =>
        element("option", { value }, text)));
      fill("run", data.runs.map((run, i) => [i, run.name]));
      at("legend").append("Entropy in nats:", ...[0, ...LEVELS].map((level, i) =>
        element("span", { class: `e${i}` }, i ? `${level / 1000}+` : "0")));
      at("run").addEventListener("change", () => { this.listSteps(); });
      at("step").addEventListener("change", () => { this.listGroups(); });
      at("group").addEventListener("change", () => { this.show(); });
      for (const id of ["kind", "search"]) at(id).addEventListener("input", () => { this.listSteps(); });
      at("filters").addEventListener("submit", (event) => event.preventDefault());
      at("fraction").addEventListener("input", () => { this.mark(Number(at("fraction").value) / 100); });
      at("trained").addEventListener("click", () => { this.mark(null); });
      at("next").addEventListener("click", () => { this.move(1); });
      at("previous").addEventListener("click", () => { this.move(-1); });
      document.addEventListener("keydown", (event) => { this.key(event); });
      at("responses").addEventListener("mouseover", (event) => {
        const span = event.target.closest("[data-i]");
        if (span) this.point(span);
      });
      this.fill = fill;
      this.listSteps();
    },

    matching() {
      const kind = at("kind").value;
      const text = at("search").value.toLowerCase();
      return data.responses.filter((response) =>
        response.run === Number(at("run").value)
        && (kind === "all" || (kind === "truncated" ? response.truncated : response.correct === (kind === "correct")))
        && (!text || textOf(response).toLowerCase().includes(text)));
    },

    listSteps() {
      const kept = at("step").value;
      const steps = [...new Set(this.matching().map((response) => response.step))];
      this.fill("step", steps.map((step) => [step, step]));
      if (steps.includes(Number(kept))) at("step").value = kept;
      this.listGroups();
    },

    listGroups(place = 0) {
      const step = Number(at("step").value);
      const groups = [...new Set(this.matching().filter((r) => r.step === step).map((r) => r.group))];
      this.fill("group", groups.map((group) => [group, group]));
      if (groups.length) at("group").selectedIndex = place < 0 ? groups.length - 1 : 0;
      this.show();
    },

    move(by) {
      const groups = at("group");
      const steps = at("step");
      if (groups.options[groups.selectedIndex + by]) {
        groups.selectedIndex += by;
        this.show();
      } else if (steps.options[steps.selectedIndex + by]) {
        steps.selectedIndex += by;
        this.listGroups(by);
      }
    },

    show() {
      const run = data.runs[Number(at("run").value)];
      const step = Number(at("step").value);
      const group = Number(at("group").value);
      const matching = this.matching();
      const here = at("step").value === "" ? [] : matching.filter((r) => r.step === step && r.group === group);
      at("shown").textContent = `${matching.length} responses match, ${here.length} shown; the page holds `
        + `${run.shownSteps} of the ${run.recordedSteps} recorded steps of ${run.name}.`
        + (run.recordedSteps ? "" : " Set log.rollouts above 0 to record some.");
      at("prompt").hidden = !here.length;
      if (here.length) {
        at("prompt").firstChild.textContent = `Prompt ${here[0].promptId}, gold answer ${here[0].answer}`;
        at("prompt").lastChild.replaceChildren(...readable(here[0].prompt));
      }
      this.entropies = Int32Array.from(data.responses.filter((r) => r.run === Number(at("run").value)
        && r.step === step).flatMap((r) => r.e)).sort();
      this.views = here.map((response) => viewOf(response));
      at("responses").replaceChildren(...this.views.map((view) => view.root));
      at("token").replaceChildren("Point at a token, or focus a response and use the arrow keys.");
      this.mark(at("trained").getAttribute("aria-pressed") === "true" ? null : Number(at("fraction").value) / 100);
      for (const view of this.views) view.more();
    },

    mark(fraction) {
      at("trained").setAttribute("aria-pressed", String(fraction === null));
      const own = data.runs[Number(at("run").value)].fraction;
      at("fraction").value = String(Math.round(100 * (fraction ?? own)));
      at("percent").textContent = `${at("fraction").value} %`;
      if (fraction === null) this.threshold = null;
      else {
        // The smallest of the ceil(fraction * n) largest entropies, as training chooses.
        const count = Math.ceil(fraction * this.entropies.length);
        this.threshold = count ? this.entropies[this.entropies.length - count] : Infinity;
      }
      for (const view of this.views) view.recolour();
    },

    key(event) {
      if (at("rollouts").hidden || event.ctrlKey || event.altKey || event.metaKey) return;
      const typing = event.target instanceof Element && event.target.matches("input[type=search], select");
      if (event.key === "Escape" && typing) event.target.blur();
      else if (typing) return;
      else if (event.key === "n") this.move(1);
      else if (event.key === "p") this.move(-1);
      else if (event.key === "/") { event.preventDefault(); at("search").focus(); }
    },

    point(span) {
      document.querySelector(".here")?.classList.remove("here");
      span.classList.add("here");
      const view = this.views.find((each) => each.root.contains(span));
      describe(view.response, Number(span.dataset.i));
    },
  };

  const texts = new WeakMap();
  function textOf(response) {
    if (!texts.has(response)) texts.set(response, response.t.map((number) => data.texts[number]).join(""));
    return texts.get(response);
  }

  function marked(response, i) {
    if (rollouts.threshold !== null) return response.e[i] >= rollouts.threshold;
    response.trained ??= new Set(response.s);
    return response.trained.has(i);
  }

  function viewOf(response) {
    const spans = [];
    const text = element("div", { class: "text", dir: "auto", tabIndex: 0, "aria-label": "tokens of the response" });
    const verdict = response.correct ? "correct" : "incorrect";
    const facts = [
      `response ${response.index}`, `${response.t.length} tokens`, response.truncated ? "truncated" : "ended by itself",
      `reward ${response.reward}`, `advantage ${response.advantage}`, `${response.s.length} selected`,
      `staleness ${response.staleness}`, ...(response.readAnswer === null ? [] : [`answer ${response.readAnswer}`]),
      ...(response.failure === null ? [] : [`not graded: ${response.failure}`]),
    ];
    const root = element("article", { class: "response" },
      element("header", {}, element("span", { class: `verdict ${verdict}` }, response.correct ? "\u2713 " : "\u2717 ", verdict),
        ` \u00b7 ${facts.join(" \u00b7 ")}`), text);
    const end = element("span");
    text.append(end);
    const view = {
      response,
      root,
      more() {
        const from = spans.length;
        const made = [];
        for (let i = from; i < Math.min(from + CHUNK, response.t.length); i++) {
          const level = LEVELS.filter((least) => response.e[i] >= least).length;
          const span = element("span", { class: `e${level}${marked(response, i) ? " mark" : ""}` },
            ...readable(data.texts[response.t[i]]));
          span.dataset.i = String(i);
          made.push(span);
        }
        spans.push(...made);
        end.before(...made);
        return made.length > 0;
      },
      recolour() {
        spans.forEach((span, i) => span.classList.toggle("mark", marked(response, i)));
      },
    };
    new IntersectionObserver((entries) => { if (entries.some((e) => e.isIntersecting)) view.more(); },
      { root: text, rootMargin: "600px" }).observe(end);
    let current = -1;
    text.addEventListener("keydown", (event) => {
      const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (by === undefined) return;
      event.preventDefault();
      let i = current + by;
      while (event.shiftKey && i >= 0 && i < response.t.length && !marked(response, i)) i += by;
      if (i < 0 || i >= response.t.length) return;
      while (i >= spans.length && view.more());
      current = i;
      rollouts.point(spans[i]);
      spans[i].scrollIntoView({ block: "nearest" });
    });
    return view;
  }

  function describe(response, i) {
    const place = response.s.indexOf(i);
    const facts = [
      ["token", quoted(data.texts[response.t[i]])], ["position", String(i)],
      ["entropy", nats(response.e[i])], ["probability before the step", percent(Math.exp(response.o[i] / 1000))],
      ["log-probability at sampling", nats(response.o[i] + response.r[i])], ["before the step", nats(response.o[i])],
      ["after it", nats(response.o[i] + response.n[i])], ["advantage", String(response.advantage)],
      ["selected", place < 0 ? "no" : "yes"],
    ];
    const list = element("dl", {}, ...facts.map(([name, value]) =>
      element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    at("token").replaceChildren(list);
    if (place < 0) return;
    const row = response.a[place];
    const alternatives = [];
    for (let k = 0; k < row.length; k += 2) {
      alternatives.push(quoted(data.texts[row[k]]), ` ${percent(row[k + 1] / 1000)}  `);
    }
    at("token").append(element("div", { class: "alternatives" }, "likeliest tokens here: ", ...alternatives));
  }

  // Forking tokens ---------------------------------------------------------------------------------------------------

  function tableOfTokens(rows) {
    const head = ["token", "id", "occurrences", "mean entropy (nats)", "selected"];
    return element("table", {}, element("thead", {}, element("tr", {}, ...head.map((word, i) =>
      element("th", { class: i ? "number" : "" }, word)))), element("tbody", {}, ...rows.map((row) => element("tr", {},
      element("td", {}, quoted(row.text)),
      ...[row.id, row.count, row.entropy.toFixed(3), percent(row.selected)].map((value) =>
        element("td", { class: "number" }, String(value)))))));
  }

  function cloudOf(rows) {
    const most = Math.max(...rows.map((row) => row.count));
    return element("p", { class: "cloud" }, ...rows.map((row) => {
      const word = element("span", {}, quoted(row.text), " ");
      word.style.fontSize = `${0.8 + 1.6 * Math.sqrt(row.count / most)}rem`;
      word.title = `${row.count} occurrences, mean entropy ${row.entropy.toFixed(3)} nats`;
      return word;
    }));
  }

  for (const run of data.parts.includes("tokens") ? data.runs : []) {
    const forks = run.forks;
    at("tokens").append(
      element("h2", {}, run.name),
      element("p", { class: "note" }, `Of ${forks.tokens} recorded tokens; listed are those with at least ${data.least} `
        + "occurrences. In the cloud, a token is the larger the more often it occurs."),
    );
    if (!forks.most.length) continue;
    const part = (title, rows) => element("div", {}, element("h3", {}, title), cloudOf(rows), tableOfTokens(rows));
    at("tokens").append(element("div", { class: "panels" }, part("Highest mean entropy", forks.most),
      part("Lowest mean entropy", forks.fewest)));
  }

  // Analyses ---------------------------------------------------------------------------------------------------------

  const MARKS = [[7, 4], [2, 4]];

  function drawMark(chart, x, dash) {
    const at = Math.round(chart.valToPos(x, "x", true));
    const { left, top, width, height } = chart.bbox;
    if (at < left || at > left + width) return;
    Object.assign(chart.ctx, { strokeStyle: css("--ink"), lineWidth: devicePixelRatio });
    chart.ctx.setLineDash(dash);
    chart.ctx.beginPath();
    chart.ctx.moveTo(at, top);
    chart.ctx.lineTo(at, top + height);
    chart.ctx.stroke();
    chart.ctx.setLineDash([]);
  }

  function plotOf(result, into) {
    const given = result.plot;
    const bounds = (curve, sign) => curve.y.map((value, i) => value + sign * curve.errors[i]);
    const table = uPlot.join(given.curves.map((curve) =>
      [curve.x, curve.y, ...(curve.errors ? [bounds(curve, 1), bounds(curve, -1)] : [])]));
    const { axes, points, range } = frame(table[0], given, 66);
    const series = [{ label: given.x }];
    const bands = [];
    given.curves.forEach((curve, i) => {
      const stroke = COLOURS[i % COLOURS.length];
      series.push({
        label: curve.label,
        stroke,
        dash: DASHES[i % DASHES.length],
        width: 1.5,
        spanGaps: !given.steps,
        points: { ...points, show: !given.steps && curve.x.length <= 60 },
        paths: given.steps ? uPlot.paths.stepped({ align: 1 }) : undefined,
      });
      if (!curve.errors) return;
      for (let end = 0; end < 2; end += 1) {
        series.push({ label: "", stroke: `${stroke}55`, width: 1, points: { show: false }, spanGaps: true, class: "end" });
      }
      bands.push({ series: [series.length - 2, series.length - 1], fill: `${stroke}2b` });
    });
    const marks = Object.entries(given.marks ?? {});
    if (marks.length) {
      into.append(element("p", { class: "note" }, marks.map(([name, x], i) =>
        `${["Dashed", "Dotted"][i % 2]} line: ${name}, ${written(x)}`).join(". "), "."));
    }
    return new uPlot({
      width: Math.max(320, into.clientWidth),
      height: 260,
      scales: { x: { time: false }, y: given.log_y ? { distr: 3 } : { range } },
      series,
      bands,
      axes,
      hooks: { draw: [(chart) => marks.forEach(([, x], i) => drawMark(chart, x, MARKS[i % 2]))] },
      legend: { markers: { dash: (_, i) => (series[i].dash?.length ? "dashed" : "solid") } },
    }, given.log_y ? table.map((column, i) => (i ? column.map((value) => value || null) : column)) : table, into);
  }

  function written(value) {
    if (value === null) return "\u2013";
    return typeof value === "number" && !Number.isInteger(value) ? Number(value.toPrecision(5)).toString() : String(value);
  }

  function tableOfResult(result) {
    const kinds = result.columns.map((_, i) => (result.rows.some((row) => typeof row[i] === "number") ? "number" : ""));
    const cell = (value, i) => element("td", { class: kinds[i] },
      ...(result.cloud && i === 0 ? [quoted(value)] : readable(written(value))));
    return element("table", {}, element("thead", {}, element("tr", {}, ...result.columns.map((name, i) =>
      element("th", { class: kinds[i] }, name)))), element("tbody", {}, ...result.rows.map((row) =>
      element("tr", {}, ...row.map(cell)))));
  }

  const CLOUD = 50; // tokens

  function partOf(result) {
    const plots = element("div");
    const metrics = element("table", {}, ...Object.entries(result.metrics).map(([name, value]) => element("tr", {},
      element("th", {}, name), element("td", {}, ...readable(written(value))))));
    const table = element("details", {}, element("summary", {}, `Table: ${result.rows.length} of ${result.allRows} rows`),
      tableOfResult(result));
    const part = element("div", { class: "result" }, element("h3", {}, result.title), plots, metrics, table);
    if (result.cloud && result.rows.length) {
      plots.append(cloudOf(result.rows.slice(0, CLOUD).map(([text, , count, entropy]) => ({ text, count, entropy }))));
    }
    return { part, plots };
  }

  let analysesShown = false;
  function showAnalyses() {
    if (analysesShown) return;
    analysesShown = true;
    const section = at("analyses");
    section.replaceChildren();
    for (const run of data.runs) {
      section.append(element("h2", {}, run.name));
      if (!run.analyses.length) section.append(element("p", { class: "note" }, "None: rlvr analyze writes them."));
      for (const result of run.analyses) {
        const { part, plots } = partOf(result);
        section.append(part);
        if (result.plot) plotOf(result, plots);
      }
    }
  }

  // Result of an ablation ----------------------------------------------------------------------------------------------

  if (data.parts.includes("result")) {
    at("result").append(element("h2", {}, "Conclusion"), element("p", {}, ...readable(data.conclusion)),
      ...data.result.flatMap((result) => [element("h2", {}, result.title), tableOfResult(result)]));
    open(tabs[0]);
  }
})();
