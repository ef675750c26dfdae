(() => {
  "use strict";
  const figures = JSON.parse(document.getElementById("payload").textContent);

  function draw() {
    const style = getComputedStyle(document.documentElement);
    const color = (name) => style.getPropertyValue(name).trim();
    for (const element of document.querySelectorAll("[data-figure]")) {
      const figure = figures[element.dataset.figure];
      const layout = structuredClone(figure.layout || {});
      const axes = Object.keys(layout).filter((key) => /^[xy]axis\d*$/.test(key));
      for (const key of new Set(["xaxis", "yaxis", ...axes])) {
        layout[key] = { automargin: true, ...layout[key], gridcolor: color("--grid"), linecolor: color("--axis"), zerolinecolor: color("--axis") };
      }
      Object.assign(layout, {
        paper_bgcolor: "rgba(0,0,0,0)",
        plot_bgcolor: "rgba(0,0,0,0)",
        font: { family: color("--font"), color: color("--ink") },
        margin: { l: 60, r: 20, t: 30, b: 50 },
      });
      if (element.clientWidth < 600) layout.legend = { orientation: "h", yref: "container", y: 0, yanchor: "bottom" };
      Plotly.react(element, figure.data, layout, { responsive: true, displaylogo: false });
    }
  }

  document.documentElement.classList.add("scripted");
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
})();
