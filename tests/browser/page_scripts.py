"""What tests run inside the page."""

from __future__ import annotations

# The indicator in the toolbar says "idle" as well before there is a kernel; what runs then is lost.
KERNEL = """
() => {
  const {session, kernelDisplayStatus} = window.jupyterapp.shell.currentWidget.context.sessionContext;
  return session?.kernel?.connectionStatus === 'connected' && kernelDisplayStatus === 'idle';
}
"""
# Of an element's text to all that is behind it. A canvas reads every way in which CSS writes colours.
CONTRAST = """
element => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3]));
  const layers = [];
  let opacity = 1;
  for (let at = element; at; at = at.parentElement) {
    const style = getComputedStyle(at);
    layers.unshift(rgba(style.backgroundColor));
    opacity *= Number(style.opacity);
  }
  const ground = layers.reduce((below, top) => over(top, below), [255, 255, 255]);
  const ink = rgba(getComputedStyle(element).color);
  const text = over([...ink.slice(0, 3), ink[3] * opacity], ground);
  const luminance = colour => {
    const [r, g, b] = colour.map(c => (c /= 255) <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const [high, low] = [luminance(text), luminance(ground)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}
"""
# Keeps what an output area showed, with its height, each time that it changed.
WATCH = """
area => {
  const seen = area.seen = [];
  const look = () => {
    const text = area.innerText;
    if (seen.at(-1)?.text !== text) seen.push({text, height: area.getBoundingClientRect().height});
  };
  new MutationObserver(look).observe(area, {childList: true, subtree: true, characterData: true});
}
"""
