"use strict";
/* Tables that are sorted by their headings and filtered by a form, tables by choice, and buttons that copy; see also examples.js. */
(() => {
  const value = (cell) => cell.dataset.order ?? cell.textContent.trim();
  const number = (text) => (text === "" ? NaN : Number(text));

  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    if (Number.isNaN(x) && Number.isNaN(y)) return a.localeCompare(b);
    return Number.isNaN(x) ? 1 : Number.isNaN(y) ? -1 : x - y;
  };

  const sort = (table, column, direction) => {
    const body = table.tBodies[0];
    const rows = [...body.rows].map((row, at) => ({ row, at, key: value(row.cells[column]) }));
    const known = rows.filter(({ key }) => key !== "");
    const unknown = rows.filter(({ key }) => key === "");
    known.sort((a, b) => direction * compare(a.key, b.key) || a.at - b.at);
    body.append(...[...known, ...unknown].map(({ row }) => row));
    for (const heading of table.tHead.rows[0].cells) heading.removeAttribute("aria-sort");
    table.tHead.rows[0].cells[column].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
  };

  for (const table of document.querySelectorAll("table.sorts")) {
    [...table.tHead.rows[0].cells].forEach((heading, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => sort(table, column, heading.getAttribute("aria-sort") === "ascending" ? -1 : 1));
    });
  }

  const form = document.querySelector("form.filters[data-table]");
  if (form) {
    const rows = [...document.getElementById(form.dataset.table).tBodies[0].rows];
    const say = form.querySelector("output");
    const filter = () => {
      const words = form.querySelector("[data-search]").value.toLowerCase();
      const wanted = [...form.querySelectorAll("select")].filter((select) => select.value);
      for (const row of rows) {
        const fits = wanted.every(({ dataset, value }) => (row.cells[dataset.column].dataset.search ?? row.cells[dataset.column].textContent.trim()) === value);
        row.hidden = !fits || !row.textContent.toLowerCase().includes(words);
      }
      const shown = rows.filter((row) => !row.hidden).length;
      say.textContent = shown < rows.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
    };
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", filter);
    filter();
  }

  /* Of several tables one is shown: that of the address, or the last. */
  for (const choices of document.querySelectorAll("[data-switch]")) {
    const buttons = [...choices.querySelectorAll("button")];
    const named = (name) => buttons.find(({ dataset }) => dataset.shows === name);
    const show = (chosen) => {
      for (const button of buttons) {
        button.setAttribute("aria-pressed", button === chosen);
        document.getElementById(button.dataset.shows).hidden = button !== chosen;
      }
    };
    const follow = () => {
      const chosen = named(location.hash.slice(1));
      if (chosen) {
        show(chosen);
        document.getElementById(chosen.dataset.shows).scrollIntoView();
      }
    };
    choices.hidden = false;
    show(buttons.at(-1));
    follow();
    addEventListener("hashchange", follow);
    for (const button of buttons) button.addEventListener("click", () => show(button));
  }

  /* Where the clipboard may not be used, the text is shown, and selected. */
  for (const form of document.querySelectorAll("form[data-copies]")) {
    form.hidden = false;
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("click", async ({ target }) => {
      const kind = target.dataset.copy;
      if (!kind) return;
      const area = [...form.querySelectorAll("textarea")].find(({ dataset }) => dataset.text === kind);
      let done = true;
      try {
        await navigator.clipboard.writeText(area.value);
      } catch {
        area.hidden = false;
        area.select();
        done = document.execCommand("copy");
        area.hidden = done;
      }
      form.querySelector("output").value = done ? `${target.textContent.slice(5)} copied` : "select the text and copy it";
    });
  }
})();
