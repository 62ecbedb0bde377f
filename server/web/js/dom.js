// Elements, and numbers for people. Text is always text: nothing here parses HTML.

/** An element: el("p.note", {title: "…"}, "text", child, …). */
export function el(kind, attributes = {}, ...children) {
  const [name, ...classes] = kind.split(".");
  const made = document.createElement(name);
  made.className = classes.join(" ");
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value != null) made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

export const byId = (id) => document.getElementById(id);

/** 1234.5 → "1,235", 0.0123 → "0.012": three digits, for people. */
export function short(value) {
  if (!Number.isFinite(value)) return "–";
  if (Math.abs(value) >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return Number(value.toPrecision(3)).toString();
}

export function seconds(value) {
  if (!Number.isFinite(value)) return "–";
  return value < 1 ? `${short(value * 1000)} ms` : `${short(value)} s`;
}
