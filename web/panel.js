/**
 * The sidebar tab: the runs and this machine. It asks the server again and again while something runs, so every tab
 * shows the same and a lost answer heals itself.
 */

import { shortLine } from './account.js'
import { element, refill } from './dom.js'
import { copyButton, machineView } from './machine_view.js'
import { measuredSection } from './measured_view.js'
import { firstView, showRun } from './run_view.js'
import { Refused } from './server.js'

/**
 * @typedef {import('./server.js').RunSummary} RunSummary
 * @typedef {import('./server.js').Server} Server
 * @typedef {import('./words.js').Say} Say
 */

const WHILE_RUNNING = 1000
const WITHOUT_CONNECTION = 3000
/** Events of ComfyUI after which there may be something new. */
const EVENTS = /** @type {const} */ ([
  'status', 'execution_start', 'execution_success', 'execution_error', 'execution_interrupted', 'reconnected'
])

/** Those after which a run may have measured something. */
const OVER = ['execution_success', 'execution_error', 'execution_interrupted', 'reconnected']

/**
 * Opens the panel in `place`.
 *
 * @param {HTMLElement} place
 * @param {import('@comfyorg/comfyui-frontend-types').ComfyApi} events ComfyUI's events
 * @param {Server} server
 * @param {Say} say
 * @returns {{ element: HTMLElement, close: () => void }}
 */
export function openPanel(place, events, server, say) {
  const status = element('p', { className: 'ab-status', role: 'status' })
  const runs = element('ul', { className: 'ab-runs' })
  const machine = element('div', {}, element('p', { className: 'ab-caption' }, say('machine.asking')))
  const measured = measuredSection(server, say)
  const root = element(
    'div',
    { className: 'attention-backends', role: 'region', 'aria-label': say('panel.title') },
    element('link', { rel: 'stylesheet', href: new URL('./panel.css', import.meta.url).href }),
    element('h2', {}, say('panel.title')),
    status,
    element(
      'section',
      { 'aria-labelledby': 'ab-runs-title' },
      element('h3', { id: 'ab-runs-title' }, say('runs.title')),
      runs
    ),
    element(
      'section',
      { 'aria-labelledby': 'ab-measured-title' },
      element('h3', { id: 'ab-measured-title' }, say('measured.title')),
      measured.element
    ),
    element(
      'section',
      { 'aria-labelledby': 'ab-machine-title' },
      element('h3', { id: 'ab-machine-title' }, say('machine.title')),
      machine,
      element(
        'div',
        { className: 'ab-buttons' },
        element('button', {
          type: 'button', className: 'ab-button', textContent: say('machine.refresh'), 'data-key': 'refresh',
          on: { click: () => showMachine(true) }
        }),
        copyButton(say('copy.bug_report'), 'bug report', () => server.bugReport(), say)
      )
    )
  )

  /** @type {Map<number, { view: import('./run_view.js').View, place: HTMLElement, seen: string }>} */
  const open = new Map()
  let [numbering, listed, newest] = ['', '', -1]
  let busy = false
  let closed = false
  let asking = false
  let askAgain = false
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer

  async function showMachine(refresh = false) {
    try {
      const found = await server.machine(refresh)
      if (refresh) server.forget()
      if (!closed) refill(machine, ...machineView(found, say))
    } catch (error) {
      const why = error instanceof Refused ? error.message : say('panel.lost')
      if (!closed) refill(machine, element('p', { className: 'ab-hint' }, why))
    }
  }

  /** Asks for the runs; again after a while as long as something runs or the server does not answer. */
  async function update() {
    if (asking) {
      askAgain = true
      return
    }
    clearTimeout(timer)
    asking = true
    let wait = 0
    try {
      const answer = await server.runs()
      if (closed) return
      if (numbering && numbering !== answer.numbering) {
        open.clear() // the server was started again: its numbers mean other runs
        newest = -1
        server.forget()
        showMachine()
      }
      numbering = answer.numbering
      showList(answer.runs)
      measured.newest(answer.runs[0])
      await Promise.all(answer.runs.filter((run) => open.has(run.number)).map(showOpen))
      const running = answer.runs.filter((run) => run.state === 'running').length
      status.textContent = running ? say('panel.running') : ''
      wait = busy || running ? WHILE_RUNNING : 0
    } catch (error) {
      status.textContent = error instanceof Refused ? error.message : say('panel.lost')
      wait = WITHOUT_CONNECTION
    } finally {
      asking = false
    }
    if (closed) return
    if (askAgain) {
      askAgain = false
      update()
    } else if (wait) {
      timer = setTimeout(update, wait)
    }
  }

  /** @param {RunSummary[]} found */
  function showList(found) {
    const kept = new Set(found.map((run) => run.number))
    for (const number of open.keys()) if (!kept.has(number)) open.delete(number)
    const first = found[0]
    if (first && first.number > newest) {
      if (newest < 0 || open.has(newest)) {
        open.delete(newest)
        open.set(first.number, { view: firstView(), place: element('div', { className: 'ab-run' }), seen: '' })
      }
      newest = first.number
    }
    const now = JSON.stringify([found, [...open.keys()]])
    if (now === listed) return
    listed = now
    refill(runs, ...(found.length ? found.map(entry) : [element('li', { className: 'ab-caption' }, say('runs.none'))]))
  }

  /** @param {RunSummary} run */
  function entry(run) {
    const shown = open.get(run.number)
    const toggle = () => {
      if (!open.delete(run.number)) {
        open.set(run.number, { view: firstView(), place: element('div', { className: 'ab-run' }), seen: '' })
      }
      update()
    }
    const line = shortLine(run.totals, run.fallbacks, run.outcome, say)
    const kind = run.outcome?.kind ?? run.state
    const seconds = run.seconds === null ? '' : `, ${run.seconds.toFixed(1)} s`
    return element(
      'li',
      {},
      element(
        'button',
        {
          type: 'button', className: 'ab-toggle', 'aria-expanded': Boolean(shown), 'data-key': `run ${run.number}`,
          on: { click: toggle }
        },
        element('span', { className: `ab-state ab-${run.state} ab-${kind}` }, say(`state.${kind}`)),
        element('strong', {}, `${run.number}. ${run.model || '?'}`),
        element('span', {}, `${say('runs.steps', { steps: run.steps })}${seconds}`),
        !shown && element('span', { className: 'ab-line' }, line)
      ),
      shown && shown.place
    )
  }

  /** @param {RunSummary} summary */
  async function showOpen(summary) {
    const shown = open.get(summary.number)
    const now = JSON.stringify(summary)
    if (!shown || shown.seen === now) return
    const { run } = await server.run(summary.number)
    if (closed || open.get(summary.number) !== shown) return
    shown.seen = now
    showRun(shown.place, run, shown.view, say)
  }

  const onEvent = (/** @type {Event} */ event) => {
    const left = event instanceof CustomEvent ? event.detail?.exec_info?.queue_remaining : undefined
    if (typeof left === 'number') busy = left > 0
    update()
    if (OVER.includes(event.type)) measured.update()
  }
  for (const name of EVENTS) events.addEventListener(name, onEvent)
  place.replaceChildren(root)
  update()
  measured.update()
  showMachine()
  return {
    element: root,
    close() {
      closed = true
      clearTimeout(timer)
      for (const name of EVENTS) events.removeEventListener(name, onEvent)
      root.remove()
    }
  }
}
