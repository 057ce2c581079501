/**
 * A line on our nodes: what they will do on this server, and what they did.
 *
 * The line is a widget that only shows: it is in no saved workflow and in no prompt. Its room is there before anything
 * ran, so that a run changes no node's size, which is saved. A run's line belongs to the workflow that queued it
 * (workflow_runs.js), as another open one may have nodes with the same ids, and holds as long as the node and what its
 * model comes from are as they were queued. No event tells of every change, so the nodes are looked at again and again.
 */

import { element } from './dom.js'
import { forecastWords, ranWords } from './line_words.js'
import { modelOf, valueIn } from './model_of.js'
import { BYPASSED, MUTED, workflowRuns } from './workflow_runs.js'

/**
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyApp} ComfyApp
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyApi} ComfyApi
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyExtension} ComfyExtension
 * @typedef {Parameters<NonNullable<ComfyExtension['nodeCreated']>>[0]} LGraphNode
 * @typedef {import('./server.js').Forecast} Forecast
 * @typedef {import('./workflow_runs.js').Said} Said
 * @typedef {import('./line_words.js').Words} Words
 * @typedef {{ text: HTMLElement, asked: string, forecast?: Forecast, said?: Said, shown: string, words?: Words }} Line
 *   asked: the values of which `forecast` tells; shown: what is written, to write nothing twice
 */

const NAME = 'attention_backends_line'
const HEIGHT = 38
/** The width at which Nodes 2.0 show the longest option of a schedule. */
const LONG_OPTIONS = 340
const SHOW_RUNS = ['AttentionBackendSelector', 'AttentionConfigText']
const CHOOSE = ['AttentionBackendSelector', 'PerRoleAttentionConfig', 'AttentionSchedule']
const LOOK_AGAIN = 400
/** Questions about a run that goes on. */
const ASK_AGAIN = 1000
/** ComfyUI's colours for such texts are too near to that of a node for letters so small. */
const COLOURS = {
  bad: 'color-mix(in srgb, var(--error-text, #ff4444) 60%, var(--input-text, #ddd))',
  grey: 'color-mix(in srgb, var(--descrip-text, #999) 60%, var(--input-text, #ddd))',
  plain: 'var(--input-text, #ddd)'
}
const OVER = /** @type {const} */ (['execution_success', 'execution_error', 'execution_interrupted'])
const GOING = /** @type {const} */ (['execution_start', 'progress', 'progress_state'])

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
  const runsOf = workflowRuns(app, refill)
  /** Marks of which the server was asked since there was a connection. @type {Set<string>} */
  const asked = new Set()
  let [lastAsked, turns] = [0, 0]

  /**
   * Writes what holds for a node now.
   *
   * @param {LGraphNode} node
   */
  function show(node) {
    const line = lines.get(node)
    if (!line) return
    const { of, ...words } = wordsOf(node, line)
    const shown = JSON.stringify(words)
    if (shown === line.shown) return
    Object.assign(line, { shown, words })
    line.text.title = words.title
    line.text.dataset.of = of
    line.text.style.color = COLOURS[words.tone]
    fit(line)
    node.setDirtyCanvas(true, true)
  }

  /**
   * @param {LGraphNode} node
   * @param {Line} line
   * @returns {Words & { of: 'nothing' | 'forecast' | 'run' }}
   */
  function wordsOf(node, line) {
    const { forecast, said } = line
    const foreseen = forecast && forecastWords(forecast, kindOf(node), say)
    const isOff = node.mode === MUTED || node.mode === BYPASSED
    const run = !isOff && said && (isGoing(said) ? said : lastThatHolds(app, node, said))
    if (run) return { ...ranWords(run, foreseen?.tone === 'bad' ? foreseen.title : '', say), of: 'run' }
    if (isOff || !foreseen) return { texts: [], title: '', tone: 'plain', of: 'nothing' }
    return { ...foreseen, of: 'forecast' }
  }

  /** @param {LGraphNode} node */
  function addLine(node) {
    const host = /** @type {any} */ (node) // the published types lack addDOMWidget
    if (!host.addDOMWidget) return
    const text = element('div', { 'data-testid': NAME })
    Object.assign(text.style, {
      overflow: 'hidden', font: '11px/1.35 sans-serif', overflowWrap: 'anywhere', height: 'auto',
      minHeight: `${HEIGHT - 8}px`, maxHeight: `${HEIGHT - 8}px`
    })
    const widget = host.addDOMWidget(NAME, NAME, text, {
      serialize: false, hideOnZoom: false, margin: 8, getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT,
      getValue: () => '', setValue() {}
    })
    widget.serialize = false
    widget.label = say('line.label') // the front end lists widgets of the selected node by name
    const line = { text, asked: '', shown: '' }
    lines.set(node, line)
    if (globalThis.ResizeObserver) new ResizeObserver(() => fit(line)).observe(text)
    const [width, height] = node.computeSize()
    const least = classOf(node) === 'AttentionSchedule' ? LONG_OPTIONS : width
    node.setSize([Math.max(node.size[0], width, least), Math.max(node.size[1], height)])
  }

  /**
   * Asks the server what a node will do, where its values are not those of which it has told.
   *
   * @param {LGraphNode} node
   */
  async function check(node) {
    const line = lines.get(node)
    if (!line || !CHOOSE.includes(classOf(node))) return
    const [backend, accuracy] = ['backend', 'accuracy'].map((name) => String(valueOf(app, node, name) ?? ''))
    const model = modelOf(node, rootOf(app))
    const recommended = valueOf(app, node, 'recommended') === true
    const wanted = JSON.stringify([backend, accuracy, model, recommended])
    if (!backend || line.asked === wanted) return
    line.asked = wanted
    const forecast = await server.forecast(backend, accuracy || 'exact', model, recommended)
    if (line.asked !== wanted) return // changed while we asked
    line.forecast = forecast
    show(node)
  }

  /** @param {LGraphNode} node */
  const look = (node) => void (check(node), show(node))

  /**
   * Asks what a prompt, or the last one of a workflow, came to.
   *
   * @param {Parameters<typeof server.nodeLines>[0]} of
   */
  async function ask(of) {
    const turn = (turns += 1)
    const found = await server.nodeLines(of).catch(() => undefined)
    if (!found) return
    const all = Object.entries(found.nodes)
    const { prompt_id: prompt, phrases } = found
    runsOf.keep(found.mark, all.map(([id, one]) => [id, { ...one, prompt: prompt ?? '', phrases }]), turn)
    refill()
  }

  /** @param {Event} event */
  const promptOf = (event) => (event instanceof CustomEvent ? event.detail?.prompt_id : undefined)

  /** @param {Event} event */
  function tellRun(event) {
    const prompt = promptOf(event)
    const isOver = OVER.some((name) => name === event.type)
    const ended = event.type === 'execution_success' ? 'success' : 'stopped'
    if (prompt) ask({ prompt_id: prompt, ...(isOver && { ended }) })
  }

  /** @param {Event} event */
  function tellStep(event) {
    if (event.type !== 'execution_start' && Date.now() - lastAsked < ASK_AGAIN) return
    lastAsked = Date.now()
    tellRun(event)
  }

  /** Runs may have ended while there was no connection, and nobody says so again. */
  function tellMissed() {
    asked.clear()
    server.forget() // it may have been started again, with other packages
    restore()
  }

  /** What the shown workflow's last prompt came to, if this page, or the one before its reload, queued any. */
  function restore() {
    const mark = runsOf.mark()
    if (!mark || asked.has(mark)) return
    asked.add(mark)
    ask({ mark })
  }

  /** Hands the shown workflow's lines to its nodes, which are new ones each time that it is opened. */
  function refill() {
    /** @type {Map<LGraphNode, Said>} */
    const now = new Map()
    for (const [id, said] of runsOf.shown()) {
      const node = nodeOf(app, id)
      if (!node || classOf(node) !== said.class_type || !SHOW_RUNS.includes(said.class_type)) continue
      said.links ??= linksOf(node)
      now.set(node, said)
    }
    for (const node of nodesOf(app)) {
      const line = lines.get(node)
      if (!line) continue
      line.said = now.get(node)
      show(node)
    }
  }

  for (const name of OVER) events.addEventListener(name, tellRun)
  for (const name of GOING) events.addEventListener(/** @type {any} */ (name), tellStep)
  events.addEventListener('reconnected', tellMissed)
  server.onForget(() => {
    for (const node of nodesOf(app)) {
      const line = lines.get(node)
      if (line) line.asked = ''
      check(node)
    }
  })
  server.forecast('auto', 'exact') // so that the server has begun before the first node is there
  const timer = /** @type {any} */ (setInterval(() => {
    if (globalThis.document?.hidden) return
    restore()
    nodesOf(app).forEach(look)
  }, LOOK_AGAIN))
  timer.unref?.() // only tests run it where that is there

  return {
    titlesOf: runsOf.titles,
    /**
     * Prepares a new node: it tells the server who queued it, and what holds for it is watched.
     *
     * @param {LGraphNode} node
     */
    watch(node) {
      const kind = classOf(node)
      if (SHOW_RUNS.includes(kind)) {
        runsOf.carry(node, () => {
          const [id] = [...runsOf.shown()].find(([id]) => nodeOf(app, id) === node) ?? []
          if (id) runsOf.drop(id)
          refill()
        })
      }
      if (![...SHOW_RUNS, ...CHOOSE].includes(kind)) return
      addLine(node)
      saveWithoutGaps(node)
      setTimeout(() => look(node)) // a loaded node gets its values right after it was made
    }
  }
}

/** @param {Said} said */
const isGoing = (said) => said.state === 'waiting' || said.state === 'running'

/**
 * @param {ComfyApp} app
 * @param {LGraphNode} node
 * @param {string} name
 * @returns {unknown}
 */
function valueOf(app, node, name) {
  const widget = node.widgets?.find((one) => one.name === name)
  return widget && valueIn(node, widget, rootOf(app))
}

/** @param {LGraphNode} node */
function kindOf(node) {
  const widget = /** @type {any} */ (node.widgets?.find((one) => one.name === 'accuracy'))
  return { isDefault: classOf(node) === 'AttentionBackendSelector', allow: String(widget?.label ?? 'accuracy') }
}

/**
 * The connections of a node's models.
 *
 * @param {LGraphNode} node
 * @returns {string}
 */
const linksOf = (node) => JSON.stringify(
  node.inputs?.flatMap((one, slot) => (one.type === 'MODEL' ? [node.getInputLink(slot)?.id ?? null] : [])) ?? []
)

/**
 * @param {ComfyApp} app
 * @param {LGraphNode} node
 * @param {Said} said
 */
const lastThatHolds = (app, node, said) => [said, ...(said.earlier ?? [])].find((one) => holds(app, node, one))

/**
 * Whether a node, and those that its model comes from, are as they were queued.
 *
 * @param {ComfyApp} app
 * @param {LGraphNode} node
 * @param {Said} said
 */
function holds(app, node, said) {
  if (linksOf(node) !== said.links || !hasValues(app, [node], said.inputs)) return false
  return Object.entries(said.models).every(([id, values]) => {
    const path = pathOf(app, id)
    return path.every(({ mode }) => mode !== MUTED && mode !== BYPASSED) && hasValues(app, path, values)
  })
}

/**
 * Whether the widgets of a node have these values. Text is left out: the front end may queue another one than it shows.
 *
 * @param {ComfyApp} app
 * @param {LGraphNode[]} path the nodes of the subgraphs around it, and the node; a missing node has none
 * @param {Record<string, unknown>} values
 */
function hasValues(app, path, values) {
  const [holders, node] = [path.slice(0, -1), path.at(-1)]
  return node && Object.entries(values).every(([name, value]) => {
    const widget = node.widgets?.find((one) => one.name === name)
    if (!widget || !['combo', 'number', 'toggle'].includes(widget.type)) return true
    return String(valueIn(node, widget, rootOf(app), holders)) === String(value)
  })
}

/**
 * Writes the longest text of a line that fits into it; of one that does not, as much as does.
 *
 * @param {Line} line
 */
function fit({ text, words }) {
  if (!words) return
  const mark = words.tone === 'bad' ? '\u26a0 ' : ''
  const fits = () => text.scrollHeight <= text.clientHeight + 1 && text.scrollWidth <= text.clientWidth + 1
  for (const one of words.texts) {
    text.textContent = mark + one
    if (!text.clientHeight || fits()) return // without a height it is not shown
  }
  const last = [...(words.texts.at(-1) ?? '')]
  text.textContent = words.texts.length ? mark + words.texts.at(-1) : ''
  while (last.length && !fits()) {
    last.pop()
    text.textContent = `${mark}${last.join('')}\u2026`
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
const nodeOf = (app, id) => pathOf(app, id).at(-1)

/**
 * The nodes of the subgraphs around a node that a prompt names, and the node; empty where one of them is missing.
 *
 * @param {ComfyApp} app
 * @param {string} id
 * @returns {LGraphNode[]}
 */
function pathOf(app, id) {
  const found = []
  for (let [graph, parts] = [rootOf(app), id.split(':')]; parts.length; parts = parts.slice(1)) {
    const node = graph?.getNodeById(parts[0]) ?? graph?.getNodeById(Number(parts[0]))
    if (!node) return []
    found.push(node)
    graph = node.subgraph
  }
  return found
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
export function rootOf(app) {
  return app.rootGraph ?? app.canvas?.graph?.rootGraph ?? app.canvas?.graph
}
