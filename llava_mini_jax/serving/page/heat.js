// The heat map: what the compressor's queries looked at, over the image as the model reads it.

// Dark violet over red to light yellow: read in grey as well as in colour, and by the colour-blind.
const STOPS = [[13, 8, 45], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]];
const STRONGEST = 0.82; // how much the map covers of the image where it is highest
const SIDE = 512; // pixels that are drawn, at least: a small model's images are a few wide

function colour(share) {
  const place = Math.min(Math.max(share, 0), 1) * (STOPS.length - 1);
  const low = Math.min(Math.floor(place), STOPS.length - 2);
  return STOPS[low].map((from, i) => from + (STOPS[low + 1][i] - from) * (place - low));
}

/** Draws a frame of /look on a canvas; resolves when it is there. */
export async function draw(canvas, frame) {
  const picture = await createImageBitmap(blobOf(frame.picture));
  const larger = Math.max(1, SIDE / picture.width);
  canvas.width = picture.width * larger;
  canvas.height = picture.height * larger;
  const context = canvas.getContext("2d");
  context.imageSmoothingQuality = "high";
  context.drawImage(picture, 0, 0, canvas.width, canvas.height);
  context.drawImage(mapOf(frame.grid), 0, 0, canvas.width, canvas.height);
}

/** A canvas with a pixel for each patch. */
function mapOf(grid) {
  const small = document.createElement("canvas");
  [small.width, small.height] = [grid[0].length, grid.length];
  const context = small.getContext("2d");
  const image = context.createImageData(small.width, small.height);
  const values = grid.flat();
  const highest = Math.max(...values);
  values.forEach((value, i) => {
    const share = highest ? value / highest : 0;
    image.data.set([...colour(share), 255 * (0.25 + (STRONGEST - 0.25) * share)], 4 * i);
  });
  context.putImageData(image, 0, 0);
  return small;
}

/** Data URLs become blobs here, so that the page's policy need not allow them as addresses. */
function blobOf(dataUrl) {
  const [head, letters] = dataUrl.split(",");
  const bytes = Uint8Array.from(atob(letters), (letter) => letter.charCodeAt(0));
  return new Blob([bytes], { type: head.slice(5).split(";")[0] });
}

/** How much of all attention the strongest patch has, beside an even share, as a sentence. */
export function told(frame) {
  const values = frame.grid.flat();
  const highest = Math.max(...values);
  return `The strongest of ${values.length} patches has ${percent(highest)} of the attention; ` +
    `an even share is ${percent(1 / values.length)}.`;
}

function percent(share) {
  return `${(100 * share).toLocaleString("en", { maximumSignificantDigits: 2 })}\u00a0%`;
}
