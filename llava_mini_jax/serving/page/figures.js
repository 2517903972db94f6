// What an answer took, in tokens and milliseconds, and LLaVA-1.5 beside it.

function ms(value) {
  if (value === null || value === undefined) return "–";
  const digits = value < 10 ? { maximumSignificantDigits: 2 } : { maximumFractionDigits: 0 };
  return `${value.toLocaleString("en", digits)} ms`;
}

function count(value) {
  return value === null || value === undefined ? "–" : value.toLocaleString("en");
}

/** Rows of the list beside an answer, from its usage and its times. */
export function ofAnswer(usage, metrics) {
  const details = usage.prompt_tokens_details ?? {};
  const image = details.image_tokens ?? 0;
  const cached = details.cached_tokens ?? 0;
  const rows = [
    ["Image tokens", count(image)],
    ["Positions read", cached ? `${count(usage.prompt_tokens)}, ${count(cached)} from memory` : count(usage.prompt_tokens)],
    ["Vision", metrics.frames_recalled < metrics.frames ? ms(metrics.vision_ms) : "from memory"],
    ["Pre-fusion", ms(metrics.prefusion_ms)],
    ["First token", ms(metrics.time_to_first_token_ms)],
    ["Each token", ms(metrics.mean_itl_ms)],
    ["Tokens of the answer", count(usage.completion_tokens)],
  ];
  return metrics.frames ? rows : rows.filter(([name]) => !["Vision", "Pre-fusion", "Image tokens"].includes(name));
}

/** The line under an answer. */
export function line(metrics, stopped) {
  const first = ms(metrics?.time_to_first_token_ms);
  const told = !metrics ? [] : metrics.frames_recalled ? [`Answered from memory: ${first}`] : [`First token after ${first}`];
  return [...told, ...(stopped ? ["Stopped"] : [])].join(" · ");
}

const COMPARED = [
  ["Image tokens", "image_tokens", count],
  ["Positions", "positions", count],
  ["Vision", "vision_ms", ms],
  ["Pre-fusion", "prefusion_ms", ms],
  ["First token", "first_token_ms", ms],
  ["Each token", "token_ms", ms],
];

/** Fills a table's body with both sides of /compare, a bar behind each time. */
export function fillComparison(body, { mini, baseline }) {
  body.replaceChildren(...COMPARED.map(([name, field, write]) => {
    const row = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    const most = Math.max(mini[field] ?? 0, baseline[field] ?? 0);
    row.append(head, ...[mini, baseline].map((side) => cell(side[field], most, write)));
    return row;
  }));
}

function cell(value, most, write) {
  const made = document.createElement("td");
  const text = document.createElement("span");
  text.textContent = write(value);
  const bar = document.createElement("i");
  // By the style object: the page's policy forbids styles that are written into the markup.
  bar.style.width = most ? `${(100 * (value ?? 0)) / most}%` : "0";
  made.append(text, bar);
  return made;
}
