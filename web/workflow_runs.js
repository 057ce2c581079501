/**
 * Which open workflow queued a prompt, and what the nodes of each said last.
 *
 * The server's events name a prompt, not a workflow, and ids of nodes and of graphs repeat between workflows. So a
 * prompt that this page queues brings a mark of its workflow along, as an input of our nodes. The server takes that
 * input out again (nodes/history/queued_by.py) and tells the mark with the run. A page that is loaded again finds the
 * marks of its workflows in the storage of its tab.
 */

/**
 * @typedef {import('@comfyorg/comfyui-frontend-types').ComfyApp} ComfyApp
 * @typedef {import('./node_line.js').LGraphNode} LGraphNode
 * @typedef {import('./server.js').NodeLine & { prompt: string, links?: string, earlier?: Said[] }} Said
 *   links: the connections of the node's models when it was first shown; earlier: finished runs with other values, the
 *   last one first
 * @typedef {{ path: string, graph: string, mark: string, gone: [id: string, prompt: string][] }} Stored
 */

const INPUT = 'attention_backends_mark'
/** Workflows whose runs are remembered, and nodes of each: a page can stay open for weeks. */
const KEPT = 200
/** Runs of a node with other values that are remembered. */
const EARLIER = 8
const STORED = 'attention_backends_marks'
/** Values of a node's `mode`. */
export const [MUTED, BYPASSED] = [2, 4]

/**
 * @param {ComfyApp} app
 * @param {() => void} opened called after another workflow, or another state of this one, is shown
 */
export function workflowRuns(app, opened) {
  /** @type {WeakMap<object, string>} */
  const marks = new WeakMap()
  /** By mark, the workflow that queued last at the end. @type {Map<string, { turn: number, lines: Map<string, Said> }>} */
  const said = new Map()
  /** Node and prompt of lines that hold no more, as a later prompt did not have the node. @type {Map<string, Set<string>>} */
  const gone = new Map()
  const before = stored()

  /** The open workflow; a front end without several has one for all. */
  const active = () => /** @type {object} */ (app.extensionManager?.workflow?.activeWorkflow ?? app)

  /** The mark of the open workflow, which is queueing. */
  function mark() {
    const workflow = active()
    const found = known() ?? random()
    marks.set(workflow, found)
    put(said, found, said.get(found) ?? nothing())
    return found
  }

  /** The mark of the open workflow; undefined where neither this page nor the one before its reload queued it. */
  function known() {
    const workflow = active()
    if (!marks.has(workflow)) {
      const { path, graph } = nameOf(workflow)
      const index = before.findIndex((one) => one.path === path && one.graph === graph)
      const [found] = index < 0 ? [] : before.splice(index, 1) // it is of one workflow
      if (found) {
        marks.set(workflow, found.mark)
        put(said, found.mark, nothing())
        put(gone, found.mark, new Set(found.gone.map(([id, prompt]) => key(id, prompt))))
      }
    }
    return marks.get(workflow)
  }

  /** Right before a reload. */
  function store() {
    /** @type {object[]} */
    const open = /** @type {any} */ (app.extensionManager?.workflow)?.openWorkflows ?? [active()]
    const all = open.flatMap((workflow) => {
      const mark = marks.get(workflow)
      const lost = [...(gone.get(mark ?? '') ?? [])].map((one) => JSON.parse(one))
      return mark ? [{ ...nameOf(workflow), mark, gone: lost }] : []
    })
    try {
      sessionStorage.setItem(STORED, JSON.stringify(all.slice(-KEPT)))
    } catch {
      // a browser that stores nothing: the lines are those before a run
    }
  }

  globalThis.addEventListener?.('pagehide', store)

  // The published types lack this method of the front end's stores.
  const workflows = /** @type {any} */ (app.extensionManager?.workflow)
  workflows?.$onAction?.((/** @type {{ name: string, after: (then: () => void) => void }} */ { name, after }) => {
    if (name === 'openWorkflow') after(() => opened()) // also after undo, which makes the nodes anew
  })

  return {
    /**
     * Makes a node bring the mark: by a widget that is never seen and holds no value, so no saved workflow has it.
     *
     * @param {LGraphNode} node
     * @param {() => void} left called when a prompt is about to be queued that has not got the node
     */
    carry(node, left) {
      /** @type {string | undefined} */
      let next
      const widget = {
        name: INPUT, type: 'hidden', value: '', y: 0, serialize: false,
        hidden: true, // on the canvas
        computeSize: () => [0, -4], // front ends of 1.2x leave room for hidden widgets too: this and 4
        options: { hidden: true, canvasOnly: true }, // in Nodes 2.0 and in the panels beside the graph
        disabled: true, computedDisabled: true, // not offered as an input of a subgraph
        /** ComfyUI calls this right before it makes a prompt for the queue, and not before an export. */
        beforeQueued() {
          next = inPrompt(node) ? mark() : undefined
          if (!next) left()
        },
        afterQueued: () => void (next = undefined),
        /** What the prompt holds; an input that is undefined is not in the JSON. */
        serializeValue: async () => {
          const now = next
          next = undefined
          return now
        }
      }
      node.addCustomWidget?.(/** @type {any} */ (widget))
    },
    /**
     * Keeps what the nodes of a workflow's last prompt say, in place of those before, if this page queued it.
     *
     * @param {string | null | undefined} queuedBy
     * @param {(readonly [id: string, said: Said])[]} lines
     * @param {number} turn of the question that was answered: an answer that comes late changes nothing
     */
    keep(queuedBy, lines, turn) {
      const before = said.get(queuedBy ?? '')
      if (!queuedBy || !before || turn < before.turn) return
      const lost = gone.get(queuedBy)
      const now = lines.slice(0, KEPT).filter(([id, one]) => !lost?.has(key(id, one.prompt)))
      for (const [id, one] of now) follow(one, before.lines.get(id))
      said.set(queuedBy, { turn, lines: new Map(now) })
    },
    /**
     * Forgets what a node of the shown workflow says.
     *
     * @param {string} id
     */
    drop(id) {
      const mark = marks.get(active()) ?? ''
      const lost = gone.get(mark) ?? new Set()
      lost.add(key(id, said.get(mark)?.lines.get(id)?.prompt ?? ''))
      put(gone, mark, lost)
      said.get(mark)?.lines.delete(id)
    },
    /** The mark of the shown workflow, if there is one. */
    mark: known,
    /** What the nodes of the shown workflow say, by their ids. */
    shown: () => said.get(marks.get(active()) ?? '')?.lines ?? new Map(),
    /**
     * The names of the open workflow that has a mark, and of a node in it whose title was changed; empty where there
     * is none.
     *
     * @param {string} mark
     * @param {string} id
     */
    titles(mark, id) {
      /** @type {any[]} */
      const open = /** @type {any} */ (app.extensionManager?.workflow)?.openWorkflows ?? []
      const found = open.find((workflow) => marks.get(workflow) === mark)
      const node = found?.activeState?.nodes?.find((/** @type {any} */ one) => String(one.id) === id)
      return [String(found?.path ?? '').replace(/^.*\//, '').replace(/\.json$/, ''), String(node?.title ?? '')]
    }
  }
}

const nothing = () => ({ turn: 0, lines: new Map() })

/**
 * Hands on what a node said before: of the same prompt its connections, of another one the run, unless this one has the
 * same values.
 *
 * @param {Said} now
 * @param {Said | undefined} before
 */
function follow(now, before) {
  if (!before) return
  const isSame = before.prompt === now.prompt
  if (isSame) now.links = before.links
  const own = valuesOf(now)
  const found = [...(isSame || before.state !== 'done' ? [] : [before]), ...(before.earlier ?? [])]
  now.earlier = found.filter((one) => valuesOf(one) !== own).slice(0, EARLIER)
}

/** @param {Said} line */
const valuesOf = ({ inputs, models }) => JSON.stringify([inputs, models])

/** @type {(id: string, prompt: string) => string} */
const key = (id, prompt) => JSON.stringify([id, prompt])

/**
 * What a workflow is called: its path, and the id of its graph, as two copies of a template have the same one.
 *
 * @param {any} workflow
 */
const nameOf = (workflow) => ({ path: String(workflow.path ?? ''), graph: String(workflow.activeState?.id ?? '') })

/**
 * What the page before a reload had, from the storage of this tab.
 *
 * @returns {Stored[]}
 */
function stored() {
  try {
    return JSON.parse(sessionStorage.getItem(STORED) ?? '[]')
  } catch {
    return [] // no storage
  }
}

/**
 * Whether a prompt that is made now has a node: a bypassed one is never asked what the prompt holds, so it would keep
 * a mark for the next export, as nothing is called after a request that failed.
 *
 * @param {LGraphNode} node
 * @returns {boolean}
 */
function inPrompt(node) {
  if (node.mode === MUTED || node.mode === BYPASSED) return false
  /** @type {any} */
  const root = node.graph?.rootGraph
  if (!root?.subgraphs?.size || node.graph === root) return true
  const all = [root, ...root.subgraphs.values()].flatMap((graph) => graph.nodes)
  return all.some((holder) => holder.subgraph === node.graph && inPrompt(holder))
}

/**
 * Puts an entry at the end of a map, and takes the first ones away when there are too many.
 *
 * @template V
 * @param {Map<string, V>} map
 * @param {string} key
 * @param {V} value
 */
function put(map, key, value) {
  map.delete(key)
  map.set(key, value)
  for (const oldest of map.keys()) {
    if (map.size <= KEPT) return
    map.delete(oldest)
  }
}

/** 128 random bits; `crypto.randomUUID` is missing where the page came without TLS from another machine. */
function random() {
  const bytes = crypto.getRandomValues(new Uint8Array(16))
  return [...bytes].map((byte) => byte.toString(16).padStart(2, '0')).join('')
}
