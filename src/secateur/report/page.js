"use strict";
(() => {
  const parsed = new Map();
  const json = (id) => {
    if (!parsed.has(id)) {
      const element = document.getElementById(id);
      parsed.set(id, element && JSON.parse(element.textContent));
    }
    return parsed.get(id);
  };
  const dark = json("dark-colours");
  const page = document.documentElement.dataset;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 640px)");
  const make = (name, text, parent) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.append(element);
    return element;
  };

  // The figures carry the light page's colours; on a dark page each is swapped for its partner.
  const themed = (value) => {
    if (typeof value === "string") return system.matches && dark[value] ? dark[value] : value;
    if (Array.isArray(value)) return typeof value[0] === "number" ? value.slice() : value.map(themed);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, themed(part)]));
    return value;
  };

  // Tables of plain values, column by column; rows are made when they are looked at.
  const PAGE = 100;
  const value = (column, row) => {
    const found = column.values ? column.values[row] : row;
    return column.texts ? column.texts[found] : found;
  };
  const cell = (column, row) => {
    const found = value(column, row);
    if (found === null || found === "") return "-";
    if (column.kind === "count") return found.toLocaleString("en");
    if (column.kind === "fixed") return found.toFixed(column.decimals);
    if (column.kind === "times") return found.toFixed(2) + "\u00d7";
    if (column.kind === "exponent") return found === 0 ? "0" : found.toExponential(1);
    return found;
  };
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null ? 0 : 1) - (b === null ? 0 : 1);
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? String(a).localeCompare(String(b)) : x - y;
  };
  const turn = (head) => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    return up ? 1 : -1;
  };
  const build = (place) => {
    if (place.firstElementChild) return;
    const data = json(place.dataset.table);
    const table = make("table", undefined, place);
    const heads = make("tr", undefined, make("thead", undefined, table));
    const body = make("tbody", undefined, table);
    const more = make("p", undefined, place);
    more.className = "more";
    let order = Array.from({ length: data.rows }, (_, row) => row);
    let shown = 0;
    const show = (number) => {
      const rows = order.slice(shown, number).map((row) => {
        const line = document.createElement("tr");
        if (data.marks) line.className = data.marks[row];
        for (const column of data.columns) {
          const said = make("td", cell(column, row), line);
          if (column.kind !== "text") said.className = "number";
        }
        return line;
      });
      body.append(...rows);
      shown += rows.length;
      more.replaceChildren();
      if (shown === data.rows) return;
      make("span", `${shown.toLocaleString("en")} of ${data.rows.toLocaleString("en")} rows. `, more);
      for (const [text, upTo] of [[`Show ${PAGE} more`, shown + PAGE], ["Show all", data.rows]]) {
        const button = make("button", text, more);
        button.type = "button";
        button.addEventListener("click", () => show(upTo));
      }
    };
    for (const column of data.columns) {
      const head = make("th", undefined, heads);
      head.scope = "col";
      if (column.kind !== "text") head.className = "number";
      const button = make("button", column.head, head);
      button.type = "button";
      button.addEventListener("click", () => {
        const sign = turn(head);
        const key = column.sorts ? (row) => column.sorts[row] : (row) => value(column, row);
        order.sort((a, b) => sign * compare(key(a), key(b)));
        const number = shown;
        body.replaceChildren();
        shown = 0;
        show(number);
      });
    }
    show(PAGE);
  };
  for (const place of document.querySelectorAll("[data-table]")) {
    const details = place.closest("details");
    if (details) details.addEventListener("toggle", () => details.open && build(place));
    else build(place);
  }

  const escaped = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
  const trial = (section, row) => {
    const columns = json(section + "-trials").columns;
    const said = (head) => {
      const column = columns.find((one) => one.head === head);
      return column ? escaped(cell(column, row)) : "-";
    };
    return (
      `<b>${said("method")}, ${said("removed %")} %, seed ${said("seed")}</b>` +
      `<br>pruned ${said("pruned %")} %<br>fine-tuned ${said("fine-tuned %")} %<br>${said("trial")}`
    );
  };

  // The charts' library is most of the page: it comes packed, and is unpacked and started after the first paint.
  const unpacked = async () => {
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), (c) => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    make("script", await new Response(stream).text(), document.head);
  };
  const chosen = {};
  const draw = (div) => {
    const name = div.dataset.figure;
    const section = name.split("-")[0];
    const figure = themed(json(div.dataset.variant ? `${name}-${div.dataset.variant}` : name));
    for (const trace of figure.data) {
      if (trace.meta === "settings") trace.customdata = trace.customdata.map((k) => json(section + "-settings").hovers[k]);
      if (trace.meta === "trials") trace.customdata = trace.customdata.map((row) => trial(section, row));
    }
    if (name in chosen) {
      const choices = json(name + "-choices");
      const [net, ...bars] = choices.rows[chosen[name]];
      const last = figure.data.length - 1;
      for (const trace of figure.data) trace.x = choices.nets[net].layers;
      if (last) figure.data[0].y = choices.nets[net].before;
      figure.data[last].y = bars.map((bar) => bar / (choices.scale || 1));
    }
    // Two legends side by side need room; on a narrow page the line styles go below the chart.
    if (narrow.matches && name.endsWith("-classic"))
      Object.assign(figure.layout.legend2, { x: 0, xanchor: "left", y: -0.16, yanchor: "top" });
    const config = { responsive: true, displayModeBar: false };
    const drawn = Plotly.react(div, figure.data, figure.layout, config);
    if (!page.chartMs) page.chartMs = Math.round(performance.now());
    return drawn;
  };

  // Charts in sight are drawn at once, the others one by one, those next to what is looked at first.
  const charts = [...document.querySelectorAll(".chart")];
  const away = (div) => {
    const box = div.getBoundingClientRect();
    return Math.max(0, box.top - window.innerHeight, -box.bottom);
  };
  let round = 0;
  const menus = [...document.querySelectorAll("select[data-choices]")];
  const drawAll = () => {
    const mine = ++round;
    let left = charts.map((div) => [away(div), div]);
    const next = () => {
      if (mine !== round) return;
      if (!left.length) {
        page.drawn = charts.length;
        page.drawnMs = Math.round(performance.now());
        for (const menu of menus) fill(menu);
        return;
      }
      left = left.map(([, div]) => [away(div), div]).sort((a, b) => b[0] - a[0]);
      draw(left.pop()[1]);
      setTimeout(next);
    };
    for (const [distance, div] of left) if (!distance) draw(div);
    left = left.filter(([distance]) => distance);
    if (!page.openedMs) page.openedMs = Math.round(performance.now());
    setTimeout(next);
  };
  const drawnNow = () => {
    if (!window.Plotly) return;
    round++;
    for (const div of charts) if (div.data) Plotly.Plots.resize(div); else draw(div);
  };

  // Menus of settings name one; the others, which may be thousands, come when somebody asks or has nothing to wait for.
  const fill = (menu) => {
    if (menu.dataset.filled) return;
    menu.dataset.filled = "";
    const { names, groups } = json(menu.dataset.choices.split("-")[0] + "-settings");
    const rows = json(menu.dataset.choices + "-choices").rows;
    const first = Number(menu.value);
    const found = new Map();
    menu.replaceChildren();
    names.forEach((text, k) => {
      if (rows[k].length < 2) return;
      if (!found.has(groups[k])) found.set(groups[k], make("optgroup", undefined, menu)).get(groups[k]).label = groups[k];
      make("option", text, found.get(groups[k])).value = k;
    });
    menu.value = first;
  };
  for (const menu of menus) {
    const name = menu.dataset.choices;
    for (const asked of ["pointerdown", "focus", "keydown"]) menu.addEventListener(asked, () => fill(menu));
    menu.addEventListener("change", async () => {
      chosen[name] = Number(menu.value);
      await start();
      draw(document.querySelector(`[data-figure="${name}"]`));
    });
  }
  for (const menu of document.querySelectorAll("select[data-variants]"))
    menu.addEventListener("change", async () => {
      const div = document.querySelector(`[data-figure="${menu.dataset.variants}"]`);
      div.dataset.variant = menu.value;
      await start();
      draw(div);
    });
  for (const menu of document.querySelectorAll("select[data-panels]"))
    menu.addEventListener("change", () => {
      [...document.getElementById(menu.dataset.panels).children].forEach((table, k) => {
        table.hidden = k !== Number(menu.value);
      });
    });

  const sortBy = (table, head) => {
    const place = [...head.parentNode.children].indexOf(head);
    const sign = turn(head);
    const body = table.tBodies[0];
    const key = (row) => row.cells[place].dataset.value;
    body.append(...[...body.rows].sort((a, b) => sign * compare(key(a), key(b))));
  };
  for (const table of document.querySelectorAll("table.sortable"))
    for (const head of table.tHead.rows[0].cells)
      head.querySelector("button").addEventListener("click", () => sortBy(table, head));

  let started;
  const start = () => (started ??= unpacked().then(drawAll));
  requestAnimationFrame(() => setTimeout(start));
  setTimeout(start, 200); // where nothing is painted, such as in a tab behind
  const again = () => start().then(() => round && drawAll());
  system.addEventListener("change", again);
  narrow.addEventListener("change", again);
  window.addEventListener("beforeprint", drawnNow);
})();
