/**
 * A line on our nodes: what ran, and before that whether the chosen backend can run on this server.
 *
 * The line is a widget that only shows: it is in no saved workflow and in no prompt. Its room is there before anything
 * ran, so that a run changes no node's size, which is saved. A run's line belongs to the workflow that queued it
 * (workflow_runs.js), as another open one may have nodes with the same ids.
 */

import { addedUp, shortLine, worst } from './account.js'
import { element } from './dom.js'
import { workflowRuns } from './workflow_runs.js'

/**
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyApp} ComfyApp
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyApi} ComfyApi
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyExtension} ComfyExtension
 * @typedef {Parameters<NonNullable<ComfyExtension['nodeCreated']>>[0]} LGraphNode
 * @typedef {import('./server.js').Total} Total
 * @typedef {{ ran: string, kind: string, warning: string, chosen: boolean, queued: boolean, text: HTMLElement }} Line
 *   chosen: whether the backend was chosen after the run that `ran` tells of; queued: whether it was queued since then
 */

const NAME = 'attention_backends_line'
const HEIGHT = 38
const SHOW_RUNS = ['AttentionBackendSelector', 'AttentionConfigText']
const CHOOSE = ['AttentionBackendSelector', 'PerRoleAttentionConfig', 'AttentionSchedule']
const NOT_ONE_BACKEND = ['auto', 'autotune', 'measured']
/** ComfyUI's colours for such texts are too near to that of a node for letters so small. */
const WARNING = 'color-mix(in srgb, var(--error-text, #ff4444) 60%, var(--input-text, #ddd))'
const GREY = 'color-mix(in srgb, var(--descrip-text, #999) 60%, var(--input-text, #ddd))'
const TEXT = 'var(--input-text, #ddd)'
/** Kinds of outcome of a run in which what was asked for was not done. */
const BAD = ['refused', 'failed', 'out_of_memory', 'not_used', 'partly']
const OVER = /** @type {const} */ (['execution_success', 'execution_error', 'execution_interrupted'])

/**
 * The class of a node as the server names it.
 *
 * @param {LGraphNode} node
 * @returns {string}
 */
export function classOf(node) {
  return String(/** @type {any} */ (node.constructor).comfyClass ?? node.type ?? '')
}

/**
 * @param {ComfyApp} app
 * @param {ComfyApi} events
 * @param {import('./server.js').Server} server
 * @param {import('./words.js').Say} say
 */
export function nodeLines(app, events, server, say) {
  /** @type {WeakMap<LGraphNode, Line>} */
  const lines = new WeakMap()
  /** The nodes that say what ran. @type {Set<LGraphNode>} */
  let told = new Set()
  const runsOf = workflowRuns(app, refill)

  /**
   * @param {LGraphNode} node
   * @param {Partial<Line>} change
   */
  function show(node, change) {
    const line = lines.get(node)
    if (!line) return
    Object.assign(line, change)
    const [ran, ...offers] = line.ran.split('\n')
    const summary = offers.length ? `${ran}; ${say('line.recommended')}` : ran
    const said = line.chosen ? line.warning || summary : summary || line.warning
    const bad = Boolean(line.warning) || (said === summary && BAD.includes(line.kind))
    line.text.textContent = bad ? `⚠ ${said}` : said
    line.text.title = [line.warning, line.ran].filter(Boolean).join('\n')
    line.text.style.color = bad ? WARNING : line.ran && line.kind !== 'cancelled' ? TEXT : GREY
    node.setDirtyCanvas(true, true)
  }

  /** @param {LGraphNode} node */
  function addLine(node) {
    const host = /** @type {any} */ (node) // the published types lack addDOMWidget
    if (!host.addDOMWidget) return
    const text = element('div', { 'data-testid': NAME })
    Object.assign(text.style, {
      overflow: 'hidden', font: '11px/1.35 sans-serif', display: '-webkit-box', webkitBoxOrient: 'vertical',
      webkitLineClamp: '2', overflowWrap: 'anywhere', height: 'auto', minHeight: `${HEIGHT - 8}px`,
      maxHeight: `${HEIGHT - 8}px`
    })
    const widget = host.addDOMWidget(NAME, NAME, text, {
      serialize: false, hideOnZoom: false, margin: 8, getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT,
      getValue: () => '', setValue() {}
    })
    widget.serialize = false
    widget.label = say('line.label') // the front end lists widgets of the selected node by name
    lines.set(node, { ran: '', kind: '', warning: '', chosen: false, queued: false, text })
    const [width, height] = node.computeSize()
    node.setSize([Math.max(node.size[0], width), Math.max(node.size[1], height)])
  }

  /** @param {LGraphNode} node */
  async function check(node) {
    const backend = String(node.widgets?.find((widget) => widget.name === 'backend')?.value ?? '')
    const found = backend && !NOT_ONE_BACKEND.includes(backend) ? await server.backend(backend) : undefined
    const now = String(node.widgets?.find((widget) => widget.name === 'backend')?.value ?? '')
    if (now !== backend) return // changed while we asked
    const reasons = found && !found.available ? found.reasons.join('; ') : ''
    show(node, { warning: reasons && say('line.cannot', { backend, reasons }) })
  }

  /**
   * Keeps what the runs of a prompt came to.
   *
   * @param {import('./server.js').RunSummary[]} runs
   * @param {string} prompt
   */
  function keep(runs, prompt) {
    /** @typedef {(import('./server.js').Outcome | undefined)[]} Outcomes */
    /** @typedef {{ class_type: string, totals: Total[], fallbacks: number, offers: string[], outcomes: Outcomes }} Sum */
    /** @type {Map<string, Sum>} */
    const sums = new Map()
    const ours = runs.filter((one) => one.prompt_id === prompt)
    for (const run of ours) {
      for (const { id, class_type } of run.nodes.filter((one) => SHOW_RUNS.includes(one.class_type))) {
        const sum = sums.get(id) ?? { class_type, totals: [], fallbacks: 0, offers: [], outcomes: [] }
        sum.totals.push(...run.totals)
        sum.fallbacks += run.fallbacks
        sum.outcomes.push(run.outcome)
        sum.offers.push(...(run.offers ?? []).filter((offer) => !sum.offers.includes(offer)))
        sums.set(id, sum)
      }
    }
    const texts = [...sums].map(([id, { class_type, totals, fallbacks, offers, outcomes }]) => {
      const outcome = worst(outcomes)
      const text = [shortLine(addedUp(totals), fallbacks, outcome, say), ...offers].join('\n')
      return /** @type {const} */ ([id, { class_type, text, kind: outcome?.kind ?? '' }])
    })
    runsOf.keep(ours[0]?.queued_by, texts)
  }

  const known = () => server.runs().then(({ runs }) => runs, () => [])

  /** @param {Event} event */
  async function tellRun(event) {
    const prompt = event instanceof CustomEvent ? event.detail?.prompt_id : undefined
    if (!prompt) return
    keep(await known(), prompt)
    refill()
  }

  /** Runs may have ended while there was no connection, and nobody says so again. */
  async function tellMissed() {
    server.forget() // it may have been started again, with other packages
    const runs = await known()
    const going = new Set(runs.filter((one) => one.state === 'running').map((one) => one.prompt_id))
    const oldestFirst = new Set(runs.map((one) => one.prompt_id).reverse())
    for (const prompt of oldestFirst) if (prompt && !going.has(prompt)) keep(runs, prompt)
    refill()
  }

  /** Writes what the shown workflow's runs did on its nodes, which are new ones each time that it is opened. */
  function refill() {
    const before = told
    told = new Set()
    for (const [id, { class_type, text, kind }] of runsOf.shown()) {
      const node = nodeOf(app, id)
      if (!node || classOf(node) !== class_type) continue
      told.add(node)
      show(node, { ran: text, kind, ...(lines.get(node)?.queued && { chosen: false, queued: false }) })
    }
    for (const node of before) if (!told.has(node)) show(node, { ran: '', kind: '' })
  }

  for (const name of OVER) events.addEventListener(name, tellRun)
  events.addEventListener('reconnected', tellMissed)
  server.onForget(() => nodesOf(app).filter((node) => CHOOSE.includes(classOf(node))).forEach(check))

  return {
    /**
     * Prepares a new node: it tells the server who queued it, and the backend that it names is watched.
     *
     * @param {LGraphNode} node
     */
    watch(node) {
      const kind = classOf(node)
      if (SHOW_RUNS.includes(kind)) runsOf.carry(node, () => show(node, { queued: true }))
      if (![...SHOW_RUNS, ...CHOOSE].includes(kind)) return
      addLine(node)
      saveWithoutGaps(node)
      if (!CHOOSE.includes(kind)) return
      const widget = node.widgets?.find((one) => one.name === 'backend')
      if (!widget) return
      const before = widget.callback
      widget.callback = function (...given) {
        const result = before?.apply(this, given)
        show(node, { chosen: true, queued: false })
        check(node)
        return result
      }
      setTimeout(() => check(node)) // a loaded node gets its values right after it was made
    }
  }
}

/**
 * The front end saves a gap where a widget has no value to save, and loads as if there were none: a widget that another
 * pack added behind ours would get the value of the one before it. So a node is saved as it is without our widgets.
 *
 * @param {LGraphNode} node
 */
function saveWithoutGaps(node) {
  const before = node.onSerialize
  node.onSerialize = function (saved) {
    saved.widgets_values = saved.widgets_values?.filter(() => true) // which leaves gaps out, and nothing else
    return before?.call(this, saved)
  }
}

/**
 * The node that a prompt names, e.g. `7`, or `12:3` for node 3 in the subgraph of node 12.
 *
 * @param {ComfyApp} app
 * @param {string} id
 * @returns {LGraphNode | undefined}
 */
function nodeOf(app, id) {
  let graph = rootOf(app)
  const path = id.split(':')
  for (const part of path.slice(0, -1)) graph = graph?.getNodeById(part)?.subgraph
  return graph?.getNodeById(path.at(-1)) ?? graph?.getNodeById(Number(path.at(-1))) ?? undefined
}

/**
 * All nodes of the shown workflow, those in its subgraphs too.
 *
 * @param {ComfyApp} app
 * @returns {LGraphNode[]}
 */
function nodesOf(app) {
  const root = rootOf(app)
  return [root, ...(root?.subgraphs?.values() ?? [])].flatMap((graph) => graph?.nodes ?? [])
}

/**
 * The graph of the shown workflow, which front ends without subgraphs keep in another place.
 *
 * @param {ComfyApp} app
 * @returns {any}
 */
function rootOf(app) {
  return app.rootGraph ?? app.canvas?.graph?.rootGraph ?? app.canvas?.graph
}
