// Starts the page: views, the server's state, the key.

import { ApiError, key } from "./api.js";
import { byId } from "./dom.js";
import { LiveView } from "./live.js";
import { Playground } from "./playground.js";

const STATE_INTERVAL_MS = 3000;
const VIEWS = ["chat", "live"];

const playground = new Playground();
const live = new LiveView(byId("live"));

function showView(name) {
  for (const view of VIEWS) {
    const isShown = view === name;
    byId(view).hidden = !isShown;
    byId(`tab-${view}`).setAttribute("aria-selected", isShown);
    byId(`tab-${view}`).tabIndex = isShown ? 0 : -1;
  }
  live.setShown(name === "live");
  history.replaceState(null, "", name === "chat" ? "/" : `#${name}`);
}

for (const view of VIEWS) {
  byId(`tab-${view}`).addEventListener("click", () => showView(view));
  byId(`tab-${view}`).addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = VIEWS[1 - VIEWS.indexOf(view)];
    showView(other);
    byId(`tab-${other}`).focus();
  });
}

/** Load the models as soon as the server has them; ask for a key if it wants one. */
async function start() {
  try {
    await playground.load();
    byId("key-button").hidden = !key.get();
  } catch (error) {
    if (error instanceof ApiError && error.status === 401) askForKey(key.get() ? "The server does not know this key." : "");
    else setTimeout(start, STATE_INTERVAL_MS);
  }
}

function askForKey(error) {
  byId("key-error").textContent = error;
  byId("key").value = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

byId("key-form").addEventListener("submit", () => {
  key.set(byId("key").value.trim());
  start();
});
byId("key-button").addEventListener("click", () => askForKey(""));

async function watchState() {
  let state = "unreachable";
  try {
    state = (await (await fetch("/health")).json()).status;
  } catch {
    // nobody answers: that is the state
  }
  byId("state").textContent = state === "ok" ? "ready" : state;
  byId("state").dataset.state = state;
  setTimeout(watchState, STATE_INTERVAL_MS);
}

showView(location.hash === "#live" ? "live" : "chat");
start();
watchState();
byId("message").focus();
