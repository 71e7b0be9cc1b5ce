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
WIDTHS = (1280, 390)
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
    """By width: background, figures, pale texts, smallest text, width of the document, requests."""
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
    if (!node.data.trim() || element.closest('style, script, title')) continue;
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
function figures(page, view) {
  return [...page.querySelectorAll('figure')].map(figure => {
    const box = figure.getBoundingClientRect();
    const inside = figure.querySelector('svg, .routed').getBoundingClientRect();
    return {key: figure.id, left: box.left, right: box.right, width: inside.width,
      height: inside.height, visible: figure.checkVisibility({opacityProperty: true,
        visibilityProperty: true})};
  });
}
function examine(frame) {
  const page = frame.contentDocument, view = frame.contentWindow;
  page.querySelectorAll('details').forEach(details => details.open = true);
  return {
    background: view.getComputedStyle(page.body).backgroundColor,
    figures: figures(page, view),
    document_width: page.documentElement.scrollWidth,
    requests: view.performance.getEntriesByType('resource').map(entry => entry.name)
      .filter(name => !name.startsWith('data:')),
    ...texts(page, view),
  };
}
window.addEventListener('load', () => {
  const found = {};
  for (const frame of document.querySelectorAll('iframe')) found[frame.width] = examine(frame);
  document.getElementById('findings').textContent = JSON.stringify(found);
});
"""
