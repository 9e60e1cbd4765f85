"use strict";
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], first = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, at) => {
    if (!head.classList.contains("n")) return;
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const was = head.getAttribute("aria-sort");
      const next = was === "descending" ? "ascending" : was === "ascending" ? null : "descending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      if (next) head.setAttribute("aria-sort", next);
      const sign = next === "ascending" ? 1 : -1;
      const key = (row) => row.cells[at].dataset.key;
      body.append(...(next ? [...first].sort((a, b) =>
        (key(a) === undefined) - (key(b) === undefined) || sign * (key(a) - key(b))) : first));
    };
  });
}
const pick = document.querySelector(".pick");
if (pick) {
  const [image, method, layer] = pick.querySelectorAll("select");
  const show = () => {
    for (const sheet of document.querySelectorAll(".sheet")) {
      sheet.hidden = sheet.dataset.at !== image.value;
      sheet.classList.toggle("single", layer.value !== "");
      for (const part of sheet.querySelectorAll("[data-method]")) {
        part.hidden = method.value !== "all" && part.dataset.method !== method.value;
        const maps = [...part.querySelectorAll("figure")];
        // a map holds until the next block that changes something
        const now = maps.filter((map) => +map.dataset.layer <= +layer.value).pop();
        for (const map of maps)
          map.hidden = layer.value === "" ? !map.classList.contains("overview") : map !== now;
        part.querySelector("p").hidden = layer.value === "" || now !== undefined;
      }
    }
  };
  pick.hidden = false;
  image.onchange = method.onchange = layer.onchange = show;
  show();
}
