"use strict";
// One question to every model, each with a conversation of its own. Text goes in as text.
(() => {
  const at = (id) => document.getElementById(id);
  const question = at("question");
  // Controls, and what turns the direction of the text around it, as the terminal shows them.
  const STEERING = /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
  const harmless = (text) => text.replace(STEERING, (c) =>
    `<U+${c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0")}>`);

  const sections = document.querySelectorAll(".column");
  const voices = JSON.parse(document.body.dataset.models).map((name, i) => ({
    name, said: [], log: sections[i].querySelector(".said"), state: sections[i].querySelector(".state"),
  }));
  let stopper = null;
  let retries = 0;  // of the question asked last

  const add = (voice, kind, text) => {
    voice.log.querySelector(".empty")?.remove();
    const line = document.createElement("p");
    line.className = kind;
    line.dir = "auto";
    line.textContent = harmless(text);
    voice.log.append(line);
    voice.log.scrollTop = voice.log.scrollHeight;
    return line;
  };

  // Whether every setting can be; the first that cannot is shown with the browser's own words.
  const valid = () => {
    const wrong = document.querySelector(".settings input:invalid");
    if (wrong) {
      wrong.closest("details").open = true;
      wrong.reportValidity();
    }
    return !wrong;
  };

  const any = () => Math.floor(Math.random() * Number.MAX_SAFE_INTEGER);

  const settings = () => {
    const given = {};
    for (const name of ["temperature", "top_p", "seed", "max_tokens"]) {
      if (at(name).value !== "") given[name] = Number(at(name).value);
    }
    // A retry is another draw: with the next seed where one is typed, as in the terminal.
    if (retries) given.seed = given.seed === undefined ? any() : given.seed + retries;
    return given;
  };

  const headers = () => {
    const key = at("key")?.value.trim();
    return { "Content-Type": "application/json", ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  };

  // The values of `data:` lines, as they come.
  async function* events(body) {
    const reader = body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data: ") && line !== "data: [DONE]") yield JSON.parse(line.slice(6));
      }
    }
  }

  async function answer(voice, asked, signal) {
    const system = at("system").value.trim();
    const messages = [
      ...(system ? [{ role: "system", content: system }] : []),
      ...voice.said, { role: "user", content: asked },
    ];
    voice.log.querySelectorAll(".gone").forEach((line) => line.remove());
    const mine = add(voice, "user", asked);
    const line = add(voice, "assistant writing", "");
    let text = "", reason = null, tokens = null, failed = null;
    voice.state.textContent = "waiting";
    const began = performance.now();
    try {
      const response = await fetch("/v1/chat/completions", {
        method: "POST", headers: headers(), signal,
        body: JSON.stringify({ model: voice.name, messages, stream: true,
          stream_options: { include_usage: true }, ...settings() }),
      });
      if (!response.ok) {
        const told = await response.json().catch(() => null);
        throw new Error(told?.error?.message ?? `status ${response.status}`);
      }
      for await (const event of events(response.body)) {
        if (event.error) throw new Error(event.error.message);
        const choice = event.choices[0];
        if (choice?.delta?.content) {
          voice.state.textContent = "answering";
          text += choice.delta.content;
          const low = voice.log.scrollHeight - voice.log.scrollTop - voice.log.clientHeight < 40;
          line.textContent = harmless(text);
          if (low) voice.log.scrollTop = voice.log.scrollHeight;
        }
        reason = choice?.finish_reason ?? reason;
        tokens = event.usage?.completion_tokens ?? tokens;
      }
      if (reason === null) throw new Error("the answer broke off");
    } catch (error) {
      failed = error;
    }
    line.classList.remove("writing");
    voice.state.textContent = "";
    const nothing = text === "" && reason === null;
    if (nothing) line.remove();
    if (failed && failed.name !== "AbortError") {
      // What was not answered is no part of the conversation: it goes with the next question.
      add(voice, nothing ? "failed gone" : "failed", failed.message);
    }
    if (nothing) {
      if (failed?.name === "AbortError") mine.remove();
      else mine.classList.add("gone");
      return false;
    }
    if (failed?.name === "AbortError") add(voice, "note", "stopped");
    if (reason === "length") add(voice, "note", "cut: longest answer reached");
    if (text === "") add(voice, "note", "an empty answer");
    if (tokens !== null) {
      const seconds = (performance.now() - began) / 1000;
      voice.state.textContent = `${tokens} tokens, ${seconds.toFixed(1)} s`;
    }
    voice.said.push({ role: "user", content: asked }, { role: "assistant", content: text });
    return true;
  }

  const busy = (is) => {
    at("send").disabled = is;
    at("stop").disabled = !is;
    at("again").disabled = is || !voices.some((voice) => voice.said.length);
    at("new").disabled = is;
  };

  async function ask(asked) {
    stopper = new AbortController();
    busy(true);
    const answered = await Promise.all(voices.map((voice) => answer(voice, asked, stopper.signal)));
    stopper = null;
    busy(false);
    // What nobody answered can be mended and sent again.
    if (!answered.some(Boolean) && question.value === "") question.value = asked;
    question.focus();
  }

  at("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    const asked = question.value.trim();
    if (stopper || asked === "" || !valid()) return;
    question.value = "";
    retries = 0;
    ask(asked);
  });
  question.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      at("ask").requestSubmit();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") stopper?.abort();
  });
  at("stop").addEventListener("click", () => stopper?.abort());
  at("again").addEventListener("click", () => {
    if (!valid()) return;
    const asked = voices.find((voice) => voice.said.length).said.at(-2).content;
    for (const voice of voices) {
      if (voice.said.at(-2)?.content !== asked) continue;
      voice.said.splice(-2);
      const mine = [...voice.log.querySelectorAll(".user")].at(-1);
      while (mine?.nextSibling) mine.nextSibling.remove();
      mine?.remove();
    }
    retries += 1;
    ask(asked);
  });
  at("new").addEventListener("click", () => {
    for (const voice of voices) {
      voice.said.length = 0;
      voice.log.replaceChildren();
      voice.state.textContent = "";
      const line = document.createElement("p");
      line.className = "empty";
      line.textContent = "Nothing said yet.";
      voice.log.append(line);
    }
    busy(false);
    question.focus();
  });
})();
