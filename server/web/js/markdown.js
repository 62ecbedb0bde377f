// A reply's Markdown as elements: paragraphs, headings, lists, quotes, rules, code, emphasis. Links stay text.

import { el } from "./dom.js";

export function markdown(text) {
  const made = document.createDocumentFragment();
  const lines = text.split("\n");
  for (let i = 0; i < lines.length; ) {
    const block = BLOCKS.find(({ opens }) => opens.test(lines[i]));
    const start = i++;
    if (block.closes) {
      while (i < lines.length && !block.closes.test(lines[i])) i++;
      made.append(block.make(lines.slice(start + 1, i++)));
    } else {
      while (i < lines.length && block.goesOn(lines[i])) i++;
      const found = block.make(lines.slice(start, i));
      if (found) made.append(found);
    }
  }
  return made;
}

const item = /^\s*[-*+]\s+/;
const numbered = /^\s*\d+[.)]\s+/;
const isPlain = (line) => line.trim() && !BLOCKS.slice(0, -1).some(({ opens }) => opens.test(line));
const list = (name, mark) => ({
  opens: mark,
  goesOn: (line) => mark.test(line) || /^\s{2,}\S/.test(line),
  make: (lines) => el(name, {}, ...items(lines, mark).map((text) => el("li", {}, ...inline(text)))),
});

const BLOCKS = [
  { opens: /^\s*```/, closes: /^\s*```\s*$/, make: (lines) => el("pre", { tabindex: 0 }, el("code", {}, lines.join("\n"))) },
  {
    opens: /^#{1,6}\s/,
    goesOn: () => false,
    make: ([line]) => el(`h${Math.min(6, line.match(/^#+/)[0].length + 2)}`, {}, ...inline(line.replace(/^#+\s+/, ""))),
  },
  { opens: /^\s*([-*_])(\s*\1){2,}\s*$/, goesOn: () => false, make: () => el("hr") },
  list("ul", item),
  list("ol", numbered),
  {
    opens: /^>\s?/,
    goesOn: (line) => /^>\s?/.test(line),
    make: (lines) => el("blockquote", {}, ...inline(lines.map((line) => line.replace(/^>\s?/, "")).join("\n"))),
  },
  { opens: /^\s*$/, goesOn: (line) => !line.trim(), make: () => null },
  { opens: /^/, goesOn: isPlain, make: (lines) => el("p", {}, ...inline(lines.join("\n"))) },
];

function items(lines, mark) {
  const found = [];
  for (const line of lines) {
    if (mark.test(line)) found.push(line.replace(mark, ""));
    else found[found.length - 1] += "\n" + line.trim();
  }
  return found;
}

const SPANS = /(`[^`\n]+`)|(\*\*[^*\n]+\*\*)|(\*[^*\s][^*\n]*\*)/;

function inline(text) {
  return text.split(new RegExp(SPANS.source, "g")).filter(Boolean).map((part) => {
    if (!SPANS.test(part)) return part;
    if (part.startsWith("`")) return el("code", {}, part.slice(1, -1));
    return part.startsWith("**") ? el("strong", {}, part.slice(2, -2)) : el("em", {}, part.slice(1, -1));
  });
}
