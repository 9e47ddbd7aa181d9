"use strict";
// Draws what the server's stream of frames says. Texts go into the page as text, never as markup.
(() => {
  const at = (id) => document.getElementById(id);
  const number = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
  const make = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const slug = (label) => label.toLowerCase().replace(/[^a-z0-9]/g, "-");
  const times = (ratio) => `${ratio.toFixed(ratio < 10 ? 2 : 1)} ×`;
  const share = (part) => `${(100 * part).toFixed(part > 0 && part < 0.0995 ? 1 : 0)} %`;
  const seconds = (value) =>
    value === undefined ? "–" : Math.abs(value) < 1 ? `${Number((1e3 * value).toPrecision(3))} ms` : `${value.toPrecision(3)} s`;

  let start = null; // what the server said first
  let frame = null; // the latest
  let totals = []; // of the last two minutes, oldest first: {at, tokens, ranks, ms}
  let speeds = []; // {at, tokens}, output tokens so far
  let events = [];
  let placements = [];
  let layer = 0; // the place of the chosen one
  let cell = null; // {layer, expert} that is pointed at
  let isPaused = false;
  let lastAt = 0; // when the last frame came, on this machine's clock
  const KEPT_S = 125;

  // ---- The stream.

  let secret = sessionStorage.getItem("expertlane-key") || "";
  let abort = null;
  let isFollowing = false;

  async function follow() {
    if (isFollowing) return;
    isFollowing = true;
    let delay = 1;
    while (!document.hidden) {
      abort = new AbortController();
      try {
        const headers = secret ? { Authorization: `Bearer ${secret}` } : {};
        const answer = await fetch("live/feed", { headers, cache: "no-store", signal: abort.signal });
        if (answer.status === 401) {
          ask();
          break;
        }
        if (answer.ok) {
          delay = 1;
          await read(answer.body.getReader());
        } else {
          const said = await answer.json().catch(() => null);
          tell("lost", said?.error?.message || `the server answers with status ${answer.status}`);
        }
      } catch {
        // The connection is lost, or this tab is hidden.
      }
      if (document.hidden) break;
      if (frame?.state !== "ended") tell("lost", frame ? "" : "The server does not answer; trying again");
      await new Promise((resolve) => setTimeout(resolve, 1e3 * delay));
      delay = Math.min(15, 2 * delay);
    }
    isFollowing = false;
  }

  async function read(reader) {
    const decoder = new TextDecoder();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      rest += decoder.decode(value, { stream: true });
      const parts = rest.split("\n\n");
      rest = parts.pop();
      for (const each of parts) if (each.startsWith("data: ")) take(JSON.parse(each.slice(6)));
    }
  }

  function ask() {
    at("wrong").hidden = !secret;
    secret = "";
    sessionStorage.removeItem("expertlane-key");
    at("key").hidden = false;
    at("content").hidden = true;
    at("headline").textContent = "A key is needed";
    setState("waiting", "key needed");
    at("secret").focus();
  }

  at("key").addEventListener("submit", (event) => {
    event.preventDefault();
    secret = at("secret").value;
    at("secret").value = "";
    sessionStorage.setItem("expertlane-key", secret);
    at("key").hidden = true;
    follow();
  });

  document.addEventListener("visibilitychange", () => {
    if (document.hidden) abort?.abort();
    else follow();
  });

  function take(message) {
    if (message.kind === "start") {
      start = message;
      totals = message.history.map(decoded);
      speeds = message.speeds.map(([when, tokens]) => ({ at: when, tokens }));
      events = message.events;
      placements = message.placements || [];
      at("content").hidden = false;
      at("key").hidden = true;
      begin();
      return;
    }
    lastAt = Date.now();
    frame = message;
    if (message.totals && message.totals.at > (totals.at(-1)?.at || 0)) totals.push(decoded(message.totals));
    if (message.placements) placements = message.placements;
    speeds.push({ at: message.at, tokens: message.num_generation_tokens });
    while (totals.length > 2 && totals[0].at < totals.at(-1).at - KEPT_S) totals.shift();
    while (speeds.length > 2 && speeds[0].at < message.at - KEPT_S) speeds.shift();
    const last = events.length ? events.at(-1).number : 0;
    const more = message.events.filter((each) => each.number > last);
    if (more.length) events = [...events, ...more].slice(-200);
    if (!isPaused) draw(more.length > 0);
  }

  function decoded(given) {
    const whole = (text) => {
      const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
      return new Uint32Array(bytes.buffer); // little-endian, as every browser's machine is
    };
    return { at: given.at, tokens: whole(given.tokens), ranks: whole(given.rank_tokens), ms: given.ms };
  }

  const windowS = () => Number(at("window").value);

  /** The latest totals that are as old as the window, else the oldest; and the latest. */
  function ends() {
    const last = totals.at(-1);
    const until = last.at - windowS();
    return [totals.findLast((each) => each.at <= until) || totals[0], last];
  }

  // ---- What stays.

  function begin() {
    const facts = [start.model];
    if (start.layout) facts.push(`${start.layout} on ${count(start.ranks.length, "rank")}`);
    facts.push(`expertlane ${start.version}`);
    at("setting").textContent = facts.join(" · ");
    document.title = `${start.model} · expertlane live`;
    for (const id of ["lanes-card", "map-card", "placement-card"]) {
      at(id).hidden = !(id === "lanes-card" ? start.ranks : start.layers).length;
    }
    const choice = at("layer");
    choice.replaceChildren(
      ...start.layers.map((each, place) => {
        const option = make("option", each);
        option.value = place;
        return option;
      }),
    );
    layer = Math.min(layer, Math.max(0, start.layers.length - 1));
    choice.value = layer;
    drawEvents();
  }

  const count = (many, what) => `${number.format(many)} ${what}${many === 1 ? "" : "s"}`;

  function setState(state, text) {
    at("state").dataset.state = state;
    at("state").textContent = text || state;
  }

  function tell(state, text) {
    setState(state, state === "lost" ? "no data" : state);
    if (text) at("headline").textContent = text;
    else if (state === "lost") at("headline").textContent = "No data: the connection is lost, or the server has ended; trying again";
  }

  setInterval(() => {
    if (frame && !isPaused && !document.hidden && frame.state !== "ended" && Date.now() - lastAt > 5e3) tell("lost", "");
  }, 1e3);

  // ---- What changes.

  function draw(hasNews) {
    if (!frame) return;
    setState(isPaused ? "paused" : frame.state);
    const speed = rate();
    const change = frame.changes.find((each) => each.seconds === null);
    at("headline").textContent =
      frame.state === "ended"
        ? "The server has ended"
        : change
        ? `${sentence(told(change))}; ${count(frame.num_running + frame.num_waiting, "request")} wait`
        : `${number.format(speed)} output tokens/s; ${count(frame.num_running, "request")} running, ${number.format(frame.num_waiting)} waiting`;
    drawAlerts();
    drawTiles(speed);
    drawSpeed();
    if (start.ranks.length && totals.length) drawLanes();
    if (start.layers.length && totals.length) drawExperts();
    if (hasNews) drawEvents();
  }

  function rate() {
    const last = speeds.at(-1);
    const until = last.at - Math.min(windowS(), 5);
    const first = speeds.findLast((each) => each.at <= until) || speeds[0];
    return last.at > first.at ? (last.tokens - first.tokens) / (last.at - first.at) : 0;
  }

  let alertsShown = "";
  function drawAlerts() {
    const said = JSON.stringify(frame.alerts.map((each) => [each.level, each.text.replace(/[\d.]+ s\b/g, "")]));
    if (said === alertsShown) return;
    alertsShown = said;
    at("alerts").replaceChildren(
      ...frame.alerts.map((each) => {
        const made = make("div", undefined, "alert");
        made.dataset.level = each.level;
        const first = make("p");
        first.append(make("b", each.level === "red" ? "Problem: " : "Warning: "), each.text);
        made.append(first, make("p", `What to do: ${each.advice}`));
        return made;
      }),
    );
  }

  function drawTiles(speed) {
    const { ttft, tpot, cache } = frame;
    const fullest = cache.length ? Math.max(...cache) : 0;
    const queried = frame.num_queried;
    const whole = cache.reduce((a, b) => a + b, 0) / Math.max(1, cache.length);
    const tails = (found) =>
      found.num ? `p90 ${seconds(found.p90)}, p99 ${seconds(found.p99)} (${count(found.num, "request")})` : "no request in the last minute";
    const perRank = cache.length > 1 && cache.length <= 16 ? `: ${cache.map((each) => share(each)).join(", ")}` : "";
    const idle = frame.dummy_steps.reduce((a, b) => a + b, 0);
    const tiles = [
      ["Throughput", `${number.format(speed)} tokens/s`, `${number.format(frame.num_generation_tokens)} output tokens since the start`],
      ["Requests running", number.format(frame.num_running), `of at most ${number.format(start.max_num_seqs * Math.max(1, cache.length))}; ${count(frame.num_open, "answer")} open`],
      ["Requests waiting", number.format(frame.num_waiting), `refused from ${number.format(start.max_num_queued)} on`],
      ["TTFT, median", seconds(ttft.p50), tails(ttft)],
      ["TPOT, median", seconds(tpot.p50), tails(tpot)],
      ["KV cache in use", share(whole), cache.length > 1 ? `fullest rank ${share(fullest)}${perRank}` : `of ${count(start.num_blocks, "block")} of ${start.block_size} tokens`],
      ["Prefix cache hits", queried ? share(frame.num_cached / queried) : "–", `${number.format(frame.num_cached)} of ${count(queried, "token")}`],
      ["Preemptions", number.format(frame.num_preemptions), "requests that lost their cache blocks"],
    ];
    if (frame.num_recoveries) tiles.push(["Recoveries", number.format(frame.num_recoveries), `lost ranks were replaced; ${count(frame.num_recovered, "request")} computed again`]);
    if (cache.length > 1) tiles.push(["Dummy steps", number.format(idle), "steps in which a data-parallel rank had no request of its own"]);
    fill(
      at("tiles"),
      tiles.map(([name, value, more]) => {
        const made = make("div");
        made.append(make("dt", name), make("dd", value), make("dd", more, "more"));
        return made;
      }),
    );
  }

  const fill = (parent, children) => parent.replaceChildren(...children);

  /** A canvas' context at the screen's resolution, cleared; in CSS pixels. */
  function canvas(id, height) {
    const made = typeof id === "string" ? at(id) : id;
    const width = made.clientWidth;
    const scale = window.devicePixelRatio || 1;
    if (made.width !== Math.round(width * scale) || made.height !== Math.round(height * scale)) {
      made.width = Math.round(width * scale);
      made.height = Math.round(height * scale);
      made.style.height = `${height}px`;
    }
    const context = made.getContext("2d");
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, width, height);
    context.font = "11px system-ui, sans-serif";
    return [context, width];
  }

  function ratesSoFar() {
    const rates = [];
    let before = speeds[0];
    for (const each of speeds) {
      const passed = each.at - before.at;
      if (passed < 0.5) continue; // too short to tell
      rates.push({ at: each.at, rate: (each.tokens - before.tokens) / passed });
      before = each;
    }
    return rates;
  }

  // Of recoveries and changes of the layout: while they last, and once they are over.
  const CHANGES = {
    recovery: ["recovering", "recovered in"],
    growth: ["growing back", "grew back in"],
    scaling: ["changing the layout", "layout changed in"],
  };
  const sentence = (text) => text.charAt(0).toUpperCase() + text.slice(1);
  const shortly = (change) => {
    const [during, after] = CHANGES[change.kind];
    return change.seconds === null ? during : `${after} ${seconds(change.seconds)}`;
  };
  const lost = (change) =>
    change.ranks.length ? `${change.ranks.length > 1 ? "ranks" : "rank"} ${change.ranks.join(", ")} lost` : "";
  /** While it lasts: for how long already, and which ranks are lost. */
  function told(change) {
    const passed = Math.max(0, frame.at - change.began);
    const why = lost(change);
    return `${shortly(change)} for ${passed.toFixed(0)} s${why ? `: ${why}` : ""}`;
  }

  /** What the latest change did to the rate, in a sentence; empty without one. */
  function dip(rates) {
    const change = frame.changes.at(-1);
    if (!change || change.began < rates[0].at) return "";
    const when = new Date(1e3 * change.began).toLocaleTimeString("en-GB");
    const until = change.seconds === null ? frame.at : change.began + change.seconds;
    const before = rates.filter((each) => each.at <= change.began).slice(-5);
    const during = rates.filter((each) => each.at > change.began && each.at <= until + 1);
    const usual = before.reduce((all, each) => all + each.rate, 0) / Math.max(1, before.length);
    const least = Math.min(...during.map((each) => each.rate));
    const fell = before.length && least < usual ? `; the rate fell from ${number.format(usual)} to ${number.format(least)} tokens/s` : "";
    const why = lost(change);
    return `${when}: ${why ? `${why}, ` : ""}${shortly(change)}${fell}.`;
  }

  /** A band from where a change begins to its end, or to now, with its words on top. */
  function markChanges(context, x, from, to, bottom) {
    let free = from;
    for (const each of frame.changes) {
      const until = each.seconds === null ? frame.at : each.began + each.seconds;
      const left = Math.max(from, x(each.began));
      const right = Math.min(to, Math.max(x(until), left + 2));
      if (right <= from) continue;
      context.fillStyle = colour("--above");
      context.globalAlpha = 0.25;
      context.fillRect(left, 14, right - left, bottom - 14);
      context.globalAlpha = 1;
      context.fillRect(left, 14, 2, bottom - 14);
      const why = lost(each);
      const words = `${why ? `${why}, ` : ""}${shortly(each)}`;
      const wide = context.measureText(words).width;
      const start = Math.min(left, to - wide);
      if (start < free) continue; // the words of the one before are there
      context.fillStyle = colour("--ink");
      context.textAlign = "left";
      context.fillText(words, start, 10);
      free = start + wide + 8;
    }
  }

  function drawSpeed() {
    const height = 110;
    const [context, width] = canvas("speed", height);
    const rates = ratesSoFar();
    if (!rates.length) return;
    const said = dip(rates);
    at("dip").hidden = !said;
    if (said !== at("dip").textContent) at("dip").textContent = said;
    const until = rates.at(-1).at;
    const span = Math.max(windowS(), 30);
    const most = Math.max(1, ...rates.map((each) => each.rate));
    const x = (when) => 44 + (width - 50) * (1 - (until - when) / span);
    const y = (value) => 92 - 74 * (value / most);
    markChanges(context, x, 44, width - 6, 92);
    context.fillStyle = colour("--muted");
    context.strokeStyle = colour("--line");
    context.textAlign = "right";
    for (const value of [0, most]) {
      context.fillText(number.format(value), 38, y(value) + 4);
      context.beginPath();
      context.moveTo(44, y(value));
      context.lineTo(width - 6, y(value));
      context.stroke();
    }
    context.textAlign = "left";
    context.fillText(`${span} s ago`, 44, 107);
    context.textAlign = "center";
    context.fillText("output tokens/s", width / 2, 107);
    context.textAlign = "right";
    context.fillText("now", width - 6, 107);
    context.strokeStyle = colour("--accent");
    context.lineWidth = 2;
    context.beginPath();
    for (const each of rates.filter((one) => one.at >= until - span)) context.lineTo(x(each.at), y(each.rate));
    context.stroke();
    context.lineWidth = 1;
    at("speed").setAttribute("aria-label", `Output tokens per second over the last ${span} s: now ${number.format(rates.at(-1).rate)}, at most ${number.format(most)}`);
  }

  function drawLanes() {
    const [first, last] = ends();
    const spent = last.ms.map((ms, rank) => ms.map((value, i) => value - first.ms[rank][i]));
    const wholes = spent.map((of) => Math.max(1, of.reduce((a, b) => a + b, 0)));
    const used = start.stages.map((_, i) => spent.some((of) => of[i] > 0));
    const order = start.stages.map((_, i) => i).filter((i) => used[i]);
    // What is no work comes last.
    const rankOf = (i) => ({ waiting: 1, idle: 2 })[start.stages[i]] || 0;
    order.sort((a, b) => rankOf(a) - rankOf(b) || a - b);
    fill(
      at("legend"),
      order.map((i) => {
        const made = make("li");
        const swatch = make("span", undefined, "swatch");
        swatch.style.background = `var(--stage-${slug(start.stages[i])})`;
        made.append(swatch, start.stages[i]);
        return made;
      }),
    );
    const cells = [];
    spent.forEach((of, rank) => {
      const bar = make("div", undefined, "bar");
      for (const i of order) {
        const part = make("span");
        part.style.width = `${(100 * of[i]) / wholes[rank]}%`;
        part.style.background = `var(--stage-${slug(start.stages[i])})`;
        bar.append(part);
      }
      const now = frame.now[rank];
      const isIdle = now.stage === "idle";
      const isAlone = isIdle || now.stage === "preparing";  // in no step
      const stage = isAlone ? now.stage : `${now.waiting ? "waits in" : "in"} ${now.stage}`;
      const where = isIdle || now.layer === null ? stage : `${stage}, layer ${now.layer}`;
      const silent = !isIdle && now.silent_s > 2 ? ` for ${now.silent_s.toFixed(0)} s` : "";
      cells.push(make("span", `rank ${rank}`), bar, make("span", `${where}${silent}`, "now"));
    });
    fill(at("lanes"), cells);
    const waiting = start.stages.indexOf("waiting");
    const idle = start.stages.indexOf("idle");
    const sum = (i) => spent.reduce((a, of) => a + of[i], 0);
    const all = wholes.reduce((a, b) => a + b, 0);
    const busy = all - sum(idle);
    const hidden = frame.overlapped_s + frame.exposed_s;
    at("lanes-said").textContent =
      `Of ${(last.at - first.at).toFixed(0)} s, ranks were idle ${share(sum(idle) / all)}` +
      (busy > 0 && start.ranks.length > 1 ? `; of the rest they waited for each other ${share(sum(waiting) / Math.max(1, busy))}` : "") +
      (hidden > 0 ? `. Since the start, ${share(frame.overlapped_s / hidden)} of the time of transfers was hidden behind computing` : "") +
      `.`;
    const head = make("tr");
    head.append(...["Rank", ...order.map((i) => start.stages[i])].map((each) => make("th", each)));
    fill(at("lanes-table"), [
      head,
      ...spent.map((of, rank) => {
        const row = make("tr");
        row.append(make("td", `${rank}`), ...order.map((i) => make("td", share(of[i] / wholes[rank]), "n")));
        return row;
      }),
    ]);
  }

  // ---- Experts.

  /** 0 … 1 of the scale: none, half, even, twice, four times and more. */
  const place = (ratio) => (ratio <= 1 ? ratio / 2 : Math.min(1, 0.5 + Math.log2(ratio) / 4));

  let palette = [];
  function mix() {
    const read = (name) => {
      const text = colour(name);
      return [1, 3, 5].map((i) => parseInt(text.slice(i, i + 2), 16));
    };
    const [low, middle, high] = [read("--below"), read("--page"), read("--above")];
    palette = Array.from({ length: 65 }, (_, i) => {
      const [from, to, part] = i < 32 ? [low, middle, i / 32] : [middle, high, (i - 32) / 32];
      return `rgb(${from.map((value, j) => Math.round(value + (to[j] - value) * part)).join(" ")})`;
    });
    drawScale();
  }
  const tint = (ratio) => palette[Math.round(64 * place(ratio))];

  function drawScale() {
    const bar = make("canvas");
    bar.setAttribute("aria-hidden", "true"); // its parent says what it is
    fill(at("scale"), [bar, ...["0", "½", "1 ×", "2 ×", "≥ 4 ×"].map((each) => make("span", each))]);
    const [context, width] = canvas(bar, 12);
    for (let i = 0; i <= 64; i += 1) {
      context.fillStyle = palette[i];
      context.fillRect((i * width) / 65, 0, width / 65 + 1, 12);
    }
  }

  /** Of each layer, pairs of its experts between two totals. */
  function between(first, last) {
    const size = start.num_experts;
    return start.layers.map((_, i) => {
      const own = last.tokens.subarray(i * size, (i + 1) * size);
      return Array.from(own, (value, j) => (value - first.tokens[i * size + j]) >>> 0);
    });
  }
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  const NO_CELL = "No cell chosen.";
  let mapped = null; // {pairs, sums}
  const LEFT = 30;
  const RIGHT = 46;
  const rowHeight = () => Math.max(6, Math.min(22, Math.floor(420 / start.layers.length)));

  function drawExperts() {
    const [first, last] = ends();
    const pairs = between(first, last);
    mapped = { pairs, sums: pairs.map(sum), seconds: last.at - first.at };
    drawMap();
    drawHistory();
    drawHot();
    drawPlacement(first, last);
    const ratios = pairs.flatMap((of, i) => of.map((value, expert) => [mapped.sums[i] ? (value * of.length) / mapped.sums[i] : 0, i, expert]));
    const top = ratios.reduce((a, b) => (b[0] > a[0] ? b : a), [0, 0, 0]);
    const said = top[0]
      ? `In ${mapped.seconds.toFixed(0)} s: hottest is expert ${top[2]} of layer ${start.layers[top[1]]}, with ${times(top[0])} the layer's mean per expert.`
      : "No tokens in the time window.";
    at("map-said").textContent = said;
    at("map").setAttribute("aria-label", `Heat map of ${count(start.layers.length, "layer")} by ${start.num_experts} experts. ${said}`);
    if (cell) readOut();
  }

  function drawMap() {
    const rows = start.layers.length;
    const high = rowHeight();
    const [context, width] = canvas("map", rows * high + 18);
    const wide = (width - LEFT - RIGHT) / start.num_experts;
    const gap = wide > 5 && high > 7 ? 1 : 0;
    const every = Math.ceil(12 / high);
    context.textBaseline = "middle";
    mapped.pairs.forEach((of, i) => {
      of.forEach((value, expert) => {
        const ratio = mapped.sums[i] ? (value * of.length) / mapped.sums[i] : 0;
        context.fillStyle = mapped.sums[i] ? tint(ratio) : colour("--line");
        context.fillRect(LEFT + expert * wide, i * high, wide - gap + (gap ? 0 : 0.5), high - gap);
      });
      context.fillStyle = colour(i === layer ? "--ink" : "--muted");
      if (i % every === 0 || i === layer) {
        context.textAlign = "right";
        context.fillText(start.layers[i], LEFT - 5, i * high + high / 2);
      }
      const uneven = frame.imbalance[start.layers[i]];
      if (uneven && high >= 11) {
        context.textAlign = "left";
        context.fillText(times(uneven), width - RIGHT + 5, i * high + high / 2);
      }
    });
    context.strokeStyle = colour("--ink");
    context.strokeRect(LEFT - 0.5, layer * high - 0.5, width - LEFT - RIGHT + 1, high);
    if (cell) {
      context.lineWidth = 2;
      context.strokeRect(LEFT + cell.expert * wide, cell.layer * high, wide, high);
      context.lineWidth = 1;
    }
    context.fillStyle = colour("--muted");
    context.textAlign = "left";
    context.fillText("expert 0", LEFT, rows * high + 10);
    context.textAlign = "right";
    context.fillText(`${start.num_experts - 1}`, width - RIGHT, rows * high + 10);
    context.fillText("layer", LEFT - 3, rows * high + 10);
    context.textAlign = "left";
    context.fillText("imbal.", width - RIGHT + 5, rows * high + 10);
  }

  function drawHistory() {
    const size = start.num_experts;
    const high = Math.max(3, Math.min(16, Math.floor(320 / size)));
    const [context, width] = canvas("history", size * high + 18);
    const until = totals.at(-1).at;
    const x = (when) => LEFT + Math.max(0, (width - LEFT - RIGHT) * (1 - (until - when) / 120));
    context.fillStyle = colour("--line");
    context.fillRect(LEFT, 0, width - LEFT - RIGHT, size * high);
    for (let i = 1; i < totals.length; i += 1) {
      const [before, after] = [totals[i - 1], totals[i]];
      const of = Array.from({ length: size }, (_, j) => (after.tokens[layer * size + j] - before.tokens[layer * size + j]) >>> 0);
      const all = sum(of);
      if (!all) continue;
      const [from, to] = [x(before.at), x(after.at)];
      of.forEach((value, expert) => {
        context.fillStyle = tint((value * size) / all);
        context.fillRect(from, expert * high, to - from + 0.5, high);
      });
    }
    context.fillStyle = colour("--muted");
    context.textBaseline = "middle";
    context.textAlign = "right";
    const every = Math.ceil(14 / high);
    for (let expert = 0; expert < size; expert += every) context.fillText(expert, LEFT - 5, expert * high + high / 2);
    context.fillText("now", width - RIGHT, size * high + 10);
    context.textAlign = "left";
    context.fillText("2 minutes ago", LEFT, size * high + 10);
    at("history").setAttribute("aria-label", `Heat map of layer ${start.layers[layer]}: a row an expert, from left to right the last two minutes`);
  }

  function holders(i, expert) {
    return placements.flatMap((of, replica) =>
      of[i].flatMap((held, ep) => (held.includes(expert) ? ranksOf(replica, i, ep) : [])),
    );
  }
  const ranksOf = (replica, i, ep) =>
    start.ranks.flatMap((each, rank) => (each.replica === replica && each.ep === ep && each.pp === start.stage_of_layer[i] ? [rank] : []));

  function readOut() {
    const { layer: i, expert } = cell;
    const value = mapped.pairs[i][expert];
    const ratio = mapped.sums[i] ? (value * start.num_experts) / mapped.sums[i] : 0;
    const on = holders(i, expert);
    at("readout").textContent =
      `Layer ${start.layers[i]}, expert ${expert}: ${count(value, "token")} in ${mapped.seconds.toFixed(0)} s, ${times(ratio)} the layer's mean per expert; ` +
      `on ${on.length === 1 ? "rank" : "ranks"} ${on.join(", ")}.`;
  }

  function drawHot() {
    const rows = mapped.pairs
      .flatMap((of, i) => of.map((value, expert) => ({ i, expert, value, ratio: mapped.sums[i] ? (value * of.length) / mapped.sums[i] : 0 })))
      .sort((a, b) => b.ratio - a.ratio)
      .slice(0, 12);
    const head = make("tr");
    head.append(...["Layer", "Expert", "Tokens", "Over the mean", "On ranks"].map((each) => make("th", each)));
    fill(at("hot-table"), [
      head,
      ...rows.map((each) => {
        const row = make("tr");
        row.append(
          make("td", `${start.layers[each.i]}`),
          make("td", `${each.expert}`, "n"),
          make("td", number.format(each.value), "n"),
          make("td", times(each.ratio), "n"),
          make("td", holders(each.i, each.expert).join(", ")),
        );
        return row;
      }),
    ]);
  }

  function drawPlacement(first, last) {
    const width = start.ranks.length;
    const loads = start.ranks.map((_, rank) => (last.ranks[layer * width + rank] - first.ranks[layer * width + rank]) >>> 0);
    const copies = new Map();
    const rows = [];
    let isMany = false;
    placements.forEach((of, replica) => {
      copies.clear();
      for (const held of of[layer]) for (const each of held) copies.set(each, (copies.get(each) || 0) + 1);
      const own = of[layer].map((_, ep) => ranksOf(replica, layer, ep));
      isMany ||= own.some((ranks) => ranks.length > 1);
      const load = own.map((ranks) => sum(ranks.map((rank) => loads[rank])));
      const mean = sum(load) / Math.max(1, load.length);
      of[layer].forEach((held, ep) => {
        const row = make("tr");
        const ratio = mean ? load[ep] / mean : 0;
        const shown = make("div", undefined, "load");
        const bar = make("i");
        bar.style.width = `${Math.min(100, 30 * ratio)}px`;
        shown.append(bar, mean ? times(ratio) : "–");
        const cellOf = make("td");
        cellOf.append(shown);
        const experts = make("td");
        [...held].sort((a, b) => a - b).forEach((each, i) => {
          if (i) experts.append(" ");
          experts.append(copies.get(each) > 1 ? make("b", `${each}×${copies.get(each)}`) : `${each}`);
        });
        row.append(make("td", own[ep].join(", ")), cellOf, experts);
        rows.push(row);
      });
    });
    const head = make("tr");
    head.append(...[isMany ? "Ranks" : "Rank", "Load", "Experts"].map((each) => make("th", each)));
    fill(at("placement"), [head, ...rows]);
    const many = [...copies.values()].filter((each) => each > 1).length;
    at("placement-said").textContent =
      `Layer ${start.layers[layer]}: ${many ? `${count(many, "expert")} with copies` : "no copies"}; ` +
      (start.is_rebalanced ? rebalances() : "experts stay where they are (no --rebalance-steps).");
  }

  function rebalances() {
    const { num_decisions, num_moved, saved_s, latest } = frame.rebalances;
    if (!num_decisions) return "experts move where the gain exceeds the cost; no decision so far.";
    const saved = `${saved_s < 0 ? "cost more than they saved so far, by" : "saved"} ${seconds(Math.abs(saved_s))} of the fullest ranks' time`;
    const paid = num_moved ? `, which have ${saved}; moving delayed steps by ${seconds(frame.rebalances.paid_s)}` : "";
    return `experts moved after ${num_moved} of ${count(num_decisions, "decision")}${paid}. Latest, ${latest}.`;
  }

  function choose(i) {
    layer = i;
    at("layer").value = i;
    if (totals.length && frame) drawExperts();
  }
  at("layer").addEventListener("change", () => choose(Number(at("layer").value)));

  const map = at("map");
  function cellAt(event) {
    const box = map.getBoundingClientRect();
    const wide = (box.width - LEFT - RIGHT) / start.num_experts;
    const expert = Math.floor((event.clientX - box.left - LEFT) / wide);
    const i = Math.floor((event.clientY - box.top) / rowHeight());
    const isIn = expert >= 0 && expert < start.num_experts && i >= 0 && i < start.layers.length;
    return isIn ? { layer: i, expert } : null;
  }
  function point(to) {
    cell = to;
    if (!mapped || !frame) return;
    if (cell) readOut();
    else at("readout").textContent = NO_CELL;
    drawMap();
  }
  map.addEventListener("pointermove", (event) => point(cellAt(event)));
  map.addEventListener("pointerleave", () => point(null));
  map.addEventListener("click", (event) => {
    const to = cellAt(event);
    if (to) choose(to.layer);
  });
  map.addEventListener("keydown", (event) => {
    const steps = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    const step = steps[event.key];
    if (event.key === "Enter" && cell) choose(cell.layer);
    if (event.key === "Escape") point(null);
    if (!step) return;
    event.preventDefault();
    const from = cell || { layer, expert: -Math.abs(step[1]) };
    const clamp = (value, most) => Math.max(0, Math.min(most - 1, value));
    point({ layer: clamp(from.layer + step[0], start.layers.length), expert: clamp(from.expert + step[1], start.num_experts) });
  });

  const words = { rebalance: "Rebalance", recovery: "Recovery", growth: "Growth", scaling: "Layout", preemption: "Preemption", error: "Error", drain: "Drain", end: "End" };
  function drawEvents() {
    const rows = [...events].reverse().map((each) => {
      const made = make("li");
      const when = new Date(1e3 * each.at);
      const time = make("time", when.toLocaleTimeString("en-GB"));
      time.dateTime = when.toISOString();
      made.append(time, make("b", words[each.kind] || each.kind), make("span", each.text));
      return made;
    });
    fill(at("events"), rows.length ? rows : [make("li", "Nothing so far.")]);
  }

  at("pause").addEventListener("click", () => {
    isPaused = !isPaused;
    at("pause").setAttribute("aria-pressed", isPaused);
    at("pause").textContent = isPaused ? "Resume" : "Pause";
    draw(true);
  });
  const redraw = () => {
    mix();
    draw(true);
  };
  at("window").addEventListener("change", () => draw(false));
  window.addEventListener("resize", redraw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  mix();
  follow();
})();
