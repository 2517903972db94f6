// Beside the conversation: the image with its heat map, and what the answer took.

import { postJson } from "./api.js";
import * as figures from "./figures.js";
import * as heat from "./heat.js";
import { partOf, preview } from "./media.js";

const $ = (id) => document.querySelector(`#${id}`);
let medium = null; // the one that is shown
let about = null; // what the server says of its model
let last = null; // the exchange whose figures are shown: {body, tokens}
let failed = () => {}; // told of errors of the panel's own requests

export function begin(onError) {
  failed = onError;
  $("look").addEventListener("click", toggle);
  $("compare").addEventListener("click", compare);
  $("frame-number").addEventListener("input", show);
}

export function know(server) {
  about = server;
  $("look").hidden = !about.look;
  $("beside").hidden = !about.compare;
  $("beside-note").textContent =
    `The same weights, with all ${about.patches} patches in front of the language model and no ` +
    "pre-fusion. They were not trained for that: you see its times, not its text.";
}

/** Shows another image or video, or none. */
export function see(other) {
  medium = other;
  $("seen").hidden = !medium;
  $("look").setAttribute("aria-pressed", "false");
  if (medium) $("seen-name").textContent = medium.film ? "The video" : "The image";
  return show();
}

/** The figures of an answer; `exchange` is what /compare is asked about. */
export function tell(usage, metrics, exchange) {
  last = exchange;
  $("figures").hidden = false;
  $("own").replaceChildren(...figures.ofAnswer(usage, metrics).flatMap(([name, value]) => {
    const [term, description] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, description.textContent] = [name, value];
    return [term, description];
  }));
  $("comparison").hidden = true;
  $("measured").textContent = "";
  // Without an image both sides are the same language model.
  $("beside").hidden = !about?.compare || !exchange.pictures;
}

export function forget() {
  last = null;
  $("figures").hidden = true;
  see(null);
}

async function toggle() {
  const pressed = $("look").getAttribute("aria-pressed") !== "true";
  $("look").setAttribute("aria-pressed", String(pressed));
  const shown = medium;
  if (pressed && !shown.seen) {
    $("seen-note").textContent = "Looking …";
    $("look").disabled = true;
    try {
      // The body is chat's, which has a text; the map does not depend on it.
      const content = [await partOf(shown, true), { type: "text", text: "look" }];
      shown.seen = await postJson("look", { messages: [{ role: "user", content }] });
    } catch (error) {
      $("look").setAttribute("aria-pressed", "false");
      if (shown === medium) $("seen-note").textContent = error.message;
      failed(error);
      return;
    } finally {
      $("look").disabled = false;
      $("look").focus();
    }
  }
  if (shown === medium) await show();
}

async function show() {
  const pressed = $("look").getAttribute("aria-pressed") === "true";
  const frames = pressed ? medium?.seen?.frames ?? [] : [];
  $("frame").hidden = frames.length < 2;
  $("seen-note").textContent = "";
  if (!frames.length) {
    $("stage").replaceChildren(...(medium ? [preview(medium, { controls: true })] : []));
    return;
  }
  $("frame-number").max = frames.length - 1;
  const number = Math.min(Number($("frame-number").value), frames.length - 1);
  $("frame-name").textContent = `Frame ${frames[number].frame + 1} of ${medium.seen.count}`;
  let canvas = $("stage").querySelector("canvas");
  if (!canvas) {
    canvas = document.createElement("canvas");
    canvas.setAttribute("role", "img");
    $("stage").replaceChildren(canvas);
  }
  canvas.setAttribute("aria-label", `Heat map over ${medium.file.name}`);
  $("seen-note").textContent = `${heat.told(frames[number])} ${medium.seen.note ?? ""}`.trim();
  await heat.draw(canvas, frames[number]);
}

async function compare() {
  const exchange = last;
  $("compare").disabled = true;
  $("measured").textContent = "Measuring both sides; the first time, programs are compiled …";
  try {
    const found = await postJson("compare", await exchange.body());
    if (exchange !== last) return;
    figures.fillComparison($("comparison").tBodies[0], found);
    $("comparison").hidden = false;
    $("measured").textContent =
      `Median of ${found.repeats} in turns, each token over ${found.tokens} of an answer; ` +
      "nothing came from memory.";
    $("measured").scrollIntoView({ block: "nearest" });
  } catch (error) {
    if (exchange === last) $("measured").textContent = error.message;
    failed(error);
  } finally {
    $("compare").disabled = false;
    $("compare").focus();
  }
}
