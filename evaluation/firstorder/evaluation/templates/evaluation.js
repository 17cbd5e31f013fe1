"use strict";
(() => {
  const form = document.querySelector("form.filters");
  const told = form.querySelector("output");
  const table = new DataTable("#results", {
    autoWidth: false,
    paging: false,
    info: false,
    order: [],
    orderDescReverse: false,
    layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null },
    language: { zeroRecords: "No row is like this." },
  });
  const count = () => {
    const [shown, all] = [table.rows({ search: "applied" }).count(), table.rows().count()];
    told.textContent = shown < all ? `${shown} of ${all} rows` : `${all} rows`;
  };
  form.hidden = false;
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", ({ target }) => {
    if ("search" in target.dataset) table.search(target.value);
    else table.column(Number(target.dataset.column)).search(target.value, target.value ? { exact: true } : {});
    table.draw();
  });
  table.on("draw", count);
  count();
})();
