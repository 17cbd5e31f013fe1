"use strict";
/* Every example of the run, paged and filtered. Files beside the page call firstorder.push with a group's rows. */
(() => {
  const root = document.getElementById("examples");
  const index = firstorder.index;
  const form = root.querySelector("form");
  const list = root.querySelector("ol");
  const say = root.querySelector("output");
  const place = root.querySelector(".place");
  const [first, previous, next, last] = root.querySelectorAll(".pages button");
  const PER_PAGE = 24;
  const loaded = new Map();
  const asked = new Set();
  let shown = [];
  let page = 0;

  const OUTCOMES = { broken: "broken", robust: "robust", wrong: "misclassified as it is", doubtful: "doubtful" };
  const field = (name) => form.elements.namedItem(name);
  const named = (label) => (label < 0 ? "NaN" : index.classes[label] ?? `class ${label}`);
  const percent = (share) => (share == null ? "" : ` · ${(100 * share).toFixed(1)}\u00a0%`);
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    if (text !== undefined) element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  const outcome = (rows, i, eps) => {
    if (rows.before[i] !== rows.label[i]) return "wrong";
    const [relative, absolute] = index.slack;
    if (rows.success[i] && rows.size[i] <= eps * (1 + relative) + absolute) return "broken";
    return rows.doubtful[i] ? "doubtful" : "robust";
  };

  /* The class that shows a sheet: its address, which may be long, is once in the page. */
  const sheets = new Map();
  const style = document.head.appendChild(document.createElement("style")).sheet;
  const sheet = (name) => {
    if (!sheets.has(name)) {
      sheets.set(name, `sheet-${sheets.size}`);
      style.insertRule(`.${sheets.get(name)} { background-image: url("${index.sheets[name]}"); }`);
    }
    return sheets.get(name);
  };

  /* A part of a sheet as an element that scales with its place. */
  const picture = (name, column, line, columns, lines, words) => {
    const box = make("span", undefined, "image");
    box.setAttribute("role", "img");
    box.setAttribute("aria-label", words);
    const at = (k, n) => (n > 1 ? (100 * k) / (n - 1) : 0);
    box.style.aspectRatio = `${index.shape[2]} / ${index.shape[1]}`;
    box.classList.add(sheet(name));
    box.style.backgroundSize = `${100 * columns}% ${100 * lines}%`;
    box.style.backgroundPosition = `${at(column, columns)}% ${at(line, lines)}%`;
    return box;
  };

  const clean = (example) => {
    const { count, side, names } = index.clean ?? { count: 0 };
    if (example >= count) return null;
    const [sheet, at] = [Math.floor(example / side ** 2), example % side ** 2];
    const lines = Math.ceil(Math.min(side ** 2, count - sheet * side ** 2) / side);
    return picture(names[sheet], at % side, Math.floor(at / side), side, lines, `example ${example} as it is`);
  };

  /* What an attack made, or the perturbation beside it: of a group's pairs, the one with that number. */
  const made = (group, number, beside, words) => {
    const { count, across, each, names } = loaded.get(group.id).sheets;
    const [sheet, at] = [Math.floor(number / each), number % each];
    const lines = Math.ceil(Math.min(each, count - sheet * each) / across);
    return picture(names[sheet], 2 * (at % across) + beside, Math.floor(at / across), 2 * across, lines, words);
  };

  const figure = (image, missing, title, detail, right) => {
    const box = make("div", undefined, "picture");
    box.append(image ?? make("span", missing, "image none"));
    box.append(make("b", title, right === undefined ? "" : right ? "right" : "false"), make("span", detail, "muted"));
    return box;
  };

  const passes = (rows, i, group) => {
    const count = (value, word) => `${value} ${word}${value === 1 ? "" : "s"}`;
    const both = `${count(rows.gradients[i], "gradient")} (${count(rows.forwards[i], "forward pass").replace("passs", "passes")})`;
    return index.stops[group.attack] ? `after ${both}` : `in ${both}; it goes on after a success`;
  };

  const sentence = ({ group, rows, i, kind }) => {
    const stage = rows.stage[i] ? `, stage ${rows.stage[i]}` : "";
    if (kind === "wrong") return "Misclassified as it is: counts as broken, and is not attacked.";
    if (kind === "broken") return `Broken by ${group.attack}${stage}, ${passes(rows, i, group)}.`;
    const tail = kind === "doubtful" ? " NaN or infinite logits or gradients were met: neither broken nor robust for sure." : "";
    return `Withstands ${group.attack}, ${passes(rows, i, group)}.${tail}`;
  };

  const card = (entry) => {
    const { group, rows, i, kind } = entry;
    const [example, label, before, after] = [rows.example[i], rows.label[i], rows.before[i], rows.after[i]];
    const item = make("li", undefined, kind);
    const heading = make("h3", `Example ${example}: ${named(label)}`);
    heading.append(" ", make("span", OUTCOMES[kind], `mark ${kind}`));
    const pictures = make("div", undefined, "pictures");
    pictures.append(figure(clean(example), "not beside this page", `${named(before)}${percent(rows.sure[i])}`, "clean", before === label));
    const number = rows.picture?.[i];
    if (number == null) {
      const gone = kind === "wrong" ? "not attacked" : "not kept";
      pictures.append(figure(null, gone, "–", `perturbation, ${index.norm} ${rows.size[i].toPrecision(3)}`));
      pictures.append(figure(null, gone, `${named(after)}${percent(rows.sureAfter[i])}`, "attacked", after === label));
    } else {
      const times = `× ${rows.factor[i]}`;
      pictures.append(figure(made(group, number, 1, `perturbation ${times}`), "", times, `perturbation, ${index.norm} ${rows.size[i].toPrecision(3)}`));
      pictures.append(figure(made(group, number, 0, "in the end"), "", `${named(after)}${percent(rows.sureAfter[i])}`, "attacked", after === label));
    }
    const seed = index.groups.some((one) => one.seed !== group.seed) ? `, seed ${group.seed}` : "";
    const radius = group.eps === null ? "minimum norm" : `ε = ${new Map(index.radii).get(group.eps)}`;
    const margin = rows.margin[i] == null ? "" : `, margin ${rows.margin[i]} logits`;
    item.append(heading, pictures, make("p", sentence(entry)), make("p", `${group.model}, ${radius}${seed}${margin}`, "muted"));
    return item;
  };

  const draw = () => {
    const pages = Math.max(Math.ceil(shown.length / PER_PAGE), 1);
    page = Math.min(Math.max(page, 0), pages - 1);
    list.replaceChildren(...shown.slice(page * PER_PAGE, (page + 1) * PER_PAGE).map(card));
    list.start = page * PER_PAGE + 1;
    place.textContent = `page ${page + 1} of ${pages}`;
    first.disabled = previous.disabled = page === 0;
    next.disabled = last.disabled = page === pages - 1;
  };

  const wanted = () => {
    const [model, attack, eps, seed] = ["model", "attack", "eps", "seed"].map((name) => field(name)?.value ?? "");
    return index.groups.filter((group) =>
      (!model || group.model === model) && (!attack || group.attack === attack)
      && (group.eps === null || group.eps === Number(eps)) && (!seed || group.seed === Number(seed)));
  };

  const ORDERS = {
    example: (a, b) => a.rows.example[a.i] - b.rows.example[b.i],
    margin: (a, b) => (a.rows.margin[a.i] ?? Infinity) - (b.rows.margin[b.i] ?? Infinity),
    gradients: (a, b) => a.rows.gradients[a.i] - b.rows.gradients[b.i],
    size: (a, b) => a.rows.size[a.i] - b.rows.size[b.i],
  };

  const filter = () => {
    const groups = wanted();
    const missing = groups.filter((group) => !loaded.has(group.id));
    missing.forEach(load);
    const eps = Number(field("eps").value);
    const bound = (name, otherwise) => (field(name).value === "" ? otherwise : Number(field(name).value));
    const [kind, label, example] = [field("outcome").value, field("label").value, field("example").value];
    const [low, high] = [bound("low", -Infinity), bound("high", Infinity)];
    const counts = { "": 0, broken: 0, robust: 0, wrong: 0, doubtful: 0 };
    shown = [];
    for (const group of groups) {
      const rows = loaded.get(group.id)?.rows;
      for (let i = 0; rows && i < rows.example.length; i++) {
        if (label !== "" && rows.label[i] !== Number(label)) continue;
        if (example !== "" && rows.example[i] !== Number(example)) continue;
        if ((low > -Infinity || high < Infinity) && !(rows.margin[i] != null && rows.margin[i] >= low && rows.margin[i] <= high)) continue;
        const own = outcome(rows, i, eps);
        counts[own]++;
        counts[""]++;
        if (!kind || kind === own) shown.push({ group, rows, i, kind: own });
      }
    }
    for (const button of root.querySelectorAll("button[data-outcome]")) {
      button.setAttribute("aria-pressed", button.dataset.outcome === kind);
      button.querySelector("span").textContent = counts[button.dataset.outcome];
    }
    shown.sort((a, b) => ORDERS[field("order").value](a, b) || a.rows.example[a.i] - b.rows.example[b.i] || a.group.id - b.group.id);
    say.textContent = missing.length ? `loading ${missing.length} of ${groups.length} parts` : `${shown.length} rows`;
    page = 0;
    draw();
  };

  const load = (group) => {
    if (asked.has(group.id) || !index.files[group.id]) return;
    asked.add(group.id);
    const script = document.createElement("script");
    script.src = index.files[group.id];
    script.addEventListener("error", () => { say.textContent = `${index.files[group.id]} is missing: keep the folder beside the page`; });
    document.head.append(script);
  };

  const turn = (by) => { page += by; draw(); };
  first.addEventListener("click", () => turn(-Infinity));
  previous.addEventListener("click", () => turn(-1));
  next.addEventListener("click", () => turn(1));
  last.addEventListener("click", () => turn(Infinity));
  list.addEventListener("keydown", (event) => {
    if (event.key === "ArrowRight" || event.key === "ArrowLeft") {
      event.preventDefault();
      turn(event.key === "ArrowRight" ? 1 : -1);
    }
  });
  for (const button of root.querySelectorAll("button[data-outcome]")) {
    button.addEventListener("click", () => { field("outcome").value = button.dataset.outcome; filter(); });
  }
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);

  index.groups.forEach((group, id) => { group.id = id; });
  const take = (payload) => { loaded.set(payload.group, payload); };
  firstorder.waiting.forEach(take);
  let again = 0;
  firstorder.push = (payload) => {
    take(payload);
    clearTimeout(again);
    again = setTimeout(filter);
  };
  root.querySelectorAll("[hidden]").forEach((element) => { element.hidden = false; });
  filter();
})();
