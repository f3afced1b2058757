// The page of olmo2-run serve: one conversation, each token of which tells how likely it was.
// What comes from the model or the server is only ever set as text.

const $ = (id) => document.getElementById(id);
const TOP = 5; // alternatives that are asked for
const TEXT_TOKENS = 128; // of a text that is gone on with, where nothing is said; a chat ends by itself
const EXAMPLES = {
  chat: ["What is a prime number?", "Write a haiku about the sea.", "Name three rivers of Europe."],
  text: ["In the beginning", "And it came to pass", "The king said unto them,"],
};
const ENDS = { length: "cut at the limit", stop: "ended by itself", tool_calls: "called a tool" };

let served = null; // what GET /package says
let key = "";
let turns = []; // {role, text} and, of answers, {thoughts, figures, ...}
let running = null; // an AbortController

// Elements

function made(tag, properties = {}, ...inside) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...inside);
  return element;
}

function button(words, act) {
  const element = made("button", { type: "button", textContent: words });
  element.addEventListener("click", act);
  return element;
}

function speak(words) {
  $("spoken").textContent = words;
}

// The server

class Refused extends Error {}

async function ask(path, body, signal) {
  const headers = key ? { authorization: `Bearer ${key}` } : {};
  const options = body === undefined ? { headers } : { method: "POST", headers, body: JSON.stringify(body), signal };
  let response;
  try {
    response = await fetch(path, options);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused("The server cannot be reached. Is it still running?");
  }
  if (response.ok) return response;
  if (response.status === 401) askForKey();
  let said = `The server answered ${response.status}.`;
  try {
    said = (await response.json()).error.message;
  } catch {
    // it has no words of its own
  }
  throw Object.assign(new Refused(said), { status: response.status });
}

function askForKey() {
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

/** Yield the documents of a stream of events, and throw where it is an error or does not end as it should. */
async function* documents(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  for (;;) {
    let found;
    try {
      found = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refused("The connection broke off.");
    }
    if (found.done) throw new Refused("The answer broke off.");
    held += found.value;
    for (let end = held.indexOf("\n\n"); end >= 0; end = held.indexOf("\n\n")) {
      const line = held.slice(0, end);
      held = held.slice(end + 2);
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") return;
      const document_ = JSON.parse(line.slice(6));
      if (document_.error) throw new Refused(document_.error.message);
      yield document_;
    }
  }
}

// What is asked

function numberOf(id) {
  const value = $(id).value.trim();
  return value === "" ? undefined : Number(value);
}

function schemaOf() {
  const text = $("schema").value.trim();
  if (!text) return undefined;
  const schema = JSON.parse(text);
  if (typeof schema !== "object" || schema === null || Array.isArray(schema)) throw new SyntaxError("expected an object");
  return { type: "json_schema", json_schema: { name: "answer", schema } };
}

function requestOf(before) {
  const stops = $("stop").value.split("\n").filter((line) => line !== "");
  const body = {
    model: $("model").value || served.model,
    stream: true,
    stream_options: { include_usage: true },
    temperature: numberOf("temperature"),
    top_p: numberOf("top_p"),
    stop: stops.length ? stops : undefined,
    response_format: schemaOf(),
  };
  for (const id of ["top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "seed", "max_tokens"]) {
    body[id] = numberOf(id);
  }
  if (served.chat) return { ...body, messages: messagesOf(before), logprobs: true, top_logprobs: TOP };
  return { ...body, prompt: before[before.length - 1].text, logprobs: TOP, max_tokens: body.max_tokens ?? TEXT_TOKENS };
}

function messagesOf(before) {
  const system = $("system").value.trim();
  const messages = before
    .filter((turn) => turn.role === "user" || turn.text)
    .map((turn) => ({ role: turn.role, content: turn.text }));
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

/** A choice of a chat or of a completion as {kind, text, tokens}. */
function pieceOf(choice) {
  if (choice.delta === undefined) {
    const { tokens = [], token_logprobs: own = [], top_logprobs: top = [] } = choice.logprobs ?? {};
    const found = tokens.map((text, n) => ({
      text,
      logprob: own[n],
      top: Object.entries(top[n] ?? {}).map(([other, logprob]) => ({ text: other, logprob })),
    }));
    return { kind: "text", text: choice.text, tokens: found };
  }
  const found = (choice.logprobs?.content ?? []).map(({ token, logprob, top_logprobs: top }) => ({
    text: token,
    logprob,
    top: top.map((other) => ({ text: other.token, logprob: other.logprob })),
  }));
  const thought = choice.delta.reasoning_content;
  return { kind: thought ? "thoughts" : "text", text: thought ?? choice.delta.content ?? "", tokens: found };
}

// Tokens

const pieces = new WeakMap(); // element -> its tokens

function visible(text) {
  return text.replaceAll(" ", "·").replaceAll("\n", "↵").replaceAll("\t", "⇥") || "(nothing)";
}

function share(logprob) {
  const percent = 100 * Math.exp(logprob);
  return percent < 0.1 ? "< 0.1 %" : `${percent.toFixed(1)} %`;
}

function tokenElement({ text, tokens }, ended) {
  const least = Math.min(0, ...tokens.map((token) => token.logprob));
  const level = least > Math.log(0.6) ? "" : least > Math.log(0.3) ? " p1" : least > Math.log(0.1) ? " p2" : " p3";
  const element = made("span", { className: `t${level}`, textContent: text });
  if (ended) {
    element.className = "t end";
    element.textContent = tokens.map((token) => token.text).join("");
  }
  pieces.set(element, tokens);
  return element;
}

function rows(token) {
  const all = token.top.some((other) => other.text === token.text) ? token.top : [...token.top, token];
  return [...all].sort((a, b) => b.logprob - a.logprob);
}

function cardOf(tokens) {
  return tokens.flatMap((token) => {
    const list = made("ol");
    for (const row of rows(token)) {
      const bar = made("span");
      bar.style.width = `${100 * Math.exp(row.logprob)}%`;
      list.append(
        made(
          "li",
          { className: row.text === token.text ? "chosen" : "" },
          made("code", { textContent: visible(row.text) }),
          made("span", { className: "bar" }, bar),
          made("span", { className: "share", textContent: share(row.logprob) }),
        ),
      );
    }
    return [made("h3", { textContent: "What the model expected here" }), list];
  });
}

function wordsOf(tokens) {
  return tokens
    .map((token) => {
      const others = rows(token).filter((row) => row.text !== token.text);
      const listed = others.map((row) => `${visible(row.text)} ${share(row.logprob)}`).join(", ");
      return `${visible(token.text)}, ${share(token.logprob)}. Others: ${listed || "none"}.`;
    })
    .join(" ");
}

let marked = null;

function showCard(element) {
  if (marked === element) return;
  hideCard();
  const tokens = pieces.get(element);
  if (!tokens?.length) return;
  marked = element;
  element.classList.add("on");
  const card = $("card");
  card.replaceChildren(...cardOf(tokens));
  card.hidden = false;
  placeCard();
}

/** Put the card under its token, or above where there is more room. */
function placeCard() {
  if (!marked) return;
  const [card, element] = [$("card"), marked];
  const within = card.offsetParent.getBoundingClientRect();
  const at = element.getClientRects()[0] ?? element.getBoundingClientRect();
  const left = Math.min(Math.max(8, at.left - within.left), within.width - card.offsetWidth - 8);
  const below = at.bottom - within.top + 4;
  const fits = below + card.offsetHeight < within.height - 8;
  card.style.left = `${left}px`;
  card.style.top = `${fits ? below : Math.max(8, at.top - within.top - card.offsetHeight - 4)}px`;
}

function hideCard() {
  marked?.classList.remove("on");
  marked = null;
  $("card").hidden = true;
}

function walk(event) {
  const every = [...event.currentTarget.querySelectorAll(".t")].filter((element) => pieces.get(element)?.length);
  const place = every.indexOf(marked);
  const steps = { ArrowRight: place + 1, ArrowLeft: place < 0 ? 0 : place - 1, Home: 0, End: every.length - 1 };
  if (event.key === "Escape" && marked) hideCard();
  else if (event.key in steps && every.length && !event.ctrlKey && !event.metaKey && !event.altKey) {
    const element = every[Math.max(0, Math.min(every.length - 1, steps[event.key]))];
    element.scrollIntoView({ block: "nearest" });
    showCard(element);
    speak(wordsOf(pieces.get(element)));
  } else return;
  event.preventDefault();
}

// Turns

function askedElement(turn) {
  const text = made("div", { className: "text", textContent: turn.text });
  const under = made("div", { className: "under" }, button("Edit", () => edit(turn)));
  const title = made("h2", { textContent: served.chat ? "You" : "Prompt" });
  return made("article", { className: "turn asked" }, title, text, under);
}

function answerElement() {
  const title = made("h2", { textContent: served.chat ? $("model").value || served.model : "Continuation" });
  return made("article", { className: "turn answer" }, title);
}

/** Where tokens of an answer go: its text, or its thoughts. */
function textElement(turn, kind) {
  if (turn.places[kind]) return turn.places[kind];
  const text = made("div", { className: "text", tabIndex: 0 });
  text.setAttribute("role", "group");
  const words = kind === "thoughts" ? "Thoughts" : "Answer";
  text.setAttribute("aria-label", `${words}: the arrow keys walk through its tokens`);
  text.addEventListener("keydown", walk);
  text.addEventListener("blur", hideCard);
  turn.places[kind] = text;
  if (kind === "thoughts") {
    turn.element.append(made("details", { className: "thoughts", open: true }, made("summary", { textContent: words }), text));
  } else {
    if (turn.places.thoughts) turn.places.thoughts.parentElement.open = false;
    turn.element.append(text);
  }
  for (const place of Object.values(turn.places)) place.classList.toggle("last", place === text);
  return text;
}

function figuresOf(turn) {
  const said = [`${turn.tokens.toLocaleString("en")} ${turn.tokens === 1 ? "token" : "tokens"}`];
  const seconds = (turn.last - turn.first) / 1000;
  if (turn.tokens > 1 && seconds > 0) said.push(`${((turn.tokens - 1) / seconds).toFixed(1)} tokens/s`);
  if (turn.first) said.push(`first after ${((turn.first - turn.began) / 1000).toFixed(2)} s`);
  if (turn.reused) said.push(`${turn.reused.toLocaleString("en")} of ${turn.prompted.toLocaleString("en")} prompt tokens reused`);
  if (turn.end) said.push(turn.end);
  return said.join(" · ");
}

function underAnswer(turn) {
  turn.under?.remove();
  const copy = button("Copy", async () => {
    try {
      await navigator.clipboard.writeText(turn.text);
      copy.textContent = "Copied";
      setTimeout(() => (copy.textContent = "Copy"), 1500);
    } catch {
      copy.textContent = "The browser does not allow it";
    }
  });
  const again = button("Regenerate", regenerate);
  const figures = made("span", { className: "figures", textContent: turn.tokens || turn.end ? figuresOf(turn) : "" });
  turn.under = made("div", { className: "under" }, figures, ...(turn.text ? [copy] : []));
  if (turn === turns.at(-1)) turn.under.append(again);
  turn.element.append(turn.under);
}

function atEnd() {
  const log = $("log");
  return log.scrollHeight - log.scrollTop - log.clientHeight < 48;
}

function toEnd() {
  $("log").scrollTop = $("log").scrollHeight;
}

/** Drop a turn and all behind it. */
function dropFrom(turn) {
  hideCard();
  for (const dropped of turns.splice(turns.indexOf(turn))) dropped.element.remove();
  const last = turns.at(-1);
  if (last?.role === "assistant") underAnswer(last);
}

function regenerate() {
  const last = turns.at(-1);
  if (running || last?.role !== "assistant") return;
  dropFrom(last);
  answer();
  $("prompt").focus();
}

function edit(turn) {
  if (running) return;
  const [, text, under] = turn.element.children;
  const area = made("textarea", { value: turn.text, rows: Math.min(12, turn.text.split("\n").length + 1) });
  area.setAttribute("aria-label", "Edit what you wrote");
  const leave = () => {
    const again = askedElement(turn);
    turn.element.replaceWith(again);
    turn.element = again;
    again.querySelector("button").focus();
  };
  const send = () => {
    if (!area.value.trim() || running || invalid()) return;
    const words = area.value;
    dropFrom(turn);
    say(words);
    $("prompt").focus();
  };
  area.addEventListener("keydown", (event) => {
    if (event.key === "Escape") leave();
    else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) send();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  text.replaceWith(area);
  under.replaceChildren(button("Send", send), button("Cancel", leave));
  area.focus();
}

function say(words) {
  const turn = { role: "user", text: words };
  const last = turns.at(-1);
  turn.element = askedElement(turn);
  $("empty").hidden = true;
  $("log").append(turn.element);
  turns.push(turn);
  if (last) underAnswer(last); // which is not regenerated any more
  answer();
}

async function answer() {
  const before = [...turns];
  const turn = { role: "assistant", text: "", tokens: 0, places: {}, began: performance.now(), first: 0, last: 0, end: "" };
  turn.element = answerElement();
  turn.element.classList.add("running");
  turn.element.setAttribute("aria-busy", "true");
  $("log").append(turn.element);
  turns.push(turn);
  toEnd();
  running = new AbortController();
  showRunning();
  const waiting = [];
  let frame = 0;
  const draw = () => {
    frame = 0;
    const follows = atEnd();
    for (const { kind, text, tokens, ended } of waiting.splice(0)) {
      const place = textElement(turn, kind);
      place.append(tokens.length ? tokenElement({ text, tokens }, ended) : text);
    }
    underAnswer(turn);
    if (follows) toEnd();
  };
  try {
    textElement(turn, served.chat?.thinks ? "thoughts" : "text");
    const path = served.chat ? "v1/chat/completions" : "v1/completions";
    const response = await ask(path, requestOf(before), running.signal);
    for await (const document_ of documents(response)) {
      if (document_.usage) {
        turn.tokens = document_.usage.completion_tokens;
        turn.prompted = document_.usage.prompt_tokens;
        turn.reused = document_.usage.prompt_tokens_details?.cached_tokens ?? 0;
      }
      const [choice] = document_.choices;
      if (!choice) continue;
      const piece = pieceOf(choice);
      if (choice.finish_reason) turn.end = ENDS[choice.finish_reason] ?? choice.finish_reason;
      if (piece.kind === "text") turn.text += piece.text;
      if (piece.tokens.length) {
        turn.last = performance.now();
        turn.first ||= turn.last;
        turn.tokens += piece.tokens.length;
      }
      if (piece.text || piece.tokens.length) {
        waiting.push({ ...piece, ended: !piece.text && Boolean(choice.finish_reason) });
        frame ||= requestAnimationFrame(draw);
      }
    }
    speak("The answer is complete.");
  } catch (error) {
    if (error.name === "AbortError") {
      turn.end = "stopped";
      speak("Stopped.");
    } else {
      turn.wrong = error instanceof Refused ? error.message : `This page failed: ${error.message}`;
    }
  }
  cancelAnimationFrame(frame);
  running = null;
  turn.element.classList.remove("running");
  turn.element.removeAttribute("aria-busy");
  draw();
  if (turn.wrong) {
    for (const place of Object.values(turn.places)) {
      if (!place.hasChildNodes()) (place.closest("details") ?? place).remove();
    }
    const said = made("p", { className: "wrong", textContent: turn.wrong });
    said.setAttribute("role", "alert");
    turn.element.insertBefore(said, turn.under);
  } else if (!turn.places.text?.hasChildNodes() && !turn.places.thoughts?.hasChildNodes()) {
    textElement(turn, "text").append(made("span", { className: "note", textContent: "No text." }));
  }
  showRunning();
  countTokens();
  toEnd();
}

function showRunning() {
  const send = $("send");
  send.textContent = running ? "Stop" : "Send";
  send.classList.toggle("stop", Boolean(running));
}

// The composer and the settings

let counting = 0;

/** Say how many tokens a call would have, as the server counts them. */
function countTokens() {
  clearTimeout(counting);
  counting = setTimeout(async () => {
    const words = $("prompt").value;
    if (!served || served.labels.length) return;
    const all = [...turns, ...(words.trim() ? [{ role: "user", text: words }] : [])];
    const messages = messagesOf(all);
    const empty = served.chat ? !all.length : !words;
    if (empty) {
      $("count").textContent = "";
      return;
    }
    try {
      const response = await ask("tokenize", served.chat ? { messages } : { prompt: words });
      const { count, max_model_len: most } = await response.json();
      $("count").classList.toggle("over", count >= most);
      $("count").textContent = `${count.toLocaleString("en")} of ${most.toLocaleString("en")} tokens`;
    } catch {
      $("count").textContent = "";
    }
  }, 300);
}

function checkSchema() {
  let said = "";
  try {
    schemaOf();
  } catch (error) {
    said = `No JSON schema: ${error.message}`;
  }
  $("schema-said").textContent = said;
  $("schema").setAttribute("aria-invalid", String(Boolean(said)));
  return Boolean(said);
}

/** Tell whether a setting is none, and show which. */
function invalid() {
  const wrong = [...$("settings").elements].find((field) => !field.validity?.valid);
  if (!wrong && !checkSchema()) return false;
  const field = wrong ?? $("schema");
  showPanel(true);
  if (field.closest("details")) field.closest("details").open = true;
  field.focus();
  wrong?.reportValidity();
  return true;
}

function showPanel(shown) {
  document.body.classList.toggle("panel", shown);
  $("toggle").setAttribute("aria-expanded", String(shown));
  $("toggle").textContent = shown ? "Done" : "Settings";
}

function grow() {
  const area = $("prompt");
  area.style.height = "auto";
  area.style.height = `${area.scrollHeight + 2}px`;
}

function submit() {
  if (running) {
    running.abort();
    return;
  }
  const words = $("prompt").value;
  if (!served || !words.trim() || invalid()) return;
  $("prompt").value = "";
  grow();
  say(words);
}

// The package

function line(name, value, mono = false) {
  return value === "" || value === null || value === undefined
    ? []
    : [made("dt", { textContent: name }), made("dd", { textContent: value, className: mono ? "mono" : "" })];
}

const NAMES = { error_ratio: "Error beside PyTorch's own", kl_mean: "KL divergence", top1: "Same likeliest token", nmse: "NMSE", max_abs: "Largest error" };

function figure(value) {
  if (value === null) return "not finite";
  return Math.abs(value) >= 0.01 && Math.abs(value) < 1000 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
}

function gate(check) {
  const verdict = made("span", { className: check.passed ? "yes" : "no", textContent: check.passed ? "passed" : "failed" });
  const said = check.said ?? `${figure(check.found)}; ${check.at_least ? "at least" : "at most"} ${figure(check.limit)}; ${check.cases} cases`;
  const name = NAMES[check.name] ?? check.name.charAt(0).toUpperCase() + check.name.slice(1);
  return made("li", {}, made("span", { textContent: name }), verdict, made("span", { className: "said-of", textContent: said }));
}

function showPackage() {
  const about = served.about;
  const from = about && (about.source.kind === "demo" ? "demo model of olmo2-export" : about.source.model);
  $("package").replaceChildren(
    ...line("Variant", served.variant),
    ...line("Weights", about?.weights),
    ...line("Context", `${served.max_model_len.toLocaleString("en")} tokens`),
    ...line("From", from),
    ...line("Revision", about?.source.revision?.slice(0, 12), true),
    ...line("Layers", about && `${about.layers}, width ${about.hidden_size.toLocaleString("en")}`),
    ...line("Answers", served.exact ? "as if alone, to the bit" : ""),
    ...line("Checksum", about?.checksum.slice(0, 16), true),
  );
  const gates = about?.gates;
  const said = gates
    ? `Compared with PyTorch, and ${gates.passed ? "passed every gate" : "failed a gate"}:`
    : "Not compared with PyTorch: olmo2-export verify does that.";
  $("gates").replaceChildren(made("p", { textContent: said }));
  if (gates) $("gates").append(made("ul", {}, ...gates.checks.map(gate)));
  if (about?.parity_report) {
    const link = made("a", { href: "parity.json", target: "_blank", rel: "noopener", textContent: "Parity report (JSON)" });
    link.addEventListener("click", async (event) => {
      if (!key) return; // a link cannot bring one
      event.preventDefault();
      const blob = await (await ask("parity.json")).blob();
      open(URL.createObjectURL(blob));
    });
    $("gates").append(made("p", {}, link));
  }
}

async function showModels() {
  const { data } = await (await ask("v1/models")).json();
  $("model").replaceChildren(...data.map((model) => made("option", { value: model.id, textContent: model.id })));
  $("model-field").hidden = data.length < 2;
}

function showServed() {
  document.title = served.model;
  $("name").textContent = served.model;
  const gates = served.about?.gates;
  $("facts").textContent = served.variant + (gates ? (gates.passed ? ", verified" : ", failed its gates") : "");
  const scores = served.labels.length > 0;
  $("hello").textContent = scores
    ? "This package scores texts and makes none: POST /v1/score"
    : served.chat
      ? "Ask something."
      : "Begin a text, and the model goes on with it.";
  $("composer").hidden = scores;
  $("prompt-label").textContent = served.chat ? "Message" : "Beginning of a text";
  $("prompt").placeholder = served.chat ? "Write a message" : "Begin a text";
  $("max_tokens").placeholder = served.chat ? "As fit" : String(TEXT_TOKENS);
  for (const element of document.querySelectorAll(".of-chat")) element.hidden = !served.chat;
  $("form-field").hidden = !served.forms;
  const examples = scores ? [] : EXAMPLES[served.chat ? "chat" : "text"];
  $("examples").replaceChildren(
    ...examples.map((words) =>
      button(words, () => {
        $("prompt").value = words;
        grow();
        countTokens();
        $("prompt").focus();
      }),
    ),
  );
  showPackage();
}

async function load() {
  try {
    served = await (await ask("package")).json();
    await showModels();
    showServed();
  } catch (error) {
    served = null;
    $("hello").textContent = error.status === 401 ? "This server wants a key." : error.message;
    if (error.status === 401) {
      if (key) $("key-said").textContent = "The server does not know this key.";
      $("examples").replaceChildren(button("Give a key", askForKey));
    } else setTimeout(load, 1500); // the model is being loaded, or the server is away
  }
}

$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
$("prompt").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && !running) {
    event.preventDefault();
    submit();
  } else if (event.key === "Escape" && running) running.abort();
});
$("prompt").addEventListener("input", () => {
  grow();
  countTokens();
});
$("clear").addEventListener("click", () => {
  running?.abort();
  if (turns.length) dropFrom(turns[0]);
  $("empty").hidden = false;
  showPanel(false);
  countTokens();
  $("prompt").focus();
});
$("toggle").addEventListener("click", () => showPanel(!document.body.classList.contains("panel")));
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings").addEventListener("input", ({ target }) => {
  if ($(`${target.id}-value`)) $(`${target.id}-value`).textContent = Number(target.value).toFixed(2).replace(/0$/, "");
  if (target.id === "schema") checkSchema();
  if (target.id === "system") countTokens();
  if (target.id === "shade") $("log").classList.toggle("shade", target.checked);
});
$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = $("key").value.trim();
  $("key-dialog").close();
  load();
});
$("log").addEventListener("pointerover", ({ target }) => {
  const element = target.closest?.(".t");
  if (element) showCard(element);
});
$("log").addEventListener("pointerleave", (event) => {
  if (!$("card").contains(event.relatedTarget)) hideCard();
});
$("card").addEventListener("pointerleave", hideCard);
$("log").addEventListener("click", ({ target }) => {
  const element = target.closest?.(".t");
  if (element) showCard(element);
  else hideCard();
});
$("log").addEventListener("scroll", placeCard);
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  if (marked) hideCard();
  else if (document.body.classList.contains("panel")) showPanel(false);
});

load();
