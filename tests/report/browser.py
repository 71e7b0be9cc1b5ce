"""Opens a page in headless Chromium and says what a reader would see; no package but a browser.

A harness page holds the page twice, in frames of a desktop's and of a phone's width, measures
what they show, and writes its findings into its own document, which Chromium prints.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
WIDTHS = (1440, 390)
_FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND",
    "--enable-logging=stderr",
    "--virtual-time-budget=20000",
    "--dump-dom",
)
_THEMES = {"dark": "preferredColorScheme=0", "light": "preferredColorScheme=1"}
_FINDINGS = re.compile(r'<pre id="findings">(.*?)</pre>', re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What the browser says of one page."""

    frames: dict[int, dict[str, Any]]
    """By width: background, figures, pale texts, smallest text, width of the document, requests;
    texts over another, legends over data; what a pointer is told; what links to numbers give; the
    table sorted and sorted back; and what is left in the figures of a variant that was hidden."""
    console: tuple[str, ...]
    """Lines of the console."""


def find_chromium() -> str | None:
    """Path of a Chromium, if one is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


def look(page: Path, theme: str, scratch: Path, widths: Sequence[int] = WIDTHS) -> Seen:
    """Open a page at several widths.

    Args:
        page: the HTML file.
        theme: `light` or `dark`.
        scratch: an empty folder for the harness and the browser's profile.
        widths: of the frames, CSS pixels.
    """
    chromium = find_chromium()
    assert chromium is not None
    scratch.mkdir(parents=True, exist_ok=True)
    harness = scratch / "harness.html"
    source = escape(page.read_text(encoding="utf-8"), quote=True)
    frames = "".join(
        f'<iframe width="{width}" height="1200" style="border:0" srcdoc="{source}"></iframe>'
        for width in widths
    )
    harness.write_text(
        f'<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">{frames}'
        f'<pre id="findings"></pre><script>{_SCRIPT}</script>',
        encoding="utf-8",
    )
    done = subprocess.run(
        [
            chromium,
            *_FLAGS,
            f"--user-data-dir={scratch / 'profile'}",
            f"--blink-settings={_THEMES[theme]}",
            harness.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    found = _FINDINGS.search(done.stdout)
    assert found, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    text = found.group(1).replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    assert text, f"the harness did not finish\n{done.stderr[-2000:]}"
    errors = [f["error"] for f in json.loads(text).values() if "error" in f]
    assert not errors, errors
    return Seen(
        frames={int(width): value for width, value in json.loads(text).items()},
        console=tuple(line for line in done.stderr.splitlines() if "CONSOLE" in line),
    )


_SCRIPT = """
const channel = value => (value /= 255) <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4;
const light = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
const parse = text => {
  const numbers = (text.match(/[\\d.]+/g) || []).map(Number);
  if (!text.startsWith('rgb')) throw new Error('unknown colour ' + text);
  return [numbers[0], numbers[1], numbers[2], numbers.length > 3 ? numbers[3] : 1];
};
const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
function ground(element, view) {
  const layers = [];
  for (let e = element; e; e = e.parentElement) {
    const color = parse(view.getComputedStyle(e).backgroundColor);
    if (color[3] > 0) layers.push(color);
    if (color[3] === 1) break;
  }
  return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255]);
}
function texts(page, view) {
  const pale = [];
  let smallest = 1e9;
  const walker = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    const unseen = 'style, script, title, [opacity="0"], #vg-tooltip-element';
    if (!node.data.trim() || element.closest(unseen)) continue;
    const range = page.createRange();
    range.selectNodeContents(node);
    if (!range.getClientRects().length) continue;
    const style = view.getComputedStyle(element), svg = element.closest('svg');
    const below = ground(element, view);
    const color = over(parse(svg ? style.fill : style.color), below);
    const pair = [light(color), light(below)].sort((a, b) => b - a);
    const contrast = (pair[0] + .05) / (pair[1] + .05);
    if (contrast < 4.5) pale.push([node.data.trim().slice(0, 40), contrast, style.color]);
    const scale = svg && svg.viewBox.baseVal.width
      ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
    smallest = Math.min(smallest, parseFloat(style.fontSize) * scale);
  }
  return {pale, smallest};
}
const boxes = (within, selector) => [...within.querySelectorAll(selector)]
  .map(element => [element, element.getBoundingClientRect()])
  .filter(([element, box]) => box.width && box.height && !element.closest('[opacity="0"]'));
const meet = (a, b) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1.5
  && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3;
function overlaps(page) {
  const found = [];
  for (const svg of page.querySelectorAll('.plot svg')) {
    const texts = boxes(svg, 'text');
    texts.forEach(([one, box], place) => texts.slice(place + 1).forEach(([other, rest]) => {
      if (meet(box, rest)) found.push([one.textContent, other.textContent,
        svg.closest('figure').id]);
    }));
  }
  return found;
}
const PANELS = '.role-frame.root > g > path.background, .role-scope.cell > g > path.background';
function panels(figure) {
  const svg = figure.querySelector('svg');
  if (!figure.querySelector('.plot')) return [];
  const cells = boxes(svg, '.role-scope.cell > g > path.background');
  return (cells.length ? cells : boxes(svg, PANELS)).map(([_, box]) => box);
}
function covered(page) {
  const legends = [...boxes(page, 'aside'), ...boxes(page, '.role-legend')];
  return [...page.querySelectorAll('figure')].flatMap(figure => panels(figure)
    .flatMap(panel => legends.filter(([_, box]) => meet(box, panel)).map(() => figure.id)));
}
function figures(page, view) {
  return [...page.querySelectorAll('figure')].map(figure => {
    const box = figure.getBoundingClientRect();
    const inside = figure.querySelector('.plot svg, .routed').getBoundingClientRect();
    return {key: figure.id, left: box.left, right: box.right, width: inside.width,
      height: inside.height, interactive: !!figure.querySelector('.plot svg.marks'),
      least: Math.min(1e9, ...panels(figure).map(panel => panel.height)),
      visible: figure.checkVisibility({opacityProperty: true, visibilityProperty: true})};
  });
}
const MOST_MARKS = 40;
async function hovered(page, view) {
  const told = {};
  for (const figure of page.querySelectorAll('figure:has(.plot)')) {
    const marks = boxes(figure, '.role-mark path').filter(([element]) =>
      element.getAttribute('aria-label') === null && element.__data__ !== undefined);
    told[figure.id] = [];
    const apart = Math.ceil(marks.length / MOST_MARKS);
    for (const [mark, box] of marks.filter((_, place) => place % apart === 0)) {
      const at = {bubbles: true, clientX: box.x + box.width / 2, clientY: box.y + box.height / 2};
      for (const kind of ['pointerover', 'pointermove', 'mousemove'])
        mark.dispatchEvent(new view.PointerEvent(kind, at));
      await new Promise(done => setTimeout(done, 0));
      const tip = page.querySelector('#vg-tooltip-element.visible');
      if (tip) told[figure.id].push(tip.textContent), tip.classList.remove('visible');
    }
  }
  return told;
}
async function downloaded(page, view) {
  const texts = {}, Plain = view.Blob;
  view.HTMLAnchorElement.prototype.click = () => {};
  for (const key of ['loss-by-domain', 'routed-text']) {
    const link = page.querySelector(`#${key} a.numbers`);
    const taken = new Promise(done => {
      view.Blob = class extends Plain {
        constructor(parts, options) {
          super(parts, options);
          if (options) done(parts[0]);  // a table to give, and no bytes to unpack
        }
      };
    });
    link.dispatchEvent(new view.MouseEvent('click', {bubbles: true, cancelable: true}));
    texts[key] = await taken;
  }
  return texts;
}
function sorted(page) {
  const heads = [...page.querySelectorAll('table.results thead th')];
  const place = heads.findIndex(head => head.textContent.startsWith('val loss'));
  return ['ascending', 'descending'].map(order => {
    heads[place].click();
    if (heads[place].getAttribute('aria-sort') !== order) throw new Error('not ' + order);
    return [...page.querySelector('table.results').tBodies[0].rows]
      .map(row => Number(row.cells[place].dataset.value));
  });
}
async function left(page, view) {
  const keys = [...page.querySelectorAll('button.key')], key = keys.at(-1);
  const name = key.dataset.variant, tint = key.querySelector('path').style.stroke;
  const parts = ['step-time-split', 'traffic'];  // their colours are those of parts
  const find = () => [...page.querySelectorAll('.plot svg')].flatMap(svg => {
    const own = svg.closest('figure').id, path = '.role-mark path';
    const marks = parts.includes(own) ? []
      : boxes(svg, `${path}[fill="${tint}"], ${path}[stroke="${tint}"]`);
    const texts = boxes(svg, 'text').filter(([text]) => text.textContent.startsWith(name));
    return marks.length + texts.length ? [own] : [];
  });
  const before = find();
  key.click();
  await view.etrReport.hide([], false);
  const after = find();
  key.click();
  await view.etrReport.hide([], false);
  return {name, before, after, again: find()};
}
async function examine(frame) {
  const page = frame.contentDocument, view = frame.contentWindow, report = view.etrReport;
  page.querySelectorAll('details').forEach(details => details.open = true);
  if (report) await report.showAll();
  const found = {
    background: view.getComputedStyle(page.body).backgroundColor,
    figures: figures(page, view),
    document_width: page.documentElement.scrollWidth,
    overlaps: overlaps(page),
    covered: covered(page),
    ...texts(page, view),
  };
  if (report) Object.assign(found, {sorted: sorted(page), told: await hovered(page, view),
    numbers: page.getElementById('routed-text') ? await downloaded(page, view) : null,
    left: page.querySelectorAll('button.key').length > 1 ? await left(page, view) : null});
  found.requests = view.performance.getEntriesByType('resource').map(entry => entry.name)
    .filter(name => !name.startsWith('data:'));
  return found;
}
window.addEventListener('load', async () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) {
    try { found[frame.width] = await examine(frame); }
    catch (error) { found[frame.width] = {error: String(error.stack)}; }
  }
  document.getElementById('findings').textContent = JSON.stringify(found);
});
"""
