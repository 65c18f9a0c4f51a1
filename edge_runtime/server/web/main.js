// Puts the page together: which model, which view, and what to do when the server wants a key.

import { models, Refused, useKey } from "./api.js";
import { Chat } from "./chat.js";
import { Dashboard, fill } from "./dashboard.js";

const element = (id) => document.getElementById(id);
const select = element("model");
let known = [];
let listed; // the newest list of models, once it is there

function tell(error) {
  const wantsKey = error instanceof Refused && error.status === 401;
  element("key-form").hidden = !wantsKey;
  element("problem").hidden = false;
  element("problem").textContent =
    error instanceof Refused ? error.message : `the server cannot be reached (${error.message})`;
  if (wantsKey) element("key").focus();
}

function load() {
  listed = list();
}

async function list() {
  try {
    known = await models();
  } catch (error) {
    tell(error);
    return;
  }
  element("problem").hidden = element("key-form").hidden = true;
  const before = select.value || localStorage.getItem("model");
  select.replaceChildren(...known.filter((each) => !isEncoder(each)).map((each) => new Option(each.id, each.id)));
  if ([...select.options].some((option) => option.value === before)) select.value = before;
  describe();
  fill(
    "models",
    known.map(({ id, placement }) => [id, placement?.device ?? "opened on demand", placement?.variant ?? ""]),
  );
}

const isEncoder = (model) => model.kind === "embedding";

function describe() {
  const placement = chosen()?.placement;
  element("device").textContent = placement ? `on ${placement.device}` : "opened on demand";
  element("device").title = placement?.reason ?? "";
  localStorage.setItem("model", select.value);
}

const chosen = () => known.find((each) => each.id === select.value);

const chat = new Chat(
  () => listed.then(() => select.value), // who is quick asks before the names have come
  () => chosen()?.placement || load(), // it is open now
  (error) => error.status === 401 && tell(error),
);
const dashboard = new Dashboard(tell);

function show(view) {
  for (const name of ["chat", "dashboard"]) {
    element(name).hidden = name !== view;
    element(`show-${name}`).setAttribute("aria-pressed", String(name === view));
  }
  if (view === "dashboard") {
    load();
    dashboard.start();
  } else {
    dashboard.stop();
    element("question").focus();
  }
}

select.addEventListener("change", describe);
element("show-chat").addEventListener("click", () => show("chat"));
element("show-dashboard").addEventListener("click", () => show("dashboard"));
element("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  useKey(element("key").value);
  load();
});
window.edgeGlm = { chat, dashboard };
load();
show("chat");
