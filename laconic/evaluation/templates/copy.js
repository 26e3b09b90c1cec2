"use strict";
const copy = document.getElementById("copy");
if (copy) copy.addEventListener("click", async () => {
  await navigator.clipboard.writeText(document.getElementById("command").textContent);
  copy.textContent = "Copied";
});
