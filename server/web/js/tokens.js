// A reply token by token: colour says how likely each was, a tooltip what else the model considered.

import { byId, el } from "./dom.js";

/** A span per token of `entries`, in OpenAI's shape of chat logprobs. */
export function tokenSpan(entry) {
  const level = Math.min(9, Math.floor(Math.exp(entry.logprob) * 10));
  const shown = el(`span.token.p${level}`, { tabindex: 0 }, entry.token);
  shown.addEventListener("pointerenter", () => show(shown, entry));
  shown.addEventListener("focus", () => show(shown, entry));
  shown.addEventListener("pointerleave", hide);
  shown.addEventListener("blur", hide);
  return shown;
}

function show(anchor, entry) {
  const tip = byId("tooltip");
  const others = entry.top_logprobs.length ? entry.top_logprobs : [entry];
  const isListed = others.some((other) => other.token === entry.token);
  tip.replaceChildren(...(isListed ? others : [...others, entry]).map((each) => row(each, each.token === entry.token)));
  tip.hidden = false;
  const at = anchor.getBoundingClientRect();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left), innerWidth - width - 8);
  const isAbove = at.bottom + height + 8 > innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${isAbove ? at.top - height - 6 : at.bottom + 6}px`;
}

export function hide() {
  byId("tooltip").hidden = true;
}

function row(entry, isChosen) {
  const share = Math.exp(entry.logprob);
  const meter = el("span.meter", {}, el("span.fill"));
  meter.firstChild.style.width = `${share * 100}%`;
  return el(
    isChosen ? "div.chosen" : "div",
    {},
    el("code", {}, visible(entry.token)),
    meter,
    el("span.number", {}, percent(share)),
  );
}

function percent(share) {
  return share < 0.001 ? "< 0.1 %" : `${(share * 100).toFixed(1)} %`;
}

function visible(token) {
  return token.replaceAll(" ", "␣").replaceAll("\n", "⏎").replaceAll("\t", "⇥") || "∅";
}
