"use strict";
(() => {
  const json = (id) => JSON.parse(document.getElementById(id).textContent);
  const dark = json("dark-colours");
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const narrow = window.matchMedia("(max-width: 640px)");

  // The figures carry the light page's colours; on a dark page each is swapped for its partner.
  const themed = (value) => {
    if (typeof value === "string") return system.matches && dark[value] ? dark[value] : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value && typeof value === "object")
      return Object.fromEntries(Object.entries(value).map(([key, part]) => [key, themed(part)]));
    return value;
  };

  const chosenWidths = {};
  const draw = (div) => {
    const name = div.dataset.figure;
    const figure = themed(json(name));
    const choice = chosenWidths[name];
    if (choice) {
      figure.data[0].x = figure.data[1].x = choice.layers;
      figure.data[0].y = choice.before;
      figure.data[1].y = choice.after;
    }
    // Two legends side by side need room; on a narrow page the line styles go below the chart.
    if (narrow.matches && name.endsWith("-classic"))
      Object.assign(figure.layout.legend2, { x: 0, xanchor: "left", y: -0.16, yanchor: "top" });
    const config = { responsive: true, displayModeBar: false };
    return Plotly.react(div, figure.data, figure.layout, config);
  };
  const charts = [...document.querySelectorAll(".chart")];
  const drawAll = () => Promise.all(charts.map(draw)).then(() => { document.documentElement.dataset.drawn = charts.length; });
  drawAll();
  system.addEventListener("change", drawAll);
  narrow.addEventListener("change", drawAll);
  window.addEventListener("beforeprint", () => charts.forEach((div) => Plotly.Plots.resize(div)));

  for (const menu of document.querySelectorAll("select[data-widths]")) {
    const name = menu.dataset.widths;
    const choices = json(name + "-choices");
    menu.addEventListener("change", () => {
      chosenWidths[name] = choices[Number(menu.value)];
      draw(document.querySelector(`[data-figure="${name}"]`));
    });
  }

  const compare = (a, b) => {
    const [x, y] = [Number(a), Number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };
  const sortBy = (table, head) => {
    const place = [...head.parentNode.children].indexOf(head);
    const up = head.getAttribute("aria-sort") !== "ascending";
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const body = table.tBodies[0];
    const value = (row) => row.cells[place].dataset.value;
    const rows = [...body.rows].sort((a, b) => (up ? 1 : -1) * compare(value(a), value(b)));
    body.append(...rows);
  };
  for (const table of document.querySelectorAll("table.sortable"))
    for (const head of table.tHead.rows[0].cells)
      head.querySelector("button").addEventListener("click", () => sortBy(table, head));
})();
