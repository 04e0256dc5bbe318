"use strict";

// The language of a page: its browser's, until a button says another. Who draws words listens.
function speak(language) {
  document.documentElement.dataset.language = language;
  document.documentElement.lang = language;
  for (const button of document.querySelectorAll("[data-speaks]")) {
    button.setAttribute("aria-pressed", String(button.dataset.speaks === language));
  }
  document.dispatchEvent(new Event("speak"));
}

for (const button of document.querySelectorAll("[data-speaks]")) {
  button.addEventListener("click", () => speak(button.dataset.speaks));
}
speak(navigator.language.toLowerCase().startsWith("zh") ? "zh" : "en");
