"use strict";
(() => {
  const table = document.querySelector("table.board");
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  const search = document.querySelector("input.search");
  const count = document.querySelector("output.count");

  function key(row, column) {
    const raw = row.cells[column].dataset.key;
    if (raw === undefined) return null;
    const value = Number(raw);
    return raw === "" || Number.isNaN(value) ? raw : value;
  }

  function compare(a, b) {
    return typeof a === "number" && typeof b === "number" ? a - b : String(a).localeCompare(String(b));
  }

  function sort(column) {
    const head = heads[column];
    const first = head.dataset.first;
    const other = first === "ascending" ? "descending" : "ascending";
    const order = head.getAttribute("aria-sort") === first ? other : first;
    heads.forEach((one) => one.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = [...body.rows].map((row) => [key(row, column), row]);
    rows.sort(([a], [b]) => (a === null ? 1 : 0) - (b === null ? 1 : 0) || (a === null ? 0 : sign * compare(a, b)));
    body.append(...rows.map(([, row]) => row));
  }

  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of body.rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += row.hidden ? 0 : 1;
    }
    count.textContent = `${shown} of ${body.rows.length}`;
  }

  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => sort(column));
  });
  search.addEventListener("input", filter);
  document.querySelector(".tools").hidden = false;
  const wanted = heads.findIndex((head) => head.dataset.default !== undefined);
  if (wanted >= 0) sort(wanted);
  filter();
})();
