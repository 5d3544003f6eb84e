// What the pages do besides standing still. Without it everything can be read: folds open by themselves, links lead on.
(() => {
  "use strict";
  const $$ = (selector, root = document) => Array.from(root.querySelectorAll(selector));

  // one button opens and closes all code
  const folds = $$("main details.code-fold"), head = document.querySelector("main #title-block-header");
  if (folds.length && head) {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "show-code btn btn-sm btn-outline-secondary";
    const name = () => {
      const all = folds.every((fold) => fold.open);
      button.textContent = all ? "Hide all code" : "Show all code";
      button.setAttribute("aria-pressed", String(all));
    };
    button.addEventListener("click", () => {
      const open = !folds.every((fold) => fold.open);
      folds.forEach((fold) => { fold.open = open; });
      name();
    });
    folds.forEach((fold) => fold.addEventListener("toggle", name));
    name();
    head.append(button);
  }

  // the page one is on is in sight in the list of pages
  const bar = document.getElementById("quarto-sidebar");
  const here = bar && (bar.querySelector("a.active, a[aria-current=page]"));
  if (here) {
    const box = here.getBoundingClientRect(), frame = bar.getBoundingClientRect();
    if (box.bottom > frame.bottom || box.top < frame.top) bar.scrollTop += box.top - frame.top - frame.height / 3;
  }

  // what scrolls sideways can be reached by keyboard
  const reach = () => $$("main pre, main .sd-table, main .cell-output-display, main math[display=block]").forEach((box) => {
    if (box.scrollWidth > box.clientWidth + 1 && /auto|scroll/.test(getComputedStyle(box).overflowX)) {
      box.tabIndex = 0;
      if (!box.hasAttribute("role") && box.localName !== "math") {
        box.setAttribute("role", "region");
        box.setAttribute("aria-label", box.localName === "pre" ? "Code, scrolls sideways" : "Table, scrolls sideways");
      }
    } else if (box.tabIndex === 0) box.removeAttribute("tabindex");
  });
  reach();
  addEventListener("load", reach);
  addEventListener("resize", reach);
  folds.forEach((fold) => fold.addEventListener("toggle", reach));

  // a page opened from disk may not fetch its index of words; a script may bring it
  if (location.protocol === "file:") {
    const fetched = window.fetch;
    window.fetch = (address, ...rest) => !String(address).endsWith("search.json") ? fetched(address, ...rest)
      : new Promise((resolve) => {
        const script = document.createElement("script");
        script.src = String(address).replace(/json$/, "js");
        script.onload = () => resolve({ json: async () => window.siteSearch });
        document.head.append(script);
      });
  }
})();
