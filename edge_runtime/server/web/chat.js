// The conversation: asked, streamed, stopped, edited, tried again. It stays in this browser.

import { answer, Refused } from "./api.js";

const KEPT = "conversation";
const element = (id) => document.getElementById(id);

export class Chat {
  constructor(modelName, onAnswered, onRefused) {
    this.modelName = modelName;
    this.onAnswered = onAnswered;
    this.onRefused = onRefused;
    this.running = null; // AbortController of the answer that is made
    this.messages = this.kept();
    element("ask").addEventListener("submit", (event) => {
      event.preventDefault();
      this.send();
    });
    element("question").addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        this.send();
      }
    });
    document.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.stop();
    });
    element("stop").addEventListener("click", () => this.stop());
    element("clear").addEventListener("click", () => this.clear());
    this.draw();
  }

  kept() {
    try {
      return JSON.parse(localStorage.getItem(KEPT)) ?? [];
    } catch {
      return [];
    }
  }

  keep() {
    localStorage.setItem(KEPT, JSON.stringify(this.messages));
  }

  clear() {
    this.stop();
    this.messages = [];
    this.keep();
    this.draw();
    element("question").focus();
  }

  stop() {
    this.running?.abort();
  }

  send() {
    const text = element("question").value.trim();
    if (!text || this.running) return;
    element("question").value = "";
    this.messages.push({ role: "user", content: text });
    this.ask();
  }

  // The question comes back to be changed; what followed it goes.
  edit(index) {
    this.stop();
    element("question").value = this.messages[index].content;
    this.messages.length = index;
    this.keep();
    this.draw();
    element("question").focus();
  }

  retry(index) {
    if (this.running) return;
    this.messages.length = index;
    this.ask();
  }

  body() {
    const system = element("system").value.trim();
    const spoken = this.messages.filter((each) => !each.failed).map(({ role, content }) => ({ role, content }));
    const body = { messages: [...(system ? [{ role: "system", content: system }] : []), ...spoken] };
    if (element("temperature").value) body.temperature = Number(element("temperature").value);
    if (element("max-tokens").value) body.max_completion_tokens = Number(element("max-tokens").value);
    return body;
  }

  async ask() {
    const body = this.body();
    const made = { role: "assistant", content: "", about: "" };
    this.messages.push(made);
    this.running = new AbortController();
    this.draw();
    const said = element("messages").lastElementChild.querySelector(".said");
    try {
      body.model = await this.modelName();
      const about = await answer(body, this.running.signal, (text) => {
        made.content += text;
        this.follow(() => said.append(text));
      });
      made.about = describe(about);
      this.onAnswered();
    } catch (error) {
      if (error.name === "AbortError") {
        made.about = "stopped";
      } else {
        made.failed = true;
        made.content = error.message;
        if (error instanceof Refused) this.onRefused(error);
      }
    }
    this.running = null;
    this.keep();
    this.draw();
  }

  // Keeps the end in view, unless somebody has scrolled up to read.
  follow(change) {
    const list = element("messages");
    const atEnd = list.scrollHeight - list.scrollTop - list.clientHeight < 60;
    change();
    if (atEnd) list.scrollTop = list.scrollHeight;
  }

  draw() {
    this.follow(() => element("messages").replaceChildren(...this.messages.map((each, index) => this.item(each, index))));
    element("send").disabled = this.running !== null;
    element("stop").hidden = this.running === null;
  }

  item(message, index) {
    const item = document.createElement("li");
    item.className = message.role + (message.failed ? " failed" : "");
    const said = document.createElement("div");
    said.className = "said";
    said.textContent = message.content;
    const about = document.createElement("div");
    about.className = "about";
    about.append(message.about ?? "");
    if (!this.running) {
      about.append(
        message.role === "user"
          ? button("Edit", () => this.edit(index))
          : button("Try again", () => this.retry(index)),
      );
    }
    item.append(said, about);
    return item;
  }
}

function button(text, action) {
  const made = document.createElement("button");
  made.type = "button";
  made.textContent = text;
  made.addEventListener("click", action);
  return made;
}

function describe({ tier, finish, usage, firstMs, seconds }) {
  const parts = [`by ${tier}`];
  if (usage) {
    parts.push(`${usage.completion_tokens} tokens`);
    const decoding = seconds - (firstMs ?? 0) / 1000;
    if (usage.completion_tokens > 1 && decoding > 0) {
      parts.push(`${((usage.completion_tokens - 1) / decoding).toFixed(1)} a second`);
    }
  }
  if (firstMs !== null) parts.push(`first after ${Math.round(firstMs)} ms`);
  if (finish === "length") parts.push("cut off at the longest answer");
  return parts.join(" · ");
}
