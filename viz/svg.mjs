// As much of a canvas's 2D context as scene.mjs uses, writing SVG: the picture for print is the one on the screen.

const round = (value) => Math.round(value * 100) / 100;
const escape = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

export class SvgContext {
  constructor(width, height) {
    Object.assign(this, { width, height, lineWidth: 1, fillStyle: "#000", strokeStyle: "#000", globalAlpha: 1 });
    Object.assign(this, { font: "12px sans-serif", textAlign: "left", lineCap: "butt" });
    this._parts = [];
    this._path = "";
    this._transform = "";
    this._saved = [];
    this._clips = 0;
    this._clip = "";
  }

  save() { this._saved.push([this._transform, this._clip]); }
  restore() { [this._transform, this._clip] = this._saved.pop(); }
  translate(x, y) { this._transform += `translate(${round(x)} ${round(y)})`; }
  rotate(angle) { this._transform += `rotate(${round((angle * 180) / Math.PI)})`; }

  beginPath() { this._path = ""; }
  moveTo(x, y) { this._path += `M${round(x)} ${round(y)}`; }
  lineTo(x, y) { this._path += `L${round(x)} ${round(y)}`; }
  quadraticCurveTo(a, b, x, y) { this._path += `Q${round(a)} ${round(b)} ${round(x)} ${round(y)}`; }
  closePath() { this._path += "Z"; }
  rect(x, y, w, h) { this._path += `M${round(x)} ${round(y)}h${round(w)}v${round(h)}h${round(-w)}Z`; }
  /** Whole circles only. */
  arc(x, y, r) {
    this._path += `M${round(x - r)} ${round(y)}a${round(r)} ${round(r)} 0 1 0 ${round(2 * r)} 0a${round(r)} ${round(r)} 0 1 0 ${round(-2 * r)} 0Z`;
  }

  fill() { this._add(`<path d="${this._path}" fill="${this.fillStyle}"`); }
  stroke() {
    const line = `stroke="${this.strokeStyle}" stroke-width="${round(this.lineWidth)}" stroke-linecap="${this.lineCap}"`;
    this._add(`<path d="${this._path}" fill="none" ${line}`);
  }
  fillRect(x, y, w, h) {
    this._add(`<rect x="${round(x)}" y="${round(y)}" width="${round(w)}" height="${round(h)}" fill="${this.fillStyle}"`);
  }
  fillText(text, x, y) {
    const [size, family] = [parseFloat(this.font), escape(this.font.slice(this.font.indexOf(" ") + 1))];
    const anchor = { left: "start", right: "end", center: "middle" }[this.textAlign];
    const style = `font-size="${size}" font-family="${family}" text-anchor="${anchor}" fill="${this.fillStyle}"`;
    this._add(`<text x="${round(x)}" y="${round(y)}" ${style}`, escape(text));
  }
  clip() {
    this._parts.push(`<clipPath id="c${++this._clips}"><path d="${this._path}"/></clipPath>`);
    this._clip = ` clip-path="url(#c${this._clips})"`;
  }

  _add(opening, text) {
    const alpha = this.globalAlpha < 1 ? ` opacity="${this.globalAlpha}"` : "";
    const transform = this._transform ? ` transform="${this._transform}"` : "";
    this._parts.push(`${opening}${alpha}${transform}${this._clip}${text === undefined ? "/>" : `>${text}</text>`}`);
  }

  /** The document; `background` fills it. */
  toString(background) {
    return (
      `<svg xmlns="http://www.w3.org/2000/svg" width="${this.width}" height="${this.height}" ` +
      `viewBox="0 0 ${this.width} ${this.height}"><rect width="100%" height="100%" fill="${background}"/>` +
      `${this._parts.join("\n")}</svg>`
    );
  }
}
