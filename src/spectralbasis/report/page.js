"use strict";
(() => {
  const root = document.documentElement;
  const page = JSON.parse(document.getElementById("payload").textContent);
  const control = (id) => document.getElementById(id);
  const state = { selection: 0, matrix: 0, measure: Object.keys(page.measures)[0], excess: false, full: false };
  const config = { displayModeBar: false, doubleClick: false };
  const ABSENT = "–";

  // Numbers -----------------------------------------------------------------------------------------------------------
  const unpack = (text) => new Float32Array(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)).buffer);
  const size = page.labels.length;
  const grids = {};
  for (const [key, statistics] of Object.entries(page.grids)) {
    grids[key] = Object.fromEntries(Object.entries(statistics).map(([name, text]) => [name, unpack(text)]));
  }
  const read = (key, statistic, matrix) => grids[key][statistic]?.[state.selection * size + matrix] ?? NaN;
  const fixed = (value, digits, scale = 1) =>
    Number.isFinite(value) ? (value * scale).toFixed(digits).replace(/^-(0\.?0*)$/, "$1").replace("-", "−") : ABSENT;

  // Drawing -----------------------------------------------------------------------------------------------------------
  // Names come escaped for Plotly in `page.labels` and in the figures; everything else is numbers.
  function themed(value, style) {
    if (typeof value === "string") return value.startsWith("var(") ? style.getPropertyValue(value.slice(4, -1)).trim() : value;
    if (Array.isArray(value)) return value.map((item) => themed(item, style));
    if (value === null || typeof value !== "object" || ArrayBuffer.isView(value)) return value;
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
  }

  function draw(id, data, changes, label) {
    const element = control(id);
    if (!element) return;
    const figure = page.figures[id];
    const style = getComputedStyle(root);
    const traces = figure.traces.map((trace, i) => ({ ...themed({ ...trace, ...data[i] }, style) }));
    const layout = themed(figure.layout, style);
    for (const axis of ["xaxis", "yaxis"]) Object.assign(layout[axis], changes?.[axis]);
    if (changes?.height) element.style.height = `${changes.height}px`;
    Object.assign(layout, { width: element.clientWidth, height: element.clientHeight });
    if (label) element.setAttribute("aria-label", label);
    Plotly.react(element, traces, layout, config);
  }

  function drawCurves() {
    for (const [id, figure] of Object.entries(page.figures)) {
      if (!figure.views) continue;
      const view = figure.views[Math.min(state.selection, figure.views.length - 1)];
      const range = (state.full && figure.full) || view.range;
      draw(id, view.traces, range ? { yaxis: { range } } : {}, view.label);
    }
  }

  function hover(matrix) {
    const lines = [`<b>${page.labels[matrix]}</b>`];
    const measure = page.measures[state.measure];
    const write = (statistic) => fixed(read(state.measure, statistic, matrix), measure.digits, measure.percent ? 100 : 1);
    const unit = measure.percent ? " %" : "";
    lines.push(`${measure.label}: ${write("value")}${unit}`);
    const nullMean = read(state.measure, "null_mean", matrix);
    if (Number.isFinite(nullMean)) {
      const excess = read(state.measure, "value", matrix) - nullMean;
      lines.push(`null mean: ${write("null_mean")}${unit}`);
      lines.push(`excess: ${fixed(excess, measure.digits, measure.percent ? 100 : 1)}${unit}`);
    }
    const z = read(state.measure, "z", matrix);
    if (Number.isFinite(z)) lines.push(`z: ${fixed(z, 1)}`);
    const p = read(state.measure, "p_value", matrix);
    if (Number.isFinite(p)) lines.push(`p: ${fixed(p, 3)}`);
    return lines.join("<br>");
  }

  function cellValue(matrix) {
    if (matrix < 0) return null;
    const value = read(state.measure, "value", matrix) - (state.excess ? read(state.measure, "null_mean", matrix) : 0);
    return Number.isFinite(value) ? value : null;
  }

  function drawHeatmap() {
    const { rows, short, columns, cells } = page.cells;
    const narrow = control("heatmap").parentElement.clientWidth < 560;
    const measure = page.measures[state.measure];
    const { scales } = page.figures.heatmap;
    const trace = {
      z: cells.map((row) => row.map(cellValue)),
      text: cells.map((row) => row.map((matrix) => (matrix < 0 ? "" : hover(matrix)))),
      customdata: cells,
      colorscale: state.excess ? scales.diverging : scales.sequential,
      zmid: state.excess ? 0 : undefined,
      colorbar: { ...page.figures.heatmap.traces[0].colorbar, tickformat: measure.percent ? ".3~%" : ".3~g" },
    };
    const at = (labels) => ({ tickvals: labels.map((_, i) => i), ticktext: labels });
    const changes = {
      height: 100 + rows.length * (rows.length > 60 ? 15 : 26),
      xaxis: columns.length <= 40 ? at(columns) : { ...at(columns), tickvals: columns.map((_, i) => i).filter((i) => i % 5 === 0), ticktext: columns.filter((_, i) => i % 5 === 0) },
      yaxis: at(narrow ? short : rows),
    };
    const what = `${measure.label}${state.excess ? ", excess over the null" : ""}`;
    draw("heatmap", [trace], changes, `Heat map. ${what} of ${size} matrices, ${page.selections[state.selection]}.`);
  }

  const spectra = page.spectra && {
    ...page.spectra,
    ...Object.fromEntries(["base", "tuned", "low", "high"].map((name) => [name, unpack(page.spectra[name])])),
  };

  function drawSpectra() {
    if (!spectra) return;
    const depth = spectra.directions.length;
    const selection = Math.min(state.selection, spectra.selections - 1);
    const row = (values, offset) => Array.from(values.subarray(offset, offset + depth), (v) => (Number.isFinite(v) ? v : null));
    const base = row(spectra.base, state.matrix * depth);
    const tuned = row(spectra.tuned, (selection * size + state.matrix) * depth);
    const x = spectra.directions.map((direction) => direction + 1);
    const ranged = selection === 0 && page.selections.length > 1;
    const [low, high] = [spectra.low, spectra.high].map((values) => (ranged ? row(values, state.matrix * depth) : []));
    const change = (values) => values.map((value, i) => (value === null || !base[i] ? null : value / base[i] - 1));
    const band = (lower, upper) => (ranged ? { x: [...x, ...x.toReversed()], y: [...upper, ...lower.toReversed()] } : { x: [], y: [] });
    const name = control("matrix").selectedOptions[0].textContent;
    const where = `${name}, ${page.selections[state.selection]}`;
    draw("spectrum-values", [band(low, high), { x, y: base }, { x, y: tuned }], null, `Line chart. Singular values of ${where}.`);
    draw("spectrum-change", [band(change(low), change(high)), { x, y: change(tuned) }], null, `Line chart. Relative change of the singular values of ${where}.`);
  }

  function drawAll() {
    drawCurves();
    drawHeatmap();
    drawSpectra();
  }

  // Tables ------------------------------------------------------------------------------------------------------------
  const matrixTable = control("matrix-table");
  const matrixRows = [...matrixTable.tBodies[0].rows];
  const firstNumber = 4;

  function fillTable() {
    for (const row of matrixRows) {
      page.columns.forEach((column, i) => {
        const value = read(column.measure, column.statistic, Number(row.dataset.matrix));
        const cell = row.cells[firstNumber + i];
        cell.textContent = fixed(value, column.digits, column.scale);
        if (Number.isFinite(value)) cell.dataset.value = value;
        else delete cell.dataset.value;
      });
    }
    const scope = control("table-scope");
    if (scope) scope.textContent = `${page.selections[state.selection]}${state.selection ? "" : " (means)"}`;
    const sorted = matrixTable.querySelector("th[aria-sort]");
    if (sorted) sortRows(matrixTable, Number(sorted.dataset.column), sorted.getAttribute("aria-sort"));
  }

  const collator = new Intl.Collator("en", { numeric: true });

  function sortRows(table, column, direction) {
    const sign = direction === "ascending" ? 1 : -1;
    const keyed = [...table.tBodies[0].rows].map((row) => {
      const cell = row.cells[column];
      const text = cell.textContent;
      return { row, text, value: "value" in cell.dataset ? Number(cell.dataset.value) : text === ABSENT ? null : text };
    });
    keyed.sort((a, b) => {
      if (a.value === null || b.value === null) return (a.value === null) - (b.value === null);
      return sign * (typeof a.value === "number" && typeof b.value === "number" ? a.value - b.value : collator.compare(a.text, b.text));
    });
    table.tBodies[0].append(...keyed.map(({ row }) => row));
  }

  function makeSortable(table) {
    for (const heading of table.querySelectorAll("th[data-column]")) {
      const button = document.createElement("button");
      button.type = "button";
      button.className = "sort";
      button.textContent = heading.textContent;
      heading.firstElementChild.replaceWith(button);
      button.addEventListener("click", () => sortBy(table, heading));
    }
  }

  // Numbers start with the largest, names with the first; a second press reverses.
  function sortBy(table, heading) {
    const first = heading.classList.contains("number") ? "descending" : "ascending";
    const second = first === "descending" ? "ascending" : "descending";
    const direction = heading.getAttribute("aria-sort") === first ? second : first;
    table.querySelector("th[aria-sort]")?.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", direction);
    sortRows(table, Number(heading.dataset.column), direction);
  }

  function filterRows() {
    const query = control("filter").value.trim().toLowerCase();
    let shown = 0;
    for (const row of matrixRows) {
      row.hidden = !row.cells[0].textContent.toLowerCase().includes(query);
      shown += !row.hidden;
    }
    control("count").textContent = `${shown} of ${size} matrices`;
  }

  // Wiring ------------------------------------------------------------------------------------------------------------
  control("selection")?.addEventListener("change", (event) => {
    state.selection = Number(event.target.value);
    drawAll();
    fillTable();
  });
  control("full-scale").addEventListener("change", (event) => {
    state.full = event.target.checked;
    drawCurves();
  });
  control("measure").addEventListener("change", (event) => {
    state.measure = event.target.value;
    state.excess = "excess" in event.target.selectedOptions[0].dataset;
    drawHeatmap();
  });
  control("matrix")?.addEventListener("change", (event) => {
    state.matrix = Number(event.target.value);
    drawSpectra();
  });
  control("filter").addEventListener("input", filterRows);

  root.classList.add("scripted");
  document.querySelectorAll("table.sortable").forEach(makeSortable);
  filterRows();
  drawAll();
  control("heatmap").on("plotly_click", ({ points }) => {
    if (!spectra || points[0].customdata < 0) return;
    control("matrix").value = state.matrix = points[0].customdata;
    drawSpectra();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let resized;
  addEventListener("resize", () => {
    clearTimeout(resized);
    resized = setTimeout(drawAll, 150);
  });
  addEventListener("beforeprint", () => {
    root.dataset.paper = "";
    drawAll();
  });
  addEventListener("afterprint", () => {
    delete root.dataset.paper;
    drawAll();
  });
})();
