// Draws the figures of the results' pages from results/figures.json; Plotly is loaded where a page has one.
(() => {
  const here = document.currentScript.src;
  const places = document.querySelectorAll("div.figure[data-figure]");
  if (!places.length) return;

  const load = (address) =>
    new Promise((done, failed) => {
      const script = Object.assign(document.createElement("script"), { src: address, onload: done, onerror: failed });
      document.head.append(script);
    });

  const draw = (place, figures) => {
    const [experiment, ...title] = place.dataset.figure.split("/");
    const { data, layout } = figures[experiment][title.join("/")];
    const colour = getComputedStyle(document.body).color;
    const look = { paper_bgcolor: "transparent", plot_bgcolor: "transparent", font: { color: colour }, margin: { t: 20 } };
    if (place.clientWidth < 600) look.legend = { orientation: "h", yref: "container", y: 0, yanchor: "bottom" };
    Plotly.newPlot(place, data, { height: 420, ...layout, ...look }, { responsive: true, displaylogo: false });
  };

  Promise.all([
    fetch(new URL("../results/figures.json", here)).then((answer) => answer.json()),
    load(new URL("plotly.min.js", here)),
  ])
    .then(([figures]) => places.forEach((place) => draw(place, figures)))
    .catch((error) => places.forEach((place) => (place.textContent = `This figure cannot be shown: ${error}`)));
})();
