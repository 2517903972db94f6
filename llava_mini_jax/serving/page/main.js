// The page: what is asked, in which conversation, and in which state the page is.
//
//   a file, a question --ask--> messages --api.js--> chunks --talk.js--> text on the page
//                                                       '--usage--> panel.js: heat map, figures

import * as api from "./api.js";
import { mediumOf, partOf, preview } from "./media.js";
import * as panel from "./panel.js";
import * as talk from "./talk.js";
import { line } from "./figures.js";

const $ = (id) => document.querySelector(`#${id}`);
const RETRY_MS = 3000;

let history = []; // whole exchanges: {question, medium, answer}
let attached = null; // the file of the next question
let broken = null; // an exchange without an answer, which the next question takes away
let running = null; // AbortController of the answer that is coming
let about = null; // what the server says of its model
let afterKey = connect; // what is tried again once there is a key
let timer = 0; // of the next look for a server that is not there

// ------------------------------------------------------------------------------ connection

async function connect() {
  const state = await api.state();
  $("connection").dataset.state = state;
  $("connection").textContent =
    { ready: "Ready", waiting: "The server is starting or stopping …", gone: "Not connected" }[state];
  if (state !== "ready") return retry();
  try {
    about = await api.getJson("about");
    $("model").textContent = about.model;
    panel.know(about);
  } catch (error) {
    failed(error, connect);
  }
}

/** What an error means for the whole page; its sentence is told where it happened. */
function failed(error, again) {
  if (error.status === 401) askForKey(again, error.message);
  else if (error.status === 0 || error.status === 503) {
    $("connection").dataset.state = "gone";
    $("connection").textContent = "Not connected";
    retry();
  }
}

function retry() {
  clearTimeout(timer);
  timer = setTimeout(connect, RETRY_MS);
}

function askForKey(again, message) {
  afterKey = again ?? connect;
  $("key-problem").textContent = message;
  // The first time nobody has given a key yet: that one is wanted is said above the field.
  $("key-problem").hidden = !$("key-value").value;
  if (!$("key").open) $("key").showModal();
}

$("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  api.setKey($("key-value").value);
  $("key").close();
  afterKey();
});
$("key-cancel").addEventListener("click", () => $("key").close());

// ------------------------------------------------------------------------------------ files

function attach(file) {
  problem("");
  try {
    setAttached(mediumOf(file, about?.body_bytes));
  } catch (error) {
    problem(error.message);
  }
  $("question").focus();
}

function setAttached(medium) {
  attached = medium;
  $("chip").hidden = !medium;
  $("thumb").replaceChildren(...(medium ? [preview(medium)] : []));
  $("name").textContent = medium?.file.name ?? "";
  if (medium) panel.see(medium);
}

function problem(sentence) {
  $("problem").textContent = sentence;
  $("problem").hidden = !sentence;
}

for (const id of ["choose", "first"]) $(id).addEventListener("click", () => $("file").click());
$("file").addEventListener("change", () => {
  if ($("file").files.length) attach($("file").files[0]);
  $("file").value = ""; // so that the same file can be chosen again
});
$("remove").addEventListener("click", () => {
  setAttached(null);
  panel.see(history.findLast((exchange) => exchange.medium)?.medium ?? null);
  $("question").focus();
});

const hasFiles = (event) => event.dataTransfer?.types.includes("Files");
let inside = 0; // how many elements deep a file is being dragged
addEventListener("dragenter", (event) => {
  if (hasFiles(event)) document.body.classList.toggle("dragging", ++inside > 0);
});
addEventListener("dragleave", (event) => {
  if (hasFiles(event)) document.body.classList.toggle("dragging", --inside > 0);
});
addEventListener("dragover", (event) => {
  if (hasFiles(event)) event.preventDefault();
});
addEventListener("drop", (event) => {
  if (!hasFiles(event)) return;
  event.preventDefault();
  inside = 0;
  document.body.classList.remove("dragging");
  attach(event.dataTransfer.files[0]);
});
addEventListener("paste", (event) => {
  const file = event.clipboardData?.files[0];
  if (!file) return;
  event.preventDefault();
  attach(file);
});

// ---------------------------------------------------------------------------------- questions

/** The messages of exchanges and of the question that is asked now. `whole`: no uuid alone. */
async function messages(exchanges, whole) {
  const found = [];
  for (const { question, medium, answer } of exchanges) {
    const content = medium ? [await partOf(medium, whole || undefined)] : [];
    found.push({ role: "user", content: [...content, { type: "text", text: question }] });
    if (answer !== undefined) found.push({ role: "assistant", content: answer });
  }
  return found;
}

async function* answerOf(exchanges, signal) {
  const options = {
    stream: true,
    stream_options: { include_usage: true },
    include_metrics: true,
    temperature: 0, // so that the same question has the same answer
  };
  try {
    yield* api.chunks({ ...options, messages: await messages(exchanges, false) }, signal);
  } catch (error) {
    const known = exchanges.map(({ medium }) => medium).filter((medium) => medium?.known);
    if (error.status !== 404 || !known.length) throw error;
    // The server has forgotten an image, or is another one: it is sent once more.
    for (const medium of known) medium.known = false;
    yield* api.chunks({ ...options, messages: await messages(exchanges, false) }, signal);
  }
}

async function ask() {
  const question = $("question").value.trim();
  if (running || !question) return;
  problem("");
  broken?.remove();
  broken = null;
  const exchange = { question, medium: attached, answer: undefined };
  const shown = new talk.Shown(question, attached);
  $("question").value = "";
  setAttached(null);
  busy(new AbortController());
  let usage = null, metrics = null, said = "";
  try {
    for await (const chunk of answerOf([...history, exchange], running.signal)) {
      const piece = chunk.choices[0]?.delta?.content ?? "";
      said += piece;
      if (piece) shown.add(piece);
      if (chunk.usage && !chunk.choices.length) [usage, metrics] = [chunk.usage, chunk.metrics ?? {}];
    }
    finish(exchange, shown, said, usage, metrics, false);
  } catch (error) {
    if (error.name === "AbortError" && said) finish(exchange, shown, said, null, null, true);
    else give_back(exchange, shown, error);
  } finally {
    busy(null);
  }
}

function finish(exchange, shown, said, usage, metrics, stopped) {
  exchange.answer = said;
  history.push(exchange);
  for (const { medium } of history) if (medium) medium.known = true;
  shown.end(line(metrics, stopped));
  $("anew").hidden = false;
  if (!usage) return;
  const asked = [...history.slice(0, -1), { ...exchange, answer: undefined }];
  panel.tell(usage, metrics, {
    pictures: asked.some(({ medium }) => medium),
    body: async () => ({
      messages: await messages(asked, true),
      max_completion_tokens: usage.completion_tokens,
    }),
  });
}

/** A question without an answer goes back to where it was typed. */
function give_back(exchange, shown, error) {
  broken = shown;
  if (!$("question").value) $("question").value = exchange.question;
  if (exchange.medium && !attached) setAttached(exchange.medium);
  if (error.name === "AbortError") return shown.end("Stopped before the first word");
  shown.fail(error.message);
  failed(error, ask);
}

function busy(controller) {
  running = controller;
  // Focus goes with the button that takes the other one's place.
  const focused = [$("send"), $("stop")].includes(document.activeElement);
  $("empty").hidden = true;
  $("send").hidden = Boolean(controller);
  $("stop").hidden = !controller;
  if (focused) $(controller ? "stop" : "send").focus();
}

$("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  ask();
});
$("question").addEventListener("keydown", (event) => {
  // While a word is being composed (Japanese, Chinese), Enter ends the word.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask();
});
$("stop").addEventListener("click", () => running?.abort());
addEventListener("keydown", (event) => {
  if (event.key === "Escape" && !$("key").open) running?.abort();
});
$("anew").addEventListener("click", () => {
  running?.abort();
  [history, broken] = [[], null];
  api.beginConversation();
  talk.clear();
  setAttached(null);
  panel.forget();
  $("empty").hidden = false;
  $("anew").hidden = true;
  $("question").focus();
});

panel.begin((error) => failed(error));
connect();
