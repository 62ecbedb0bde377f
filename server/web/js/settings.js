// What can be chosen about a pane's requests; empty fields leave the choice to the server.

import { el } from "./dom.js";

const FIELDS = [
  { name: "temperature", label: "Temperature", min: 0, max: 2, step: 0.1, value: 0.7 },
  { name: "top_p", label: "Top p", min: 0.01, max: 1, step: 0.01 },
  { name: "top_k", label: "Top k", min: 1, step: 1 },
  { name: "min_p", label: "Min p", min: 0, max: 1, step: 0.01 },
  { name: "max_tokens", label: "Max tokens", min: 1, step: 1, value: 512 },
  { name: "frequency_penalty", label: "Frequency penalty", min: -2, max: 2, step: 0.1 },
  { name: "presence_penalty", label: "Presence penalty", min: -2, max: 2, step: 0.1 },
  { name: "seed", label: "Seed", step: 1 },
];

export class Settings {
  constructor() {
    this.inputs = FIELDS.map((field) =>
      el("input", { type: "number", placeholder: "default", inputmode: "decimal", ...field, label: null }),
    );
    this.system = el("textarea", { rows: 2, placeholder: "You are …", name: "system" });
    this.stop = el("input", { type: "text", placeholder: "none; several with |", name: "stop" });
    this.mode = el("select", { name: "mode" }, el("option", { value: "chat" }, "Chat"), el("option", { value: "text" }, "Continue text"));
    this.element = el(
      "div.settings",
      {},
      labelled("Mode", this.mode),
      ...FIELDS.map((field, i) => labelled(field.label, this.inputs[i])),
      labelled("Stop strings", this.stop),
      el("label.wide", {}, "System message", this.system),
    );
  }

  /** Parameters of a request; throws with the name of a field that is out of range. */
  values() {
    const found = {};
    for (const input of this.inputs) {
      if (!input.validity.valid) throw new Error(`${input.name}: ${input.validationMessage}`);
      if (input.value !== "") found[input.name] = input.valueAsNumber;
    }
    const stops = this.stop.value.split("|").filter(Boolean);
    return stops.length ? { ...found, stop: stops } : found;
  }

  copyFrom(other) {
    this.inputs.forEach((input, i) => (input.value = other.inputs[i].value));
    for (const name of ["system", "stop", "mode"]) this[name].value = other[name].value;
  }
}

const labelled = (text, input) => el("label", {}, text, input);
