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
  const [image, method] = pick.querySelectorAll("select");
  const show = () => {
    for (const sheet of document.querySelectorAll(".sheet")) {
      sheet.hidden = sheet.dataset.at !== image.value;
      for (const part of sheet.querySelectorAll("[data-method]"))
        part.hidden = method.value !== "all" && part.dataset.method !== method.value;
    }
  };
  pick.hidden = false;
  image.onchange = method.onchange = show;
  show();
}
