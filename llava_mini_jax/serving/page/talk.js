// The conversation on the page. All text goes in as text, never as markup.

import { preview } from "./media.js";

const turns = document.querySelector("#turns");

function element(name, className, text = "") {
  const made = document.createElement(name);
  made.className = className;
  made.textContent = text;
  return made;
}

/** Whether the reader is at the end, and wants to stay there while text comes in. */
function atEnd() {
  return turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
}

/** A question, and the place of its answer under it. */
export class Shown {
  constructor(question, medium) {
    this.asked = element("li", "asked");
    if (medium) this.asked.append(preview(medium));
    this.asked.append(element("p", "text", question));
    this.said = element("li", "said");
    this.said.setAttribute("aria-busy", "true");
    this.text = element("p", "text");
    this.note = element("p", "note", "Waiting for the first word …");
    this.said.append(this.text, this.note);
    turns.append(this.asked, this.said);
    turns.scrollTop = turns.scrollHeight;
  }

  add(piece) {
    const follow = atEnd();
    if (!this.text.textContent) this.note.textContent = "";
    this.text.append(piece);
    if (follow) turns.scrollTop = turns.scrollHeight;
  }

  end(note) {
    this.said.removeAttribute("aria-busy");
    this.note.textContent = note;
    turns.scrollTop = turns.scrollHeight;
  }

  fail(sentence) {
    this.end("");
    const told = element("p", "failed", sentence);
    told.setAttribute("role", "alert");
    this.said.append(told);
    turns.scrollTop = turns.scrollHeight;
  }

  remove() {
    this.asked.remove();
    this.said.remove();
  }
}

export function clear() {
  turns.replaceChildren();
}
