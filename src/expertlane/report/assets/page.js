"use strict";
// The page is whole and open without this: it folds what matters less, adds what a segment of a
// timeline is, and opens all on paper.
(() => {
  for (const each of document.querySelectorAll("details[data-folded]")) each.open = false;

  // A link into a chapter that is folded opens it.
  function reveal() {
    const target = document.getElementById(location.hash.slice(1));
    for (let each = target; each; each = each.parentElement) if (each.tagName === "DETAILS") each.open = true;
    target?.scrollIntoView();
  }
  window.addEventListener("hashchange", reveal);
  if (location.hash) reveal();
  for (const link of document.querySelectorAll("nav a, .contents a")) {
    link.addEventListener("click", () => { if (link.hash === location.hash) reveal(); });
  }

  // Commands are copied with a click; where a browser does not let that be, they are selected.
  for (const command of document.querySelectorAll("pre.command")) {
    const text = command.textContent;
    const button = document.createElement("button");
    button.className = "copy";
    button.type = "button";
    button.textContent = "Copy";
    command.append(button);
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text);
        button.textContent = "Copied";
      } catch {
        getSelection().setBaseAndExtent(command.firstChild, 0, command.firstChild, text.length);
        button.textContent = "Ctrl+C";
      }
      setTimeout(() => { button.textContent = "Copy"; }, 2e3);
    });
  }

  // Timelines of a group show the same period.
  for (const group of document.querySelectorAll(".timelines")) {
    const scrolled = [...group.querySelectorAll(".time")];
    for (const one of scrolled) {
      one.addEventListener("scroll", () => {
        for (const each of scrolled) if (each !== one) each.scrollLeft = one.scrollLeft;
      }, { passive: true });
    }
  }

  // Pointing at a timeline tells what is there; a path's lines are `M x y h length`.
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.hidden = true;
  document.body.append(tip);
  const ms = (value) => `${value.toPrecision(4)} ms`;

  function at(path, x, y, height) {
    for (const [, left, middle, length] of path.getAttribute("d").matchAll(/M(\d+) (\d+)h(\d+)/g)) {
      const from = Number(left);
      const isIn = from <= x && x <= from + Number(length);
      if (isIn && Math.abs(Number(middle) - y) <= height / 2) return [from, Number(length)];
    }
    return null;
  }

  function tell(event, svg) {
    const path = event.target.closest("path");
    const box = svg.getBoundingClientRect();
    const units = svg.viewBox.baseVal;
    const x = ((event.clientX - box.left) / box.width) * units.width;
    const y = ((event.clientY - box.top) / box.height) * units.height;
    const found = path && at(path, x, y, Number(svg.getAttribute("stroke-width")));
    tip.hidden = !found;
    if (!found) return;
    const rows = svg.dataset.rows.split(" ");
    const scale = Number(svg.dataset.untilMs) / units.width;
    const row = rows[Math.min(rows.length - 1, Math.floor((y / units.height) * rows.length))];
    tip.textContent = `${path.dataset.what}, rank ${row}: from ${ms(found[0] * scale)}, ${ms(found[1] * scale)}`;
    tip.style.left = `${Math.min(event.clientX + 12, window.innerWidth - tip.offsetWidth - 8)}px`;
    tip.style.top = `${event.clientY + 14}px`;
  }

  for (const svg of document.querySelectorAll(".time svg")) {
    for (const title of svg.querySelectorAll("title")) {
      title.parentElement.dataset.what = title.textContent;
      title.remove();
    }
    svg.addEventListener("pointermove", (event) => tell(event, svg));
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
  }

  // On paper all parts are open.
  let opened = [];
  window.addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.part:not([open])")];
    opened.forEach((each) => { each.open = true; });
  });
  window.addEventListener("afterprint", () => opened.forEach((each) => { each.open = false; }));
})();
