// Words in the cells of a Bokeh plot: as many columns in view as can be read, each word as far as its cell has room.
const INSET = 2;  // pixels of a cell that stay free

/** The columns in view, [first, behind the last], of `columns` in `width` pixels: at least `least` for each. */
export function inView(columns, width, least) {
  const fitting = Math.max(1, Math.floor(width / least));
  return fitting >= columns ? [0, columns] : [columns - fitting, columns];
}

/** A word cut to `room` pixels; empty where one letter and the sign of the cut are too wide. */
export function cut(word, room, measure) {
  if (measure(word) <= room) return word;
  const letters = Array.from(word);
  while (letters.length > 1) {
    letters.pop();
    const shown = letters.join("") + "…";
    if (measure(shown) <= room) return shown;
  }
  return "";
}

const laid = new WeakMap();  // plot → [its width, room of a cell] when it was last seen to; not sent to the server

/** strip: what shows the other columns; hidden while there are none. */
export default ({plot, written, words, columns, least, font, strip}) => {
  const width = plot.inner_width, range = plot.x_range;
  if (!(width > 0)) return;
  const [before, had] = laid.get(plot) ?? [];
  if (before !== width) {  // first laid out, or of another width: a reader's own window is set again
    laid.set(plot, [width]);
    const [first, end] = inView(columns, width, least);
    range.setv({start: first - 0.5, end: end - 0.5});
    strip.visible = first > 0;
  }
  const room = Math.round(width / (range.end - range.start)) - INSET;
  if (had === room && before === width) return;  // moved sideways: nothing is written anew
  laid.set(plot, [width, room]);
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  context.font = font;
  const known = new Map();
  const measure = (word) => {
    if (!known.has(word)) known.set(word, context.measureText(word).width);
    return known.get(word);
  };
  const shown = written.data.word;
  for (let i = 0; i < words.length; i++) shown[i] = cut(words[i], room, measure);
  written.change.emit();
};
