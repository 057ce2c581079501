/**
 * The sidebar tab: the runs and this machine. It asks the server again and again while something runs, so every tab
 * shows the same and a lost answer heals itself.
 */

import { shortLine } from './account.js'
import { element, refill } from './dom.js'
import { copyButton, machineView } from './machine_view.js'
import { measuredSection } from './measured_view.js'
import { inWords } from './phrases.js'
import { firstView, showRun } from './run_view.js'
import { Refused } from './server.js'
import { inRow } from './words.js'

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
 * @param {(mark: string, id: string) => string[]} [titlesOf] of the open workflow with a mark, and of a node in it
 * @returns {{ element: HTMLElement, close: () => void }}
 */
export function openPanel(place, events, server, say, titlesOf = () => []) {
  const status = element('p', { className: 'ab-status', role: 'status' })
  const missed = element('p', { className: 'ab-status ab-hint', role: 'status' })
  const runs = element('ul', { className: 'ab-runs' })
  const machine = element('div', {}, element('p', { className: 'ab-caption' }, say('machine.asking')))
  const measured = measuredSection(server, say)
  const section = (/** @type {string} */ name, /** @type {HTMLElement[]} */ ...parts) =>
    element(
      'section',
      { 'aria-labelledby': `ab-${name}-title` },
      element('h3', { id: `ab-${name}-title` }, say(`${name}.title`)),
      ...parts
    )
  const sections = {
    runs: section('runs', missed, runs),
    measured: section('measured', measured.element),
    machine: section(
      'machine',
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
  }
  const root = element(
    'div',
    { className: 'attention-backends', role: 'region', 'aria-label': say('panel.title') },
    element('link', { rel: 'stylesheet', href: new URL('./panel.css', import.meta.url).href }),
    element('h2', {}, say('panel.title')),
    status,
    sections.machine,
    sections.runs,
    sections.measured
  )

  /** @type {Map<number, { view: import('./run_view.js').View, place: HTMLElement, seen: string }>} */
  const open = new Map()
  let [numbering, listed, newest] = ['', '', -1]
  let busy = false
  let closed = false
  let asking = false
  let askAgain = false
  /** The prompt of this page that ended last. */
  let ended = ''
  /** @type {import('./server.js').Machine | undefined} */
  let here
  /** @type {RunSummary | undefined} */
  let last
  /** @type {ReturnType<typeof setTimeout> | undefined} */
  let timer

  async function showMachine(refresh = false) {
    try {
      const found = await server.machine(refresh)
      if (refresh) server.forget()
      here = found
      if (!closed) refill(machine, ...machineView(found, say, !last))
      arrange()
    } catch (error) {
      const why = error instanceof Refused ? error.message : say('panel.lost')
      if (!closed) refill(machine, element('p', { className: 'ab-hint' }, why))
    }
  }

  /** The machine first while it is what a person needs: no run yet, no GPU found, or what was asked for is missing. */
  function arrange() {
    const missing = here?.backends.filter((backend) => !backend.available).map((backend) => backend.id) ?? []
    const asked = last?.fallbacks ? last.nodes.map((node) => node.backend) : []
    const machineFirst = !last || Boolean(here?.hint) || asked.some((backend) => missing.includes(backend))
    const first = machineFirst ? sections.machine : sections.runs
    if (status.nextElementSibling === first) return
    status.after(...(machineFirst ? [first, sections.runs] : [first, sections.measured, sections.machine]))
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
      last = answer.runs[0]
      arrange()
      const unseen = ended && !answer.runs.some((run) => run.prompt_id === ended)
      missed.textContent = unseen ? say('runs.not_ours') : ''
      showList(answer.runs, answer.phrases)
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

  /**
   * @param {RunSummary[]} found
   * @param {import('./phrases.js').Phrases} [phrases]
   */
  function showList(found, phrases) {
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
    refill(runs, ...(found.length ? found.map((run) => entry(run, phrases)) : [element('li', { className: 'ab-caption' }, say('runs.none'))]))
  }

  /**
   * @param {RunSummary} run
   * @param {import('./phrases.js').Phrases} [phrases]
   */
  function entry(run, phrases) {
    const shown = open.get(run.number)
    const toggle = () => {
      if (!open.delete(run.number)) {
        open.set(run.number, { view: firstView(), place: element('div', { className: 'ab-run' }), seen: '' })
      }
      update()
    }
    const outcome = run.outcome && { ...run.outcome, cause: inWords(run.outcome.cause, phrases, say) }
    const line = shortLine(run.totals, run.fallbacks, outcome, say, run)
    const kind = run.outcome?.kind ?? run.state
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
        element('strong', {}, nameOf(run)),
        element('span', {}, figures(run)),
        !shown && element('span', { className: 'ab-line' }, line)
      ),
      shown && shown.place
    )
  }

  /** @param {RunSummary} run */
  function nameOf({ begun, queued_by: mark, sampler, seed, number, model }) {
    const at = begun ? new Date(begun * 1000) : undefined
    const time = at && [at.getHours(), at.getMinutes()].map((part) => String(part).padStart(2, '0')).join(':')
    const [workflow, title] = mark ? titlesOf(mark, String(sampler?.id)) : []
    const node = sampler?.class_type && `${title || titleOfKind(sampler.class_type)} #${sampler.id}`
    const known = typeof seed === 'number' || typeof seed === 'string' ? say('runs.seed', { seed }) : ''
    return [time, workflow, node || `${number}. ${model || '?'}`, known].filter(Boolean).join(' · ')
  }

  /** @param {RunSummary} run */
  function figures(run) {
    const { state, step, steps, seconds, ms_per_step: ms, attention_share: share, compared } = run
    const parts = [
      compared && say('runs.compared', { compared }),
      state === 'running' && step ? say('runs.progress', { step, steps }) : say('runs.steps', { steps }),
      seconds !== null && `${seconds.toFixed(1)} s`,
      ms && say('runs.ms_per_step', { ms: ms < 10 ? ms.toFixed(1) : ms.toFixed(0) }),
      share && say('runs.share', { percent: (100 * share).toFixed(0) })
    ]
    return inRow(parts.map((part) => part || ''), say)
  }

  /** @param {RunSummary} summary */
  async function showOpen(summary) {
    const shown = open.get(summary.number)
    const now = JSON.stringify(summary)
    if (!shown || shown.seen === now) return
    const { run, phrases } = await server.run(summary.number)
    if (closed || open.get(summary.number) !== shown) return
    shown.seen = now
    showRun(shown.place, run, shown.view, say, phrases, summary)
  }

  const onEvent = (/** @type {Event} */ event) => {
    const left = event instanceof CustomEvent ? event.detail?.exec_info?.queue_remaining : undefined
    if (typeof left === 'number') busy = left > 0
    if (event.type === 'execution_start') ended = ''
    if (OVER.includes(event.type) && event instanceof CustomEvent) ended = event.detail?.prompt_id ?? ended
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

/**
 * The name of a kind of node as menus show it; its class where the page does not know it.
 *
 * @param {string} kind
 * @returns {string}
 */
const titleOfKind = (kind) =>
  /** @type {any} */ (globalThis).LiteGraph?.registered_node_types?.[kind]?.title || kind
