// The slider: what has a reveal threshold above the chosen one stays. Nothing here is needed to read the page.
"use strict";
(() => {
  const slider = document.getElementById("tau");
  const badge = document.getElementById("tau-badge");
  const hint = document.getElementById("hint");
  const drawn = Array.from(document.querySelectorAll("[data-r]"), (element) => ({
    element,
    reveal: Math.fround(Number(element.dataset.r)),
    edges: Number(element.dataset.n || 0),
  }));
  const show = (threshold) => {
    const tau = Math.fround(threshold); // shares are float32: compare as such
    let edges = 0;
    for (const item of drawn) {
      const on = item.reveal > tau;
      item.element.classList.toggle("off", !on);
      if (on) edges += item.edges;
    }
    const text = `${Number(threshold.toPrecision(3))}: ${edges.toLocaleString("en")} edges`;
    badge.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  if (slider) {
    const given = Number(slider.dataset.threshold);
    slider.closest("label").hidden = false;
    let waiting = false;
    slider.addEventListener("input", () => {
      if (waiting) return;
      waiting = true;
      requestAnimationFrame(() => {
        waiting = false;
        show(Math.pow(10, Number(slider.value)));
      });
    });
    slider.addEventListener("dblclick", () => {
      slider.value = String(Math.log10(given));
      show(given);
    });
  }
  const scroll = document.querySelector(".scroll");
  scroll.scrollLeft = scroll.scrollWidth; // the target is at the right

  const rest = hint.textContent;
  document.querySelector(".plot").addEventListener("mouseover", (event) => {
    const title = event.target.closest("g, circle, text, polygon")?.querySelector(":scope > title");
    hint.textContent = title ? title.textContent : rest;
  });
})();
