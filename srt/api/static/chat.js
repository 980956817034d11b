// A chat with the server that this page came from. Nothing is kept but the key, and that for this tab only.

const byId = (id) => document.getElementById(id);
const log = byId("log"), text = byId("text"), state = byId("state"), send = byId("send");

const talk = { messages: [], images: [], running: null };

// --- the server ------------------------------------------------------------------------------------------

const headers = () => {
  const key = byId("key").value;
  return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
};

async function failure(response) {
  try {
    return (await response.json()).error.message;
  } catch {
    return `status ${response.status}`;
  }
}

// Objects of a server-sent event stream, whatever pieces the bytes come in.
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const whole = (rest + value).split("\n\n");
    rest = whole.pop();
    for (const event of whole) {
      const data = event.split("\n").filter((line) => line.startsWith("data: ")).map((line) => line.slice(6)).join("");
      if (data === "[DONE]") return;
      if (data) yield JSON.parse(data);
    }
  }
}

async function greet() {
  state.textContent = "";
  try {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.ok) {
      const name = (await response.json()).data[0].id;
      byId("model").textContent = document.title = name;
    } else {
      state.textContent = await failure(response);
      if (response.status === 401) openSettings(true), byId("key").focus();
    }
  } catch {
    state.textContent = "the server cannot be reached";
  }
}

// --- what is shown ---------------------------------------------------------------------------------------

function element(kind, className, content = "") {
  const made = document.createElement(kind);
  made.className = className;
  made.textContent = content;
  return made;
}

const nearEnd = () => log.scrollHeight - log.scrollTop - log.clientHeight < 80;

function grow(change) {
  const follow = nearEnd();
  change();
  if (follow) log.scrollTop = log.scrollHeight;
}

// Text with ``` blocks set off; everything is text, so nothing in an answer can become markup.
function showText(place, content) {
  place.replaceChildren(...content.split("```").map((part, index) =>
    index % 2 ? element("pre", "", part.replace(/^[\w+-]*\n/, "")) : document.createTextNode(part)));
}

function showUser(content, images) {
  byId("welcome")?.remove();
  const turn = element("div", "turn user");
  for (const url of images) {
    const picture = element("img", "");
    picture.src = url;
    turn.append(picture);
  }
  turn.append(element("div", "said", content));
  log.append(turn);
  log.scrollTop = log.scrollHeight;
}

class Answer {
  constructor() {
    this.turn = element("div", "turn assistant");
    log.append(this.turn);
    this.content = "";
    this.thought = "";
    this.calls = [];
  }

  #place(name, make) {
    if (!this[name]) {
      this[name] = make();
      this.turn.append(this[name]);
    }
    return this[name];
  }

  add(delta) {
    grow(() => {
      if (delta.reasoning_content) {
        this.thought += delta.reasoning_content;
        const fold = this.#place("fold", () => {
          const made = element("details", "thinking");
          made.append(element("summary", "", "Thinking"), element("div", ""));
          return made;
        });
        fold.lastChild.textContent = this.thought;
      }
      if (delta.content) {
        this.content += delta.content;
        showText(this.#place("said", () => element("div", "said")), this.content);
      }
      for (const part of delta.tool_calls ?? []) this.#call(part);
    });
  }

  #call(part) {
    const call = (this.calls[part.index] ??= { id: part.id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += part.function?.name ?? "";
    call.function.arguments += part.function?.arguments ?? "";
    call.place ??= this.turn.appendChild(element("div", "call"));
    call.place.replaceChildren(element("b", "", call.function.name), ` ${call.function.arguments}`);
  }

  facts(line) {
    grow(() => this.turn.append(element("div", "facts", line)));
  }

  error(line) {
    grow(() => this.turn.append(element("div", "facts error", line)));
  }

  message() {
    const calls = this.calls.map(({ id, type, function: called }) => ({ id, type, function: called }));
    return { role: "assistant", content: this.content, ...(calls.length ? { tool_calls: calls } : {}) };
  }
}

function told(usage, firstMs, lastMs) {
  const tokens = usage.completion_tokens, parts = [`${tokens} tokens`];
  parts.push(`${Math.round((1000 * tokens) / lastMs)} tokens/s`);
  parts.push(`first after ${Math.round(firstMs)} ms`);
  parts.push(`${usage.prompt_tokens_details?.cached_tokens ?? 0} of ${usage.prompt_tokens} prompt tokens cached`);
  const steps = usage.spec_verify_ct + (usage.spec_plain_ct ?? 0);
  if (usage.spec_verify_ct) parts.push(`${(usage.completion_tokens / steps).toFixed(2)} tokens a step`);
  return parts.join(" · ");
}

// --- asking ----------------------------------------------------------------------------------------------

function numberOf(id) {
  const value = byId(id).value;
  return value === "" ? undefined : Number(value);
}

function body() {
  const system = byId("system").value, tools = byId("tools").value.trim();
  return {
    messages: [...(system ? [{ role: "system", content: system }] : []), ...talk.messages],
    stream: true,
    stream_options: { include_usage: true },
    temperature: numberOf("temperature"),
    max_tokens: numberOf("max-tokens"),
    seed: numberOf("seed"),
    reasoning_effort: byId("effort").value || undefined,
    tools: tools ? JSON.parse(tools) : undefined,
  };
}

async function ask(content) {
  const images = talk.images.splice(0);
  showPictures();
  showUser(content, images);
  const parts = images.map((url) => ({ type: "image_url", image_url: { url } }));
  talk.messages.push({ role: "user", content: images.length ? [...parts, { type: "text", text: content }] : content });
  const answer = new Answer(), began = performance.now();
  let first = 0, usage = null;
  talk.running = new AbortController();
  send.textContent = "Stop";
  try {
    const request = { method: "POST", headers: headers(), body: JSON.stringify(body()), signal: talk.running.signal };
    const response = await fetch("v1/chat/completions", request);
    if (!response.ok) throw new Error(await failure(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      usage = event.usage ?? usage;
      for (const choice of event.choices) {
        const delta = choice.delta ?? {};
        if (!first && (delta.content || delta.reasoning_content || delta.tool_calls)) first = performance.now() - began;
        answer.add(delta);
      }
    }
    if (usage) answer.facts(told(usage, first, performance.now() - began));
    talk.messages.push(answer.message());
  } catch (error) {
    if (error.name === "AbortError") {
      answer.facts("stopped");
      talk.messages.push(answer.message());
    } else {
      answer.error(error.message);
      talk.messages.pop(); // it got no answer: the next message starts from before it
    }
  } finally {
    talk.running = null;
    send.textContent = "Send";
    text.focus();
  }
}

// --- images ----------------------------------------------------------------------------------------------

function showPictures() {
  byId("pictures").replaceChildren(...talk.images.map((url, index) => {
    const picture = element("img", "");
    picture.src = url;
    picture.title = "Take away";
    picture.onclick = () => (talk.images.splice(index, 1), showPictures());
    return picture;
  }));
}

function take(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    const reader = new FileReader();
    reader.onload = () => (talk.images.push(reader.result), showPictures());
    reader.readAsDataURL(file);
  }
}

// --- hands -----------------------------------------------------------------------------------------------

function openSettings(open) {
  byId("settings").hidden = !open;
  byId("settings-toggle").setAttribute("aria-expanded", String(open));
}

byId("ask").onsubmit = (event) => {
  event.preventDefault();
  if (talk.running) return talk.running.abort();
  const content = text.value.trim();
  if (!content && !talk.images.length) return;
  text.value = "";
  text.style.height = "";
  ask(content);
};
text.onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    if (!talk.running) byId("ask").requestSubmit();
  }
};
text.oninput = () => {
  text.style.height = "";
  text.style.height = `${text.scrollHeight + 2}px`;
};
byId("clear").onclick = () => {
  talk.running?.abort();
  talk.messages = [];
  log.replaceChildren();
};
byId("settings-toggle").onclick = () => openSettings(byId("settings").hidden);
byId("settings").onsubmit = (event) => event.preventDefault();
byId("key").value = sessionStorage.getItem("key") ?? "";
byId("key").onchange = () => {
  sessionStorage.setItem("key", byId("key").value);
  greet();
};
byId("file").onchange = (event) => (take(event.target.files), (event.target.value = ""));
document.onpaste = (event) => take(event.clipboardData.files);
document.ondragover = (event) => (event.preventDefault(), document.body.classList.add("drop"));
document.ondragleave = () => document.body.classList.remove("drop");
document.ondrop = (event) => {
  event.preventDefault();
  document.body.classList.remove("drop");
  take(event.dataTransfer.files);
};

greet();
