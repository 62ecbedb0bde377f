// One column of the playground: a model, its settings, and a conversation with it.

import { stream } from "./api.js";
import { el, seconds, short } from "./dom.js";
import { markdown } from "./markdown.js";
import { Settings } from "./settings.js";
import { tokenSpan } from "./tokens.js";

const TOP_LOGPROBS = 5;

export class Pane {
  constructor(models, { onRemove, hint }) {
    this.settings = new Settings();
    this.messages = [];
    this.model = el("select", { "aria-label": "Model" });
    this.log = el("div.log", { "aria-live": "polite", tabindex: 0, "aria-label": "Conversation" });
    this.hint = el("p.hint", {}, hint);
    this.remove = el("button.quiet.remove", { title: "Remove this column", "aria-label": "Remove this column", onclick: onRemove }, "×");
    this.element = el(
      "section.pane",
      {},
      el("details", {}, el("summary", {}, this.model, el("span.more", {}, "Settings"), this.remove), this.settings.element),
      this.log,
    );
    this.model.addEventListener("click", (event) => event.stopPropagation());
    this.setModels(models);
    this.clear();
  }

  setModels(models) {
    const chosen = this.model.value;
    this.model.replaceChildren(...models.map((name) => el("option", {}, name)));
    if (models.includes(chosen)) this.model.value = chosen;
  }

  clear() {
    this.messages = [];
    this.log.replaceChildren(this.hint);
  }

  /** Say something and show the reply as it comes. */
  async send(text, { wantsLogprobs, signal }) {
    this.hint.remove();
    this.log.append(el("div.said.user", {}, text));
    const reply = new Reply(wantsLogprobs);
    this.log.append(reply.element);
    this.#follow(true);
    try {
      const { path, body } = this.#request(text, wantsLogprobs);
      for await (const chunk of stream(path, body, signal)) {
        reply.add(chunk);
        this.#follow();
      }
      reply.finish();
    } catch (error) {
      reply.finish(error);
    }
    this.#remember(text, reply);
    this.#follow();
  }

  #request(text, wantsLogprobs) {
    const body = { model: this.model.value, ...this.settings.values() };
    if (this.settings.mode.value === "text") {
      return { path: "/v1/completions", body: { ...body, prompt: text, ...(wantsLogprobs && { logprobs: TOP_LOGPROBS }) } };
    }
    const system = this.settings.system.value.trim();
    const opening = system ? [{ role: "system", content: system }] : [];
    const messages = [...opening, ...this.messages, { role: "user", content: text }];
    const logprobs = wantsLogprobs && { logprobs: true, top_logprobs: TOP_LOGPROBS };
    return { path: "/v1/chat/completions", body: { ...body, messages, ...logprobs } };
  }

  #remember(text, reply) {
    if (reply.text) this.messages.push({ role: "user", content: text }, { role: "assistant", content: reply.text });
  }

  /** Keep the end in sight, unless somebody has scrolled up to read. */
  #follow(always = false) {
    const { log } = this;
    if (always || log.scrollHeight - log.scrollTop - log.clientHeight < 120) log.scrollTop = log.scrollHeight;
  }
}

class Reply {
  constructor(wantsLogprobs) {
    this.text = "";
    this.started = performance.now();
    this.first = null;
    this.usage = null;
    this.reason = null;
    this.content = el(wantsLogprobs ? "div.content.tokens" : "div.content", {});
    this.figures = el("div.figures");
    this.wantsLogprobs = wantsLogprobs;
    this.element = el("div.said.model.busy", {}, this.content, this.figures);
  }

  add(chunk) {
    this.usage = chunk.usage ?? this.usage;
    const [choice] = chunk.choices;
    if (!choice) return;
    this.reason = choice.finish_reason ?? this.reason;
    const text = choice.delta ? (choice.delta.content ?? "") : (choice.text ?? "");
    const entries = choice.logprobs ? tokensOf(choice.logprobs) : [];
    if (!text && !entries.length) return;
    this.first ??= performance.now();
    this.last = performance.now();
    this.text += text;
    if (this.wantsLogprobs) this.content.append(...entries.map(tokenSpan));
    else this.#draw();
  }

  /** Once per frame, however fast tokens come. */
  #draw() {
    this.frame ??= requestAnimationFrame(() => {
      this.frame = null;
      this.content.replaceChildren(markdown(this.text));
    });
  }

  finish(error) {
    this.element.classList.remove("busy");
    if (error && error.name !== "AbortError") {
      this.element.append(el("p.error", { role: "alert" }, error.message));
    }
    const parts = [];
    if (this.usage) parts.push(`${this.usage.completion_tokens} tokens`);
    if (this.first) parts.push(`first after ${seconds((this.first - this.started) / 1000)}`);
    const took = (this.last - this.first) / 1000;
    if (this.usage?.completion_tokens > 1 && took > 0) parts.push(`${short((this.usage.completion_tokens - 1) / took)} tokens/s`);
    if (error?.name === "AbortError") parts.push("stopped");
    else if (this.reason && this.reason !== "stop") parts.push(`ended by ${this.reason}`);
    this.figures.textContent = parts.join(" · ");
  }
}

/** Chat's logprobs as they are; a completion's parallel lists in the same shape. */
function tokensOf(logprobs) {
  if (logprobs.content) return logprobs.content;
  return logprobs.tokens.map((token, i) => ({
    token,
    logprob: logprobs.token_logprobs[i],
    top_logprobs: Object.entries(logprobs.top_logprobs[i] ?? {}).map(([name, logprob]) => ({ token: name, logprob })),
  }));
}
