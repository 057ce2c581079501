"""What a person does in the panel while a run goes on, and its figures are shown anew every second."""

from __future__ import annotations

import pytest
from attention_backends.devtools.server import Server
from browser import open_comfyui, ours, why_no_browser
from server_harness import ROOT
from test_panel import synthetic

pytestmark = [
    pytest.mark.comfy,
    pytest.mark.browser,
    pytest.mark.skipif(why_no_browser() is not None, reason=f"browser: {why_no_browser()}"),
]
SHOWN_AGAIN = """async ([base, run]) => {
  const { showRun, firstView } = await import(`${base}/run_view.js`)
  const style = Object.assign(document.createElement('link'), { rel: 'stylesheet', href: `${base}/panel.css` })
  const place = document.createElement('div')
  place.className = 'attention-backends'
  const ready = new Promise((resolve) => style.addEventListener('load', resolve))
  document.body.append(style, place)
  await ready
  const view = { ...firstView(), blocks: true }
  showRun(place, run, view, (key, values) => `${key} ${JSON.stringify(values)}`)
  place.querySelector('canvas').focus()
  const press = (key) => place.querySelector('canvas').dispatchEvent(new KeyboardEvent('keydown', { key }))
  for (const key of ['ArrowRight', 'ArrowRight', 'ArrowDown']) press(key)
  place.querySelector('.ab-scroll').scrollTop = 120
  const state = () => ({
    scrolled: place.querySelector('.ab-scroll').scrollTop,
    said: place.querySelector('.ab-heat .ab-caption').textContent,
    focused: document.activeElement === place.querySelector('canvas')
  })
  const before = state()
  showRun(place, structuredClone(run), view, (key, values) => `${key} ${JSON.stringify(values)}`)
  const after = state()
  press('ArrowRight')
  const next = state()
  place.remove()
  style.remove()
  return [before, after, next]
}"""


def test_newer_figures_leave_the_table_and_the_picture_where_they_are(server: Server) -> None:
    with open_comfyui(server.url) as page:
        run = {**synthetic(200), "state": "running"}
        before, after, then = page.evaluate(SHOWN_AGAIN, [f"/extensions/{ROOT.name}", run])
        assert before["scrolled"] == 120
        assert before["said"].startswith("strip.at_steps")
        assert '"where":"2"' in before["said"]
        assert after == {**before, "focused": True}
        assert '"where":"3"' in then["said"]
        assert ours(page) == []
