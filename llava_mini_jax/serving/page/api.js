// What the page asks of the server: JSON, and answers as they stream.

import { randomName } from "./media.js";

const KEY = "llava-mini key";
let conversation = randomName();

/** An error that the server told, or that it could not be asked at all (status 0). */
export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export function setKey(key) {
  // The tab's own store: another tab, or the next visit, asks again.
  sessionStorage.setItem(KEY, key);
}

/** Several servers behind one address may go by it: what one of them has seen it need not see again. */
export function beginConversation() {
  conversation = randomName();
}

async function ask(path, options = {}) {
  const headers = new Headers(options.headers);
  headers.set("X-Session-Affinity", conversation);
  const key = sessionStorage.getItem(KEY);
  if (key) headers.set("Authorization", `Bearer ${key}`);
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ServerError("The server cannot be reached. Retrying …", 0);
  }
  if (response.ok) return response;
  throw new ServerError(await sentence(response), response.status);
}

/** The sentence of an error in OpenAI's shape, or one by its status. */
async function sentence(response) {
  try {
    return String((await response.json()).error.message);
  } catch {
    return `The server answered with status ${response.status}.`;
  }
}

function post(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  return ask(path, { method: "POST", headers, body: JSON.stringify(body), signal });
}

export async function getJson(path) {
  return (await ask(path)).json();
}

export async function postJson(path, body) {
  return (await post(path, body)).json();
}

/** Whether the server takes questions: "ready", "waiting" (it starts, or drains) or "gone". */
export async function state() {
  try {
    return (await fetch("ready", { cache: "no-store" })).ok ? "ready" : "waiting";
  } catch {
    return "gone";
  }
}

/** The chunks of a streamed answer. Throws ServerError for an error event, and for a torn stream. */
export async function* chunks(body, signal) {
  const response = await post("v1/chat/completions", body, signal);
  for await (const data of events(response.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ServerError(String(chunk.error.message), 200);
    yield chunk;
  }
  throw new ServerError("The connection was lost before the answer was complete.", 0);
}

/** The data of server-sent events; comments, which keep the connection alive, are left out. */
async function* events(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      return; // torn: the end that `chunks` waits for is missing
    }
    if (part.done) return;
    const found = (waiting + part.value).split(/\r?\n\r?\n/);
    waiting = found.pop();
    for (const event of found) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (lines.length) yield lines.map((line) => line.slice(5).trimStart()).join("\n");
    }
  }
}
