// The switch between light and dark, the heat map's figures and values, and buttons that copy. The page reads without it.
"use strict";
(() => {
  const root = document.documentElement;
  const find = (selector, within = document) => [...within.querySelectorAll(selector)];

  const theme = document.getElementById("theme");
  const remembered = { // a page opened as a file may not be allowed to keep anything
    get() { try { return localStorage.getItem("qlora-theme"); } catch { return null; } },
    set(value) { try { localStorage.setItem("qlora-theme", value); } catch { /* for this visit only */ } },
  };
  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
  const showTheme = () => {
    theme.setAttribute("aria-pressed", String(isDark()));
  };
  const known = remembered.get();
  if (known === "dark" || known === "light") root.dataset.theme = known;
  theme.hidden = false;
  theme.addEventListener("click", () => {
    root.dataset.theme = isDark() ? "light" : "dark";
    remembered.set(root.dataset.theme);
    showTheme();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", showTheme);
  showTheme();

  for (const button of find("button[data-copies]")) {
    if (!navigator.clipboard) continue;
    button.hidden = false;
    button.addEventListener("click", async () => {
      await navigator.clipboard.writeText(document.getElementById(button.dataset.copies).textContent);
      button.textContent = "Copied";
      setTimeout(() => { button.textContent = "Copy"; }, 1500);
    });
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = find("#answers details:not([open])");
    for (const each of opened) each.open = true;
  });
  addEventListener("afterprint", () => { for (const each of opened) each.open = false; });

  const map = document.querySelector(".heat");
  if (!map) return;
  const figures = JSON.parse(document.getElementById("heat-figures").textContent);
  const tip = document.getElementById("tip");
  const cells = find("td[data-steps]", map);
  let current = 0;

  const choose = (index) => {
    current = index;
    document.getElementById("heat-figure").textContent = figures[index].title;
    for (const each of find("[data-figure]")) each.hidden = Number(each.dataset.figure) !== index;
    for (const cell of cells) {
      cell.className = "h" + cell.dataset.steps[index];
      cell.firstElementChild.textContent = cell.dataset.values.split("|")[index];
    }
  };
  for (const radio of find('input[name="figure"]')) {
    if (radio.checked) choose(Number(radio.value)); // a reloaded page keeps what was chosen
    radio.addEventListener("change", () => choose(Number(radio.value)));
  }

  const show = (cell) => {
    const name = document.createElement("b");
    name.textContent = cell.dataset.name;
    const list = document.createElement("dl");
    cell.dataset.values.split("|").forEach((shown, index) => {
      const line = document.createElement("div");
      line.className = index === current ? "current" : "";
      line.append(Object.assign(document.createElement("dt"), { textContent: figures[index].title }));
      line.append(Object.assign(document.createElement("dd"), { textContent: shown }));
      list.append(line);
    });
    tip.replaceChildren(name, list);
    tip.hidden = false;
    cell.setAttribute("aria-describedby", "tip");
    const at = cell.getBoundingClientRect(), box = tip.getBoundingClientRect();
    const left = Math.max(8, Math.min(at.left + at.width / 2 - box.width / 2, root.clientWidth - box.width - 8));
    const below = at.bottom + box.height + 8 < innerHeight;
    tip.style.left = left + "px";
    tip.style.top = (below ? at.bottom + 6 : Math.max(8, at.top - box.height - 6)) + "px";
  };
  const hide = () => {
    tip.hidden = true;
    for (const cell of find('[aria-describedby="tip"]', map)) cell.removeAttribute("aria-describedby");
  };
  const cellOf = (event) => event.target.closest("td[data-steps]");
  map.addEventListener("mouseover", (event) => { hide(); const cell = cellOf(event); if (cell) show(cell); });
  map.addEventListener("mouseleave", hide);
  map.addEventListener("click", (event) => { const cell = cellOf(event); if (cell) cell.focus(); });
  map.addEventListener("focusin", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    for (const each of cells) each.tabIndex = each === cell ? 0 : -1;
    hide();
    show(cell);
  });
  map.addEventListener("focusout", hide);
  addEventListener("scroll", () => { // values stay beside a cell that has the focus, and go where the mouse left one
    if (tip.hidden) return;
    if (map.contains(document.activeElement)) show(document.activeElement);
    else hide();
  }, { passive: true });
  map.addEventListener("keydown", (event) => {
    const cell = cellOf(event);
    if (!cell) return;
    if (event.key === "Escape") return hide();
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    const rows = find("tbody tr", map), columns = rows[0].cells.length;
    let row = cell.parentElement.sectionRowIndex, column = cell.cellIndex, step = steps[event.key];
    if (event.key === "Home") [column, step] = [0, [0, 1]];
    if (event.key === "End") [column, step] = [columns, [0, -1]];
    if (!step) return;
    event.preventDefault();
    for (;;) { // past places where a layer has no such module
      [row, column] = [row + step[0], column + step[1]];
      const next = rows[row] && column > 0 && rows[row].cells[column];
      if (!next) return;
      if (next.dataset.steps) { next.focus(); return; }
    }
  });
})();
