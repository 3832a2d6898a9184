// Tables of scores: a click on a head sorts, the field filters rows, the button turns rows into columns.
for (const board of document.querySelectorAll(".board")) {
  const table = board.querySelector("table"), said = board.querySelector("output"), field = board.querySelector("input");
  const rows = () => [...table.tBodies[0].rows];
  const value = (cell) => (cell.dataset.v === undefined || cell.dataset.v === "" ? NaN : Number(cell.dataset.v));

  function sort(head) {
    const at = head.cellIndex, down = head.getAttribute("aria-sort") !== "descending";
    for (const one of table.tHead.rows[0].cells) one.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    const sign = down ? -1 : 1;
    const order = rows().map((row, number) => ({ row, number, cell: row.cells[at] }));
    order.sort((a, b) => {
      if (at === 0) return sign * -a.cell.textContent.localeCompare(b.cell.textContent, "en", { numeric: true }) || a.number - b.number;
      const x = value(a.cell), y = value(b.cell);
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y) || a.number - b.number;
      return sign * (x - y) || a.number - b.number;
    });
    table.tBodies[0].append(...order.map(({ row }) => row));
  }

  function filter() {
    const words = field.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of rows()) {
      const text = row.cells[0].textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      shown += !row.hidden;
    }
    said.textContent = words.length ? `${shown} of ${rows().length}` : "";
  }

  function swap() {
    const cells = [[...table.tHead.rows[0].cells], ...rows().map((row) => [...row.cells])];
    const turned = cells[0].map((_, column) => cells.map((row) => row[column]));
    const corner = turned[0][0];
    corner.textContent = corner.textContent === "Model" ? "Metric" : "Model";
    const lines = turned.map((some) => {
      const row = document.createElement("tr");
      row.append(...some);
      return row;
    });
    for (const head of table.querySelectorAll("[aria-sort]")) head.removeAttribute("aria-sort");
    table.tHead.replaceChildren(lines[0]);
    table.tBodies[0].replaceChildren(...lines.slice(1));
    filter();
  }

  table.tHead.addEventListener("click", (event) => {
    const head = event.target.closest("th");
    if (head) sort(head);
  });
  field.addEventListener("input", filter);
  board.querySelector("button").addEventListener("click", swap);
  board.classList.add("live");
}
