"use strict";
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const drawn = new Map(); // of a chart's id, the promise of its view
  const canvases = new Set(); // ids of charts on a canvas, whose colours are fixed when drawn

  const value = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  /** Colours of the style sheet; as variables in SVG, so that they follow it. */
  function coloured(part, fixed) {
    if (typeof part === "string" && /^--[a-z]+$/.test(part)) return fixed ? value(part) : `var(${part})`;
    if (Array.isArray(part)) return part.map((each) => coloured(each, fixed));
    if (part && typeof part === "object") {
      return Object.fromEntries(Object.entries(part).map(([key, each]) => [key, coloured(each, fixed)]));
    }
    return part;
  }

  function config(width, fixed) {
    const ink = fixed ? value("--axis") : "var(--ink)";
    const muted = fixed ? value("--axis") : "var(--muted)";
    const line = fixed ? value("--line") : "var(--line)";
    const font = getComputedStyle(document.body).fontFamily;
    const labelLimit = Math.min(260, Math.round(width * 0.45));
    const words = { labelFont: font, titleFont: font, labelFontSize: width < 500 ? 10.5 : 12, titleFontSize: 12, titleFontWeight: 500 };
    return {
      font,
      background: "transparent",
      view: { stroke: null },
      axis: { ...words, labelColor: ink, titleColor: muted, domainColor: line, tickColor: line, gridColor: line,
        labelLimit },
      axisX: { tickCount: Math.max(3, Math.round(width / 120)) },
      axisY: { labelPadding: 6 },
      legend: { ...words, labelColor: ink, titleColor: muted, orient: "bottom", gradientLength: Math.min(220, width / 2) },
      scale: { bandPaddingInner: 0.25 },
      rect: { discreteBandSize: { band: 1 } },
    };
  }

  function events(data) {
    const rows = [];
    const ms = (us) => `${(us / 1000).toPrecision(4)} ms`;
    for (const rank of data.ranks) {
      for (let place = 0; place < rank.begin_us.length; place += 1) {
        const stage = data.stages[rank.stage[place]];
        if (stage === "idle" || stage === "setup") continue;
        const begin = rank.begin_us[place];
        const duration = rank.duration_us[place];
        rows.push({
          rank: rank.rank,
          where: `rank ${rank.rank}`,
          track: data.tracks[rank.track[place]],
          stage,
          layer: rank.layer[place] < 0 ? "—" : rank.layer[place],
          micro_batch: rank.micro_batch[place],
          begin: begin / 1000,
          end: (begin + duration) / 1000,
          begins: ms(begin),
          takes: ms(duration),
        });
      }
    }
    return rows;
  }

  async function embed(plot) {
    const chart = charts[plot.id];
    const cells = chart.spec.data.values ? chart.spec.data.values.length : 0;
    const fixed = Boolean(chart.data) || cells > 2500;
    if (fixed) canvases.add(plot.id);
    const spec = coloured(chart.spec, fixed);
    spec.width = "container";
    spec.autosize = { type: "fit-x", contains: "padding" };
    if (chart.data) {
      spec.data.values = events(chart.data);
      const [from, to] = stretch(plot);
      spec.params[0].value = from;
      spec.params[1].value = to;
    }
    // In a part of its own, so that what the plot is called stays.
    const { view } = await vegaEmbed(plot.firstElementChild, spec, {
      mode: "vega-lite",
      actions: false,
      ast: true, // no code made from strings: the page forbids it
      renderer: fixed ? "canvas" : "svg",
      config: config(plot.clientWidth, fixed),
      tooltip: { disableDefaultStyle: true },
    });
    plot.dataset.drawn = "yes";
    return view;
  }

  function draw(plot) {
    if (!drawn.has(plot.id)) drawn.set(plot.id, embed(plot));
    return drawn.get(plot.id);
  }

  function isSeen(plot) {
    return plot.checkVisibility() && plot.clientWidth > 0;
  }

  // Plots are drawn when they come near the window, the others while nothing else is to do.
  const watcher = new IntersectionObserver(
    (entries) => entries.filter((entry) => entry.isIntersecting).forEach((entry) => draw(entry.target)),
    { rootMargin: "400px" },
  );
  const plots = [...document.querySelectorAll(".plot")];
  plots.forEach((plot) => watcher.observe(plot));
  const later = window.requestIdleCallback || ((task) => setTimeout(task, 200));
  async function drawNext() {
    const next = plots.find((plot) => isSeen(plot) && !drawn.has(plot.id));
    if (!next) return;
    await draw(next);
    later(drawNext);
  }
  window.addEventListener("load", () => later(drawNext));

  async function redraw(wanted) {
    for (const id of [...drawn.keys()].filter(wanted)) {
      const view = await drawn.get(id);
      view.finalize();
      drawn.delete(id);
      const plot = document.getElementById(id);
      if (isSeen(plot)) draw(plot);
    }
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw((id) => canvases.has(id)));
  let width = window.innerWidth;
  window.addEventListener("resize", () => {
    if (Math.abs(window.innerWidth - width) < 60) return; // labels have other limits, no more
    width = window.innerWidth;
    redraw(() => true);
  });

  // Tabs: one panel at a time; arrows go from tab to tab.
  for (const list of document.querySelectorAll("[role=tablist]")) {
    const tabs = [...list.querySelectorAll("[role=tab]")];
    const select = (chosen) => {
      for (const tab of tabs) {
        const isChosen = tab === chosen;
        tab.setAttribute("aria-selected", String(isChosen));
        tab.tabIndex = isChosen ? 0 : -1;
        document.getElementById(tab.getAttribute("aria-controls")).hidden = !isChosen;
      }
    };
    tabs.forEach((tab, place) => {
      tab.addEventListener("click", () => select(tab));
      tab.addEventListener("keydown", (event) => {
        const to = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: -1 }[event.key];
        if (to === undefined) return;
        event.preventDefault();
        const next = tabs[(to + tabs.length) % tabs.length];
        select(next);
        next.focus();
      });
    });
  }

  // Timelines: all of a group show the same stretch of time.
  const stretches = new Map();

  function stretch(plot) {
    const group = plot.closest(".timelines");
    if (!stretches.has(group.id)) stretches.set(group.id, [0, charts[plot.id].data.until_ms]);
    return stretches.get(group.id);
  }

  async function show(group, from, to) {
    const first = group.querySelector(".plot");
    const until = charts[first.id].data.until_ms;
    const length = Math.min(Math.max(to - from, until / 5000), until);
    const begin = Math.min(Math.max(from, 0), until - length);
    stretches.set(group.id, [begin, begin + length]);
    group.dataset.fromMs = begin;
    group.dataset.toMs = begin + length;
    for (const plot of group.querySelectorAll(".plot")) {
      if (!drawn.has(plot.id)) continue;
      const view = await drawn.get(plot.id);
      view.signal("from_ms", begin).signal("to_ms", begin + length).runAsync();
    }
  }

  function move(group, what, at = 0.5) {
    const [from, to] = stretch(group.querySelector(".plot"));
    const length = to - from;
    const around = from + at * length;
    const zoomed = (factor) => [around - at * length * factor, around + (1 - at) * length * factor];
    const moves = {
      in: () => zoomed(0.5),
      out: () => zoomed(2),
      left: () => [from - length / 4, to - length / 4],
      right: () => [from + length / 4, to + length / 4],
      all: () => [0, Infinity],
    };
    const [begin, end] = moves[what]();
    show(group, begin, Number.isFinite(end) ? end : charts[group.querySelector(".plot").id].data.until_ms);
  }

  const keys = { ArrowLeft: "left", ArrowRight: "right", "+": "in", "=": "in", "-": "out", 0: "all" };
  for (const group of document.querySelectorAll(".timelines")) {
    for (const button of group.querySelectorAll("[data-do]")) {
      button.addEventListener("click", () => move(group, button.dataset.do));
    }
    for (const each of group.querySelectorAll("details.timeline")) {
      each.addEventListener("toggle", () => { if (each.open) draw(each.querySelector(".plot")); });
    }
    for (const plot of group.querySelectorAll(".plot")) {
      // Where on the time axis the pointer is, 0 to 1.
      const share = async (event) => {
        const view = await draw(plot);
        const box = plot.getBoundingClientRect();
        return (event.clientX - box.left - view.origin()[0]) / view.signal("width");
      };
      plot.addEventListener("keydown", (event) => {
        if (!keys[event.key] || event.ctrlKey || event.metaKey) return;
        event.preventDefault();
        move(group, keys[event.key]);
      });
      plot.addEventListener("wheel", async (event) => {
        if (!event.ctrlKey) return; // the page scrolls
        event.preventDefault();
        move(group, event.deltaY < 0 ? "in" : "out", Math.min(1, Math.max(0, await share(event))));
      }, { passive: false });
      let held = null;
      plot.addEventListener("pointerdown", async (event) => {
        if (event.button) return;
        held = { at: await share(event), stretch: stretch(plot) };
      });
      plot.addEventListener("pointermove", async (event) => {
        if (!held || !event.buttons) { held = null; return; }
        const [from, to] = held.stretch;
        const shift = (held.at - (await share(event))) * (to - from);
        if (held) show(group, from + shift, to + shift);
      });
      plot.addEventListener("pointerup", () => { held = null; });
    }
  }

  // A timeline as a Chrome trace: a process for every rank, a thread for each of its rows.
  function trace(data) {
    const made = [];
    for (const rank of data.ranks) {
      made.push({ ph: "M", pid: rank.rank, name: "process_name", args: { name: `rank ${rank.rank}` } });
      data.tracks.forEach((track, tid) => made.push({ ph: "M", pid: rank.rank, tid, name: "thread_name", args: { name: track } }));
      rank.begin_us.forEach((ts, place) => made.push({
        ph: "X", pid: rank.rank, tid: rank.track[place], name: data.stages[rank.stage[place]], ts, dur: rank.duration_us[place],
        args: { layer: rank.layer[place], micro_batch: rank.micro_batch[place] },
      }));
    }
    return { traceEvents: made, displayTimeUnit: "ms" };
  }
  for (const button of document.querySelectorAll("button.trace")) {
    button.addEventListener("click", () => {
      const { data, title } = charts[button.dataset.chart];
      const link = document.createElement("a");
      link.href = URL.createObjectURL(new Blob([JSON.stringify(trace(data))], { type: "application/json" }));
      link.download = `trace-${title.replace(/[^A-Za-z0-9._-]+/g, "-")}.json`;
      link.click();
      URL.revokeObjectURL(link.href);
    });
  }

  // On a narrow screen the contents would push the content away.
  if (window.innerWidth < 1100) document.querySelector(".nav details").open = false;

  // On paper all tables are open, and plots as the reader left them.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.tables:not([open])")];
    opened.forEach((each) => { each.open = true; });
  });
  window.addEventListener("afterprint", () => opened.forEach((each) => { each.open = false; }));
})();
