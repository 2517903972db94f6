// Images and videos: what a file is, how it is sent, and sent again by its name alone.

const FILM = /\.(mp4|m4v|mov|mkv|webm|avi|mpe?g)$/i;
const PICTURE = /\.(png|jpe?g|webp|gif|bmp)$/i;

/** A file as the conversation keeps it. Throws an Error, a sentence, for what is neither. */
export function mediumOf(file, mostBytes) {
  const film = file.type.startsWith("video/") || FILM.test(file.name);
  if (!film && !file.type.startsWith("image/") && !PICTURE.test(file.name)) {
    throw new Error(`${file.name} is neither an image nor a video.`);
  }
  // In base64 three bytes are four letters; some room is for the text around them.
  if (mostBytes && file.size * 4 / 3 + 20_000 > mostBytes) {
    const most = Math.floor((mostBytes - 20_000) * 0.75 / 2 ** 20);
    throw new Error(
      `${file.name} has ${megabytes(file.size)} MB; the server takes files of up to ${most} MB.`,
    );
  }
  return { file, film, uuid: randomName(), known: false, url: URL.createObjectURL(file), seen: null };
}

function megabytes(bytes) {
  return (bytes / 2 ** 20).toFixed(1);
}

export function randomName() {
  // Not crypto.randomUUID: that is missing where a server in the house is asked by plain http.
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  return Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** The part of a message that shows the medium; one that the server knows goes by its name. */
export async function partOf(medium, whole = !medium.known) {
  const kind = medium.film ? "video_url" : "image_url";
  const content = whole ? { url: await dataUrl(medium) } : null;
  return { type: kind, [kind]: content, uuid: medium.uuid };
}

function dataUrl(medium) {
  const { file, film } = medium;
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => {
      const type = file.type || (film ? "video/mp4" : "image/png");
      resolve(`data:${type};base64,${reader.result.slice(reader.result.indexOf(",") + 1)}`);
    };
    reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
    reader.readAsDataURL(file);
  });
}

/** An element that shows the medium; its name stands for what a browser cannot show. */
export function preview(medium, { controls = false } = {}) {
  const shown = document.createElement(medium.film ? "video" : "img");
  shown.src = medium.url;
  if (medium.film) {
    shown.muted = true;
    shown.playsInline = true;
    shown.controls = controls;
    shown.preload = "metadata";
    shown.setAttribute("aria-label", medium.file.name);
  } else {
    shown.alt = medium.file.name;
  }
  return shown;
}
