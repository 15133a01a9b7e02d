"use strict";
(async () => {
  const options = {
    mode: "vega-lite", renderer: "svg", actions: false, defaultStyle: false, ast: true,
    tooltip: { disableDefaultStyle: true },
  };
  window.views = {};
  for (const script of document.querySelectorAll("script[data-chart]")) {
    const place = document.getElementById(script.dataset.chart);
    try {
      const specification = JSON.parse(script.textContent);
      if (place.clientWidth < 400) { // legends and titles reach to the left of where the axis begins
        const { legend, axisX } = specification.config;
        legend.columns = 2;
        legend.layout.top.anchor = axisX.titleAnchor = "end";
      }
      const { view } = await vegaEmbed(place, specification, options);
      window.views[place.id] = view;
      for (const input of place.querySelectorAll("input")) {
        input.setAttribute("aria-label", place.getAttribute("aria-label") + " " + input.name);
      }
    } catch (error) {
      place.classList.add("failed");
      place.textContent = "This chart could not be drawn. The table below contains its numbers.";
      console.error(error);
    }
  }
  document.documentElement.dataset.drawn = Object.keys(window.views).length;

  const address = document.body.dataset.refreshed;
  if (!address) return;
  // Keep open tables, sliders and the scroll position when the page reloads itself.
  const all = selector => [...document.querySelectorAll(selector)];
  const before = JSON.parse(sessionStorage.getItem("before") ?? "null");
  if (before) {
    all("figure").forEach(figure => { figure.querySelector("details").open = before.open.includes(figure.id); });
    for (const input of all("input")) {
      input.value = before.values[input.name] ?? input.value;
      input.dispatchEvent(new Event("input"));
    }
    scrollTo(0, before.scrolled);
  }
  let known = null;
  setInterval(async () => {
    try {
      const answer = await fetch(address, { cache: "no-store" });
      const current = await answer.text();
      if (known !== null && current !== known) {
        const open = all("figure").filter(figure => figure.querySelector("details").open).map(figure => figure.id);
        const values = Object.fromEntries(all("input").map(input => [input.name, input.value]));
        sessionStorage.setItem("before", JSON.stringify({ open, values, scrolled: scrollY }));
        location.reload();
      }
      known = current;
    } catch { /* the server has gone; the page stays as it is */ }
  }, 2000);
})();
