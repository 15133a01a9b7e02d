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
      const { view } = await vegaEmbed(place, JSON.parse(script.textContent), options);
      window.views[place.id] = view;
      for (const input of place.querySelectorAll("input")) {
        input.setAttribute("aria-label", place.getAttribute("aria-label") + " " + input.name);
      }
    } catch (error) {
      place.classList.add("failed");
      place.textContent = "This chart could not be drawn; its numbers are below.";
      console.error(error);
    }
  }
  document.documentElement.dataset.drawn = Object.keys(window.views).length;

  const address = document.body.dataset.refreshed;
  if (!address) return;
  let known = null;
  setInterval(async () => {
    try {
      const answer = await fetch(address, { cache: "no-store" });
      const current = await answer.text();
      if (known !== null && current !== known) location.reload();
      known = current;
    } catch { /* the server has gone; the page stays as it is */ }
  }, 2000);
})();
