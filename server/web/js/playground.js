// The chat view: one message goes to every pane; all answer side by side.

import { models } from "./api.js";
import { byId } from "./dom.js";
import { Pane } from "./pane.js";
import { hide } from "./tokens.js";

const MAX_PANES = 4;
const HINT = "Ask something. Enter sends, Shift+Enter makes a new line.";

export class Playground {
  #panes = [];
  #names = [];
  #abort = null;

  constructor() {
    byId("composer").addEventListener("submit", (event) => {
      event.preventDefault();
      this.#send();
    });
    byId("message").addEventListener("keydown", (event) => {
      if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
      event.preventDefault();
      this.#send();
    });
    byId("message").addEventListener("input", grow);
    byId("compare").addEventListener("click", () => this.#add());
    byId("clear").addEventListener("click", () => this.#clear());
    byId("stop").addEventListener("click", () => this.#abort?.abort());
    document.addEventListener("keydown", (event) => event.key === "Escape" && this.#abort?.abort());
    byId("panes").addEventListener("scroll", hide, true);
  }

  /** Read the list of models; panes keep their choice. */
  async load() {
    this.#names = await models();
    if (!this.#panes.length) this.#add();
    for (const pane of this.#panes) pane.setModels(this.#names);
  }

  #add() {
    const pane = new Pane(this.#names, { onRemove: () => this.#remove(pane), hint: HINT });
    const last = this.#panes.at(-1);
    if (last) pane.settings.copyFrom(last.settings);
    pane.model.value = this.#names[this.#panes.length % this.#names.length];
    this.#panes.push(pane);
    byId("panes").append(pane.element);
    pane.element.scrollIntoView({ inline: "end", block: "nearest" });
    this.#update();
  }

  #remove(pane) {
    pane.element.remove();
    this.#panes = this.#panes.filter((each) => each !== pane);
    this.#update();
  }

  #update() {
    byId("compare").disabled = this.#panes.length >= MAX_PANES;
    for (const pane of this.#panes) pane.remove.hidden = this.#panes.length === 1;
    byId("panes").dataset.count = this.#panes.length;
  }

  #clear() {
    this.#abort?.abort();
    for (const pane of this.#panes) pane.clear();
    byId("message").focus();
  }

  async #send() {
    const text = byId("message").value;
    if (!text.trim() || this.#abort || !this.#panes.length) return;
    byId("message").value = "";
    grow();
    this.#setBusy(new AbortController());
    const options = { wantsLogprobs: byId("logprobs").checked, signal: this.#abort.signal };
    await Promise.all(this.#panes.map((pane) => pane.send(text, options)));
    this.#setBusy(null);
    byId("message").focus();
  }

  #setBusy(abort) {
    this.#abort = abort;
    byId("stop").hidden = !abort;
    byId("send").hidden = !!abort;
  }
}

function grow() {
  const box = byId("message");
  box.style.height = "auto";
  box.style.height = `${Math.min(box.scrollHeight, innerHeight / 3)}px`;
}
